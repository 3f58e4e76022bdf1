package server_test

import (
	"context"
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
	if !strings.Contains(r.Log.String(), `level=ERROR msg="abandoned calls that did not end" calls=3`) {
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
