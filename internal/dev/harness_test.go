package dev

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A replica is one running service and a gRPC client of it.
type replica struct {
	pb.PhoneNumberServiceClient
	addr string
	log  *servicetest.Output
	stop context.CancelFunc // begins the drain
	done chan struct{}      // closed when Serve returns
}

// startDev runs the service as the command dev does, until the test ends. Each change gets the
// complete configuration before dev does.
func startDev(t *testing.T, change ...func(*server.Config)) (*replica, *Inbox) {
	t.Helper()
	db, err := store.Open("sqlite::memory:")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &replica{addr: listener.Addr().String(), log: &servicetest.Output{}, done: make(chan struct{})}
	log := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	inbox := newInbox()
	config := server.Config{
		Listener: listener,
		Verifier: &verify.Verifier{Config: verify.Config{
			Rules:      inbox.Rules,
			Keys:       verify.RandomKeys(),
			Store:      db,
			Sender:     inbox,
			SMSTimeout: 5 * time.Second,
			Now:        verify.SteadyClock(),
			Random:     rand.Reader,
			Log:        log,
		}},
		Numbers:   verify.NumberParser{Region: "CN", Plan: numberplan.Mobile},
		Ready:     db.Ready,
		Version:   "test",
		Limits:    server.DefaultLimits,
		Telemetry: telemetry.Telemetry{Metrics: telemetry.NewMetrics("test"), Log: log},
	}
	for _, f := range change {
		f(&config)
	}
	config.Verifier = verify.New(config.Verifier.Config)
	Configure(&config, inbox)
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() {
		defer close(r.done)
		if err := server.Serve(ctx, config); err != nil {
			t.Errorf("Serve: %v", err)
		}
	}()
	conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	r.PhoneNumberServiceClient = pb.NewPhoneNumberServiceClient(conn)
	t.Cleanup(func() {
		conn.Close()
		cancel()
		<-r.done
		if t.Failed() {
			t.Logf("log of %s:\n%s", r.addr, r.log)
		}
	})
	return r, inbox
}

// send sends a code to number. The test fails if the send fails.
func (r *replica) send(t *testing.T, number string) {
	t.Helper()
	if _, err := r.SendSMS(t.Context(), request(number)); err != nil {
		t.Fatalf("SendSMS: %v", err)
	}
}

func (r *replica) valid(t *testing.T, number, code string) bool {
	t.Helper()
	res, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
	if err != nil {
		t.Fatalf("Valid: %v", err)
	}
	return res.GetValid()
}

func request(number string) *pb.SendSMSRequest {
	return &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_123456789"}
}

var lastNumber atomic.Int64

// freshNumber returns a number that no other test uses.
func freshNumber() string { return fmt.Sprintf("186%08d", lastNumber.Add(1)) }

// ask makes a request and returns the status code and the body. headers are names and values in
// turn.
func (r *replica) ask(t *testing.T, method, path, body string, headers ...string) (int, string) {
	t.Helper()
	q, err := http.NewRequest(method, "http://"+r.addr+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		q.Header.Set(headers[i], headers[i+1])
	}
	return do(t, q)
}

// do sends a request and returns the status code and the body.
func do(t *testing.T, q *http.Request) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(q.Context(), 30*time.Second) // for a response that never ends
	defer cancel()
	res, err := http.DefaultClient.Do(q.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}
