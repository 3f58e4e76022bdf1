// Package servertest runs the service in the process of a test, and calls it. It is a package because
// the tests of server and dev share it.
package servertest

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

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// OpenStore opens and prepares a store until the test ends.
func OpenStore(t testing.TB, dsn string) *store.DB {
	t.Helper()
	db, err := store.Open(dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	return db
}

// A Replica is one running service and a gRPC client of it.
type Replica struct {
	pb.PhoneNumberServiceClient
	Conn     *grpc.ClientConn
	Addr     string
	Log      *testutil.Output
	Stop     context.CancelFunc // begins the drain
	Done     chan struct{}      // closed when Serve returns
	Verifier *verify.Verifier
	Err      error // of Serve; a test fails unless it is nil
}

// Start runs the service until the test ends. Each change gets the complete configuration
// before the start.
func Start(t testing.TB, db *store.DB, sender verify.Sender, change ...func(*server.Config)) *Replica {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Replica{Addr: listener.Addr().String(), Log: &testutil.Output{}, Done: make(chan struct{})}
	log := slog.New(telemetry.NewLogHandler(slog.NewTextHandler(r.Log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	config := server.Config{
		Listener: listener,
		Verifier: &verify.Verifier{Config: verify.Config{
			Rules:      verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute},
			Keys:       sharedKeys,
			Store:      db,
			Sender:     sender,
			SMSTimeout: 5 * time.Second,
			Now:        verify.SteadyClock(),
			Random:     rand.Reader,
			Log:        log,
		}},
		Numbers: verify.NumberParser{Region: "CN", Plan: numberplan.Mobile},
		Ready:   db.Ready,
		Version: "test",
		Limits:  config.DefaultLimits(), Reflection: true,
		Telemetry: telemetry.Telemetry{Metrics: telemetry.NewMetrics("test"), Log: log},
	}
	for _, f := range change {
		f(&config)
	}
	domain := config.Verifier.Config
	domain.Store, domain.Sender = config.Telemetry.Store(domain.Store), config.Telemetry.Sender(domain.Sender)
	config.Verifier = verify.New(domain)
	r.Verifier = config.Verifier
	ctx, cancel := context.WithCancel(context.Background())
	r.Stop = cancel
	go func() {
		defer close(r.Done)
		r.Err = server.Serve(ctx, config)
	}()
	r.Conn, err = grpc.NewClient(r.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	r.PhoneNumberServiceClient = pb.NewPhoneNumberServiceClient(r.Conn)
	t.Cleanup(func() {
		r.Conn.Close()
		cancel()
		<-r.Done
		if r.Err != nil {
			t.Errorf("Serve: %v", r.Err)
		}
		if t.Failed() {
			t.Logf("log of %s:\n%s", r.Addr, r.Log)
		}
	})
	return r
}

var sharedKeys = verify.RandomKeys() // all replicas of a service share them

// MustSend sends a code to number. The test fails if the send fails.
func (r *Replica) MustSend(t testing.TB, number string) {
	t.Helper()
	if _, err := r.SendSMS(t.Context(), SendRequest(number)); err != nil {
		t.Fatalf("SendSMS: %v", err)
	}
}

// IsValid returns the result of Valid. The test fails if the call fails.
func (r *Replica) IsValid(t *testing.T, number, code string) bool {
	t.Helper()
	res, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
	if err != nil {
		t.Fatalf("Valid: %v", err)
	}
	return res.GetValid()
}

// SendRequest returns a valid request of SendSMS.
func SendRequest(number string) *pb.SendSMSRequest {
	return &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_123456789"}
}

// FieldOf returns the name of the first invalid field, or "".
func FieldOf(bad *errdetails.BadRequest) string {
	if len(bad.GetFieldViolations()) == 0 {
		return ""
	}
	return bad.FieldViolations[0].Field
}

var lastNumber atomic.Int64

// FreshNumber returns a number that no other test uses.
func FreshNumber() string { return fmt.Sprintf("186%08d", lastNumber.Add(1)) }

// Post makes a call over HTTP/1.1, with the Content-Type of "curl -d" unless headers replace it.
// It returns the status code and the body.
func (r *Replica) Post(t *testing.T, method, body string, headers ...string) (int, string) {
	t.Helper()
	headers = append([]string{"Content-Type", "application/x-www-form-urlencoded"}, headers...)
	return r.Ask(t, "POST", "/phonenumberservice.PhoneNumberService/"+method, body, headers...)
}

// Ask makes a request and returns the status code and the body.
func (r *Replica) Ask(t *testing.T, method, path, body string, headers ...string) (int, string) {
	t.Helper()
	return Do(t, r.NewRequest(t, method, path, body, headers...))
}

// NewRequest returns a request to the replica. headers are names and values in turn.
func (r *Replica) NewRequest(t *testing.T, method, path, body string, headers ...string) *http.Request {
	t.Helper()
	q, err := http.NewRequest(method, "http://"+r.Addr+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		q.Header.Set(headers[i], headers[i+1])
	}
	return q
}

// Do sends a request and returns the status code and the body.
func Do(t *testing.T, q *http.Request) (int, string) {
	t.Helper()
	res, body := RoundTrip(t, http.DefaultClient, q)
	return res.StatusCode, body
}

// RoundTrip sends a request, and returns the response and its body.
func RoundTrip(t *testing.T, c *http.Client, q *http.Request) (*http.Response, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(q.Context(), 30*time.Second) // for a response that never ends
	defer cancel()
	res, err := c.Do(q.WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(b)
}

// Exchange makes a request with only these headers. It returns the response without
// decompression.
func (r *Replica) Exchange(t *testing.T, method, path, body string, headers ...string) (*http.Response, string) {
	t.Helper()
	plain := &http.Transport{DisableCompression: true} // adds no Accept-Encoding
	defer plain.CloseIdleConnections()
	return RoundTrip(t, &http.Client{Transport: plain}, r.NewRequest(t, method, path, body, headers...))
}

// Details returns the details of s.
func Details(t *testing.T, s *status.Status) (info *errdetails.ErrorInfo, retry *errdetails.RetryInfo, bad *errdetails.BadRequest) {
	t.Helper()
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.RetryInfo:
			retry = d
		case *errdetails.BadRequest:
			bad = d
		default:
			t.Errorf("details: got an unexpected %v", d)
		}
	}
	return info, retry, bad
}
