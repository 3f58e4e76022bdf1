package server_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv(server.LoadOn); addr != "" {
		server.Load(addr)
		return
	}
	os.Exit(mysqltest.Run(m))
}

// onBothStores runs a test on a server, with the stores of two replicas, and on SQLite, with the
// store of one.
func onBothStores(t *testing.T, test func(t *testing.T, replicas []*store.DB)) {
	t.Run("server", func(t *testing.T) {
		dsn := mysqltest.DSN(t)
		test(t, []*store.DB{servertest.OpenStore(t, dsn), servertest.OpenStore(t, dsn)})
	})
	t.Run("SQLite", func(t *testing.T) {
		test(t, []*store.DB{servertest.OpenStore(t, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))})
	})
}

// startDev runs the service as the command dev does.
func startDev(t *testing.T, change ...func(*server.Config)) (*servertest.Replica, *dev.Inbox) {
	inbox := &dev.Inbox{Rules: verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute}}
	config := append(change, func(c *server.Config) { dev.Configure(c, inbox) })
	return servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), inbox, config...), inbox
}

func aliyun(t *testing.T, fake *dysmsapitest.Server) verify.Sender {
	t.Helper()
	sender, err := sms.NewAliyun(sms.AliyunConfig{
		Credentials: sms.Credentials{AccessKeyID: fake.AccessKeyID, AccessKeySecret: fake.AccessKeySecret},
		Endpoint:    fake.URL, PNVSEndpoint: fake.PNVSURL, CodeTTL: 10 * time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	return sender
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

// postJSON makes a call and returns the status code, the protocol and the body.
func postJSON(t *testing.T, c *http.Client, url, body string, headers ...string) (int, string, string) {
	t.Helper()
	q, err := http.NewRequest(http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		q.Header.Set(headers[i], headers[i+1])
	}
	res, b := servertest.RoundTrip(t, c, q)
	return res.StatusCode, res.Proto, b
}

const sendPath = "/phonenumberservice.PhoneNumberService/SendSMS"
