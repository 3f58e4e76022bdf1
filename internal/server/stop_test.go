package server_test

import (
	"context"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// The Sender, the Store and the readiness probe never return, for calls over gRPC and HTTP. Even
// then Serve returns within the time that docs/install.md names.
func TestServe_ReturnsIfHandlersNeverEnd(t *testing.T) {
	t.Parallel()
	var hanging, probing atomic.Int64
	released := make(chan struct{})
	hang := func(counter *atomic.Int64) {
		counter.Add(1)
		<-released
	}
	db := servertest.OpenStore(t, "sqlite::memory:")
	var ready atomic.Bool // true until the calls hang
	ready.Store(true)
	var config server.Config
	r := servertest.Start(t, db, senderFunc(func(verify.Message) (verify.Receipt, error) {
		hang(&hanging)
		return verify.Receipt{}, nil
	}), func(c *server.Config) {
		c.Verifier.Store = hangingStore{db, func() { hang(&hanging) }}
		c.Ready = func(context.Context) error {
			if !ready.Load() {
				hang(&probing)
			}
			return nil
		}
		config = *c
	})
	var calling sync.WaitGroup
	t.Cleanup(func() { // runs before start's cleanup, which waits for Serve
		close(released)
		calling.Wait()
	})
	call := func(f func(ctx context.Context)) {
		calling.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			f(ctx)
		})
	}
	number := servertest.FreshNumber()
	call(func(ctx context.Context) { r.SendSMS(ctx, servertest.SendRequest(number)) })
	call(func(ctx context.Context) { r.Valid(ctx, &pb.ValidRequest{PhoneNumber: hangingNumber, Code: "000000"}) })
	call(func(ctx context.Context) {
		body := strings.NewReader(`{"phone_number":"` + servertest.FreshNumber() + `","signature":"a","template_code":"b"}`)
		q, err := http.NewRequestWithContext(ctx, "POST", "http://"+r.Addr+sendPath, body)
		if err != nil {
			t.Error(err)
			return
		}
		if res, err := http.DefaultClient.Do(q); err == nil {
			res.Body.Close()
		}
	})
	watch, err := healthpb.NewHealthClient(r.Conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "three calls hang", func() bool { return hanging.Load() == 3 })
	ready.Store(false)
	testutil.Eventually(t, "a readiness probe hangs", func() bool { return probing.Load() == 1 })

	begin := time.Now()
	r.Stop()
	select {
	case <-r.Done:
	case <-time.After(config.StopTimeout() + 30*time.Second): // a margin for slow machines
		t.Fatalf("Serve still runs; want it to return within %v", config.StopTimeout())
	}
	t.Logf("returned after %v", time.Since(begin))
	const want = "abandoned 3 calls that did not end within 17s"
	if r.Err == nil || r.Err.Error() != want {
		t.Errorf("Serve: got %v; want %q", r.Err, want)
	}
	if !r.Log.Contains(`level=ERROR msg="abandoned calls that did not end" calls=3`) {
		t.Error("the log lacks the line about three abandoned calls")
	}
	r.Err = nil
}

const hangingNumber = "18655555555"

// A hangingStore hangs when hangingNumber, which no other test uses, is loaded.
type hangingStore struct {
	verify.Store
	hang func()
}

func (s hangingStore) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	if n == "+86"+hangingNumber {
		s.hang()
	}
	return s.Store.Load(ctx, n)
}

// A drain ends when the outcome of the last send is stored, even if the call ended long before.
func TestDrain_WaitsForOutcomesBeingStored(t *testing.T) {
	db := servertest.OpenStore(t, "sqlite::memory:")
	held := &heldStore{Store: db, release: make(chan struct{})}
	sends := 0
	r := servertest.Start(t, db, senderFunc(func(verify.Message) (verify.Receipt, error) {
		sends++
		held.holding.Store(sends == 2)
		return verify.Receipt{}, nil
	}), func(c *server.Config) { c.Verifier.Store = held })
	number := servertest.FreshNumber()
	r.MustSend(t, number)
	_, err := r.SendSMS(t.Context(), servertest.SendRequest(number)) // a resend, which needs a confirm
	if got := reasonOf(t, err); got != "Unknown SENT_NOT_CONFIRMED" {
		t.Fatalf("got %s; want Unknown SENT_NOT_CONFIRMED", got)
	}
	r.Stop()
	testutil.Eventually(t, "draining", func() bool { return r.Log.Contains("draining") })
	select {
	case <-r.Done:
		t.Fatal("Serve returned before the outcome was stored; want it to wait")
	case <-time.After(200 * time.Millisecond): // Serve must not return in this time
	}
	close(held.release)
	<-r.Done
	if held.swaps.Load() != 3 {
		t.Errorf("swaps: got %d; want 3, two begins and a confirm", held.swaps.Load())
	}
}

