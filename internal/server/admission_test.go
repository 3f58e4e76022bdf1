package server_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestAdmission_CallsOverTheLimitAreRejected(t *testing.T) {
	const limit = 3
	hold := make(chan struct{})
	release := sync.OnceFunc(func() { close(hold) })
	defer release()
	atAliyun := make(chan struct{}, limit)
	held := senderFunc(func(verify.Message) (verify.Receipt, error) {
		atAliyun <- struct{}{}
		<-hold
		return verify.Receipt{BizID: "1"}, nil
	})
	var scrape func(string) (int, string)
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), held, func(c *server.Config) {
		c.Limits.Calls = limit
		scrape = scraped(t, c)
	})
	done := make(chan error)
	for range limit { // one after another: connmux closes a connection with too many streams that wait
		go func() {
			_, err := r.SendSMS(context.Background(), servertest.SendRequest(servertest.FreshNumber()))
			done <- err
		}()
		select {
		case <-atAliyun:
		case err := <-done:
			t.Fatalf("a call within the limit: got %v; want it at Aliyun", err)
		}
	}
	_, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"})
	if info, retry, _ := servertest.Details(t, status.Convert(err)); status.Code(err) != codes.Unavailable || info.Reason != "OVERLOADED" ||
		retry == nil {
		t.Errorf("over the limit: got %v, %v, %v; want Unavailable, OVERLOADED and a RetryInfo", err, info, retry)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 1000*time.Hour)
	defer cancel()
	if _, err := r.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); reasonOf(t, err) != "Unavailable OVERLOADED" {
		t.Errorf("over the limit, with a deadline in weeks: got %v; want Unavailable OVERLOADED", err)
	}
	if code, body := r.Post(t, "Valid", `{"phone_number":"18600000000","code":"1"}`); code != 503 || !strings.Contains(body, "OVERLOADED") {
		t.Errorf("JSON over the limit: got %d %s; want 503 OVERLOADED", code, body)
	}
	testutil.Eventually(t, "health is SERVING over the limit", func() bool {
		res, err := healthpb.NewHealthClient(r.Conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return err == nil && res.Status == healthpb.HealthCheckResponse_SERVING
	})
	if _, metrics := scrape("/metrics"); !strings.Contains(metrics, `phonenumber_rejected_total{reason="calls"}`) {
		t.Error("the metrics lack the rejected calls")
	}
	release()
	for range limit {
		if err := <-done; err != nil {
			t.Errorf("a call within the limit: got %v; want OK", err)
		}
	}
	for range 3 * limit { // the slots are free again
		if _, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); err != nil {
			t.Errorf("a call after them: got %v; want OK", err)
		}
	}
}

// A caller that resets a stream frees no slot until its send ends.
func TestAdmission_ResetSendKeepsItsSlot(t *testing.T) {
	hold := make(chan struct{})
	release := sync.OnceFunc(func() { close(hold) })
	defer release()
	atAliyun := make(chan struct{}, 10)
	held := senderFunc(func(verify.Message) (verify.Receipt, error) {
		atAliyun <- struct{}{}
		<-hold
		return verify.Receipt{BizID: "1"}, nil
	})
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), held, func(c *server.Config) { c.Limits.Calls = 1 })
	ctx, cancel := context.WithCancel(t.Context())
	go r.SendSMS(ctx, servertest.SendRequest(servertest.FreshNumber()))
	<-atAliyun
	cancel()
	for range 20 {
		if _, err := r.SendSMS(t.Context(), servertest.SendRequest(servertest.FreshNumber())); status.Code(err) != codes.Unavailable {
			t.Fatalf("a call during a send whose stream was reset: got %v; want Unavailable", err)
		}
	}
	release()
	testutil.Eventually(t, "the slot is free", func() bool {
		_, err := r.SendSMS(t.Context(), servertest.SendRequest(servertest.FreshNumber()))
		return err == nil
	})
}

// heldSender returns a Sender that holds each send until release is closed.
func heldSender(atAliyun chan<- struct{}, release <-chan struct{}) senderFunc {
	return func(verify.Message) (verify.Receipt, error) {
		atAliyun <- struct{}{}
		<-release
		return verify.Receipt{BizID: "1"}, nil
	}
}

// Calls without a credential have their own semaphore, over gRPC and HTTP. They take no slot of
// an authenticated caller.
func TestAdmission_UnauthenticatedCallsHaveOwnSlots(t *testing.T) {
	list, err := auth.Parse("callers.yaml", []byte("callers: [{name: a, token_sha256: "+hashOf("a")+"}]"), auth.ParseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	set := &auth.Registry{}
	set.Replace(list)
	r, _ := startDev(t, func(c *server.Config) { c.Authenticate, c.Limits.Calls = set.Authenticate, 2 })
	for range 10 {
		if err := dialRaw(t, r.Addr).call(1, pb.PhoneNumberService_Valid_FullMethodName, false); err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n", pb.PhoneNumberService_Valid_FullMethodName)
	}
	for range 50 {
		if _, err := r.Valid(asCaller(t.Context(), "a"), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); err != nil {
			t.Fatalf("an authenticated call: got %v; want OK", err)
		}
	}
}

// A request is not admitted before its body has arrived, so a slow body holds no slot.
func TestAdmission_SlowBodiesTakeNoSlot(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Limits.Calls = 2 })
	for range 10 {
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n", pb.PhoneNumberService_Valid_FullMethodName)
		if _, err := io.ReadFull(c, make([]byte, len("HTTP/1.1 100 Continue"))); err != nil { // the server reads the body
			t.Fatal(err)
		}
	}
	for range 20 {
		if _, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); err != nil {
			t.Fatalf("a call during the slow requests: got %v; want OK", err)
		}
	}
}
