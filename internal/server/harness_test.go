package server_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv(server.LoadOn); addr != "" {
		server.Load(addr)
		return
	}
	os.Exit(mariadbtest.Run(m))
}

// onBothStores runs a test on MariaDB, with the stores of two replicas, and on SQLite, with the
// store of one.
func onBothStores(t *testing.T, test func(t *testing.T, replicas []*store.DB)) {
	t.Run("MariaDB", func(t *testing.T) {
		dsn := mariadbtest.DSN(t)
		test(t, []*store.DB{openStore(t, dsn), openStore(t, dsn)})
	})
	t.Run("SQLite", func(t *testing.T) {
		test(t, []*store.DB{openStore(t, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))})
	})
}

func openStore(t testing.TB, dsn string) *store.DB {
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

// A replica is one running service and a gRPC client of it.
type replica struct {
	pb.PhoneNumberServiceClient
	conn *grpc.ClientConn
	addr string
	log  *servicetest.Output
	stop context.CancelFunc // begins the drain
	done chan struct{}      // closed when Serve returns
	err  error              // of Serve; a test fails unless it is nil
}

// start runs the service until the test ends. Each change gets the complete configuration
// before the start.
func start(t testing.TB, db *store.DB, sender verify.Sender, change ...func(*server.Config)) *replica {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &replica{addr: listener.Addr().String(), log: &servicetest.Output{}, done: make(chan struct{})}
	log := slog.New(telemetry.CallerHandler{Handler: slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})})
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
		Limits:  server.DefaultLimits, Reflection: true,
		Telemetry: telemetry.Telemetry{Metrics: telemetry.NewMetrics("test"), Log: log},
	}
	for _, f := range change {
		f(&config)
	}
	domain := config.Verifier.Config
	domain.Store, domain.Sender = config.Telemetry.Store(domain.Store), config.Telemetry.Sender(domain.Sender)
	config.Verifier = verify.New(domain)
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() {
		defer close(r.done)
		r.err = server.Serve(ctx, config)
	}()
	r.conn, err = grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	r.PhoneNumberServiceClient = pb.NewPhoneNumberServiceClient(r.conn)
	t.Cleanup(func() {
		r.conn.Close()
		cancel()
		<-r.done
		if r.err != nil {
			t.Errorf("Serve: %v", r.err)
		}
		if t.Failed() {
			t.Logf("log of %s:\n%s", r.addr, r.log)
		}
	})
	return r
}

// startDev runs the service as the command dev does.
func startDev(t *testing.T, change ...func(*server.Config)) (*replica, *dev.Inbox) {
	inbox := &dev.Inbox{Rules: verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute}}
	config := append(change, func(c *server.Config) { dev.Configure(c, inbox) })
	return start(t, openStore(t, "sqlite::memory:"), inbox, config...), inbox
}

var sharedKeys = verify.RandomKeys() // all replicas of a service share them

func aliyun(t *testing.T, fake *dysmsapitest.Server) verify.Sender {
	t.Helper()
	sender, err := sms.NewAliyun(sms.AliyunConfig{AccessKeyID: fake.AccessKeyID, AccessKeySecret: fake.AccessKeySecret, Endpoint: fake.URL})
	if err != nil {
		t.Fatal(err)
	}
	return sender
}

// send sends a code to number. The test fails if the send fails.
func (r *replica) send(t testing.TB, number string) {
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

// fieldOf returns the name of the first invalid field, or "".
func fieldOf(bad *errdetails.BadRequest) string {
	if len(bad.GetFieldViolations()) == 0 {
		return ""
	}
	return bad.FieldViolations[0].Field
}

var lastNumber atomic.Int64

// freshNumber returns a number that no other test uses.
func freshNumber() string { return fmt.Sprintf("186%08d", lastNumber.Add(1)) }

// lastCode returns the code of the last SMS sent to number.
func lastCode(t *testing.T, fake *dysmsapitest.Server, number string) string {
	t.Helper()
	accepted := fake.Accepted()
	for i := len(accepted) - 1; i >= 0; i-- {
		if accepted[i].PhoneNumber == number {
			return accepted[i].Code
		}
	}
	t.Fatalf("SMS to %s: got none; want at least one", number)
	return ""
}

// wrong returns the i-th code after code.
func wrong(code string, i int) string {
	var n int
	fmt.Sscan(code, &n)
	return fmt.Sprintf("%06d", (n+1+i)%1_000_000)
}

// A recorder is a Sender that records each code and passes the message on.
type recorder struct {
	verify.Sender
	mu    sync.Mutex
	codes []string
}

func (r *recorder) Send(ctx context.Context, m verify.Message) (verify.Receipt, error) {
	r.mu.Lock()
	r.codes = append(r.codes, m.Code)
	r.mu.Unlock()
	return r.Sender.Send(ctx, m)
}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.codes...)
}

// A senderFunc is a function that implements Sender.
type senderFunc func(m verify.Message) (verify.Receipt, error)

func (f senderFunc) Send(_ context.Context, m verify.Message) (verify.Receipt, error) { return f(m) }

// eventually waits until condition is true, and fails the test after 20 s.
func eventually(t *testing.T, description string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", description)
		}
	}
}