// A drain stores owed acceptances when it begins, so that a call that hangs cannot take their time.
func TestDrain_StoresOwedAcceptancesFirst(t *testing.T) {
	db := servertest.OpenStore(t, "sqlite::memory:")
	r := servertest.Start(t, db, senderFunc(func(verify.Message) (verify.Receipt, error) {
		return verify.Receipt{BizID: "biz"}, nil
	}), func(c *server.Config) { c.DrainDelay = 3 * time.Second })
	number := servertest.FreshNumber()
	r.MustSend(t, number)
	other := verify.New(verify.Config{Rules: verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute}, Store: db, Now: time.Now})
	accepted := func() string {
		found, err := other.Inspect(t.Context(), verify.Number("+86"+number))
		if err != nil {
			t.Fatal(err)
		}
		return found.History.Accepted.BizID
	}
	if got := accepted(); got != "" {
		t.Errorf("stored before the drain: got %q; want none", got)
	}
	r.Stop()
	testutil.Eventually(t, "the acceptance is stored", func() bool { return accepted() == "biz" })
	select {
	case <-r.Done:
		t.Error("the acceptance was stored at the end of the drain; want it at its begin")
	default:
	}
}

// A heldStore holds each Swap until release is closed, once holding is true.
type heldStore struct {
	verify.Store
	holding atomic.Bool
	release chan struct{}
	swaps   atomic.Int64
}

func (s *heldStore) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	if s.holding.Load() {
		<-s.release
	}
	s.swaps.Add(1)
	return s.Store.Swap(ctx, n, old, next)
}

// A drain reports NOT_SERVING, accepts connections for the drain delay, and lets calls in flight
// finish.
func TestDrain_IsNotServingAndFinishesCallsInFlight(t *testing.T) {
	atAliyun, release := make(chan string, 1), make(chan struct{})
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), senderFunc(func(m verify.Message) (verify.Receipt, error) {
		atAliyun <- m.Code
		<-release
		return verify.Receipt{}, nil
	}), func(c *server.Config) { c.DrainDelay = 2 * time.Second })
	testutil.Eventually(t, "serving", func() bool { return r.Log.Contains("msg=serving") })

	grpcCall, httpCall := make(chan error, 1), make(chan int, 1)
	go func() {
		_, err := r.SendSMS(t.Context(), servertest.SendRequest(servertest.FreshNumber()))
		grpcCall <- err
	}()
	<-atAliyun
	go func() {
		code, _ := r.Post(t, "SendSMS", `{"phone_number":"`+servertest.FreshNumber()+`","signature":"a","template_code":"b"}`)
		httpCall <- code
	}()
	<-atAliyun
	r.Stop()
	testutil.Eventually(t, "NOT_SERVING", func() bool {
		res, err := healthpb.NewHealthClient(r.Conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return err == nil && res.Status == healthpb.HealthCheckResponse_NOT_SERVING
	})
	watch, err := healthpb.NewHealthClient(r.Conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if res, err := watch.Recv(); err != nil || res.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health watch: got %v, %v; want NOT_SERVING", res, err)
	}
	conn, err := net.Dial("tcp", r.Addr)
	if err != nil {
		t.Fatalf("a new connection during the drain delay: got %v; want it accepted", err)
	}
	conn.Close()
	testutil.Eventually(t, "new connections are no longer accepted", func() bool {
		c, err := net.Dial("tcp", r.Addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case <-r.Done:
		t.Fatal("Serve returned during calls in flight; want it to wait")
	default:
	}
	if res, err := watch.Recv(); err == nil { // an open watch would delay the drain
		t.Errorf("health watch after the drain delay: got %v; want its end", res)
	}
	close(release)
	if err := <-grpcCall; err != nil {
		t.Errorf("the gRPC call in flight: got %v; want OK", err)
	}
	if code := <-httpCall; code != 200 {
		t.Errorf("the HTTP call in flight: got %d; want 200", code)
	}
	<-r.Done
}
