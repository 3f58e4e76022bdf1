package server_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const secretKey, secretContext = "key-4f6d1c", "session-98b2aa"

// A caller calls SendSMS, or Valid if code is not "", with metadata over one protocol. It returns OK or
// the reason of the error, the result of Valid, and the metadata of the response.
type caller func(t *testing.T, r *servertest.Replica, number, code string, md ...string) (reason string, valid bool, header http.Header)

var callers = map[string]caller{
	"gRPC": func(t *testing.T, r *servertest.Replica, number, code string, md ...string) (string, bool, http.Header) {
		t.Helper()
		ctx := metadata.AppendToOutgoingContext(t.Context(), md...)
		var header metadata.MD
		var res *pb.ValidResponse
		var err error
		if code == "" {
			_, err = r.SendSMS(ctx, servertest.SendRequest(number), grpc.Header(&header))
		} else {
			res, err = r.Valid(ctx, &pb.ValidRequest{PhoneNumber: number, Code: code}, grpc.Header(&header))
		}
		canonical := http.Header{}
		for name, values := range header {
			canonical[http.CanonicalHeaderKey(name)] = values
		}
		if err != nil {
			info, _, _ := servertest.Details(t, status.Convert(err))
			return info.GetReason(), false, canonical
		}
		return "OK", res.GetValid(), canonical
	},
	"JSON": func(t *testing.T, r *servertest.Replica, number, code string, md ...string) (string, bool, http.Header) {
		t.Helper()
		method, body := "SendSMS", fmt.Sprintf(`{"phone_number":%q,"signature":"阿里云","template_code":"SMS_123456789"}`, number)
		if code != "" {
			method, body = "Valid", fmt.Sprintf(`{"phone_number":%q,"code":%q}`, number, code)
		}
		q := r.NewRequest(t, http.MethodPost, "/phonenumberservice.PhoneNumberService/"+method, body, "Content-Type", "application/json")
		for i := 0; i < len(md); i += 2 {
			q.Header.Add(md[i], md[i+1])
		}
		res, text := servertest.RoundTrip(t, http.DefaultClient, q)
		if res.StatusCode != http.StatusOK {
			_, reason, _ := strings.Cut(text, `"reason":"`)
			reason, _, _ = strings.Cut(reason, `"`)
			return reason, false, res.Header
		}
		return "OK", strings.Contains(text, `"valid":true`), res.Header
	},
	"gRPC-Web": func(t *testing.T, r *servertest.Replica, number, code string, md ...string) (string, bool, http.Header) {
		t.Helper()
		if code == "" {
			_, reason, header := grpcWebCall[pb.Empty](t, r, sendPath, servertest.SendRequest(number), md)
			return reason, false, header
		}
		res, reason, header := grpcWebCall[pb.ValidResponse](t, r, validPath, &pb.ValidRequest{PhoneNumber: number, Code: code}, md)
		return reason, res.GetValid(), header
	},
}

// grpcWebCall makes a call over gRPC-Web. It returns OK or the reason of the error.
func grpcWebCall[Res, Req any](t *testing.T, r *servertest.Replica, path string, message *Req, md []string) (*Res, string, http.Header) {
	t.Helper()
	q := connect.NewRequest(message)
	for i := 0; i < len(md); i += 2 {
		q.Header().Add(md[i], md[i+1])
	}
	res, err := connect.NewClient[Req, Res](http.DefaultClient, "http://"+r.Addr+path, connect.WithGRPCWeb()).CallUnary(t.Context(), q)
	if err == nil {
		return res.Msg, "OK", res.Header()
	}
	var e *connect.Error
	if !errors.As(err, &e) {
		t.Fatalf("%s: got %v; want a status", path, err)
	}
	for _, d := range e.Details() {
		if value, err := d.Value(); err == nil {
			if info, ok := value.(*errdetails.ErrorInfo); ok {
				return nil, info.Reason, e.Meta()
			}
		}
	}
	return nil, "", e.Meta()
}

func onEachProtocol(t *testing.T, test func(t *testing.T, call caller)) {
	for name, call := range callers {
		t.Run(name, func(t *testing.T) { test(t, call) })
	}
}

func TestContext_CodeCountsOnlyInItsOwn(t *testing.T) {
	onEachProtocol(t, func(t *testing.T, call caller) {
		r, inbox := startDev(t)
		number := servertest.FreshNumber()
		if reason, _, _ := call(t, r, number, "", "verification-context", secretContext); reason != "OK" {
			t.Fatalf("SendSMS: got %s; want OK", reason)
		}
		code := inbox.Messages("")[0].Code
		for _, c := range []struct {
			md   string
			want bool
		}{{"", false}, {"login", false}, {secretContext, true}} {
			var md []string
			if c.md != "" {
				md = []string{"verification-context", c.md}
			}
			if reason, got, _ := call(t, r, number, code, md...); reason != "OK" || got != c.want {
				t.Errorf("Valid in the context %q: got %s %v; want %v", c.md, reason, got, c.want)
			}
		}
		log := r.Log.String()
		if strings.Count(log, "outcome=other_context") != 2 || strings.Count(log, "verification_context=present") != 3 {
			t.Errorf("log: got %s; want other_context twice, and three calls with a context", log)
		}
		if strings.Contains(log, secretContext) {
			t.Error("the log contains the context")
		}
	})
}

func TestIdempotencyKey_RepeatsTheAnswer(t *testing.T) {
	onEachProtocol(t, func(t *testing.T, call caller) {
		r, inbox := startDev(t)
		number := servertest.FreshNumber()
		key := []string{"idempotency-key", secretKey}
		for i, want := range []struct{ reason, replayed string }{{"OK", ""}, {"OK", "true"}} {
			if i == 1 {
				key[1] = `"` + secretKey + `"` // the form of the IETF draft is the same key
			}
			reason, _, header := call(t, r, number, "", key...)
			if got := header.Get("Idempotency-Replayed"); reason != want.reason || got != want.replayed {
				t.Errorf("send %d: got %s, replayed %q; want %s, %q", i+1, reason, got, want.reason, want.replayed)
			}
		}
		reason, _, _ := call(t, r, number, "", append(key, "verification-context", "login")...)
		if reason != "IDEMPOTENCY_KEY_REUSED" {
			t.Errorf("another context: got %s; want IDEMPOTENCY_KEY_REUSED", reason)
		}
		if n := len(inbox.Messages("")); n != 1 {
			t.Errorf("messages: got %d; want 1", n)
		}
		for _, want := range []string{"idempotency=new", "idempotency=replayed", "idempotency=reused"} {
			if !r.Log.Contains(want) {
				t.Errorf("log: got %s; want %s", r.Log, want)
			}
		}
		if r.Log.Contains(secretKey) {
			t.Error("the log contains the key")
		}
	})
}

func TestIdempotencyKey_UnknownAndInProgressSendNothing(t *testing.T) {
	onEachProtocol(t, func(t *testing.T, call caller) {
		db := servertest.OpenStore(t, "sqlite::memory:")
		asked, answer := make(chan struct{}), make(chan error)
		r := servertest.Start(t, db, senderFunc(func(verify.Message) (verify.Receipt, error) {
			asked <- struct{}{}
			return verify.Receipt{}, <-answer
		}))
		number := servertest.FreshNumber()
		send := func() string {
			reason, _, header := call(t, r, number, "", "idempotency-key", secretKey)
			if header.Get("Idempotency-Replayed") == "true" {
				reason += " replayed"
			}
			return reason
		}
		first := make(chan string)
		go func() { first <- send() }()
		<-asked
		if reason := send(); reason != "SEND_IN_PROGRESS" {
			t.Errorf("during the send: got %s; want SEND_IN_PROGRESS", reason)
		}
		_, err := r.SendSMS(metadata.AppendToOutgoingContext(t.Context(), "idempotency-key", secretKey), servertest.SendRequest(number))
		if _, retry, _ := servertest.Details(t, status.Convert(err)); retry.GetRetryDelay().AsDuration() != time.Second {
			t.Errorf("during the send: got RetryInfo %v; want 1s", retry)
		}
		answer <- errors.New("EOF")
		if reason := <-first; reason != "SMS_OUTCOME_UNKNOWN" {
			t.Errorf("the first send: got %s; want SMS_OUTCOME_UNKNOWN", reason)
		}
		if reason := send(); reason != "SMS_OUTCOME_UNKNOWN replayed" {
			t.Errorf("after it: got %s; want SMS_OUTCOME_UNKNOWN replayed", reason)
		}
	})
}

func TestMetadata_InvalidIsNamed(t *testing.T) {
	r, inbox := startDev(t)
	for _, c := range []struct {
		method string
		md     []string
		field  string // "" if the metadata is valid
	}{
		{"SendSMS", []string{"idempotency-key", "1234567"}, "idempotency-key"},
		{"SendSMS", []string{"idempotency-key", "12345678"}, ""},
		{"SendSMS", []string{"idempotency-key", strings.Repeat("k", 128)}, ""},
		{"SendSMS", []string{"idempotency-key", strings.Repeat("k", 129)}, "idempotency-key"},
		{"SendSMS", []string{"idempotency-key", `"1234567"`}, "idempotency-key"},
		{"SendSMS", []string{"idempotency-key", `"123456\"\\"`}, ""},
		{"SendSMS", []string{"idempotency-key", `"12345678`}, "idempotency-key"},
		{"SendSMS", []string{"idempotency-key", "1234 5678"}, "idempotency-key"},
		{"SendSMS", []string{"idempotency-key", "clé-clé-clé"}, "idempotency-key"},
		{"SendSMS", []string{"idempotency-key", secretKey, "idempotency-key", secretKey}, "idempotency-key"},
		{"SendSMS", []string{"verification-context", ""}, "verification-context"},
		{"SendSMS", []string{"verification-context", strings.Repeat("c", 129)}, "verification-context"},
		{"SendSMS", []string{"verification-context", strings.Repeat("c", 128)}, ""},
		{"SendSMS", []string{"verification-context", "a", "verification-context", "b"}, "verification-context"},
		{"Valid", []string{"verification-context", ""}, "verification-context"},
		{"Valid", []string{"idempotency-key", "1"}, ""}, // it has no meaning for Valid
		{"Valid", []string{"want-details", "please"}, ""},
	} {
		before := len(inbox.Messages(""))
		body := fmt.Sprintf(`{"phone_number":%q}`, servertest.FreshNumber())
		q := r.NewRequest(t, http.MethodPost, "/phonenumberservice.PhoneNumberService/"+c.method, body, "Content-Type", "application/json")
		for i := 0; i < len(c.md); i += 2 {
			q.Header.Add(c.md[i], c.md[i+1])
		}
		status, text := servertest.Do(t, q)
		if c.field == "" && status != http.StatusOK {
			t.Errorf("%s %q: got %s; want OK", c.method, c.md, text)
		}
		if c.field != "" && (!strings.Contains(text, `"reason":"INVALID_FIELD"`) || !strings.Contains(text, `"field":"`+c.field+`"`)) {
			t.Errorf("%s %q: got %s; want INVALID_FIELD for %s", c.method, c.md, text, c.field)
		}
		if sent := len(inbox.Messages("")) - before; c.field != "" && sent != 0 {
			t.Errorf("%s %q: got %d messages; want none", c.method, c.md, sent)
		}
	}
}

func TestDetails_OnlyKnownCallersGetThem(t *testing.T) {
	var inbox dev.Inbox
	serve := func(change func(*server.Config)) *servertest.Replica {
		inbox.Rules = verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute}
		return servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), &inbox, change)
	}
	for name, c := range map[string]struct {
		r    *servertest.Replica
		want bool
	}{
		"unknown callers": {serve(func(*server.Config) {}), false},
		"a known caller": {serve(func(c *server.Config) {
			c.Authenticate = func([]string, *x509.Certificate) (*auth.Caller, error) { return &auth.Caller{Name: "shop"}, nil }
		}), true},
		"dev": {serve(func(c *server.Config) { c.DetailsForAll = true }), true},
	} {
		t.Run(name, func(t *testing.T) {
			onEachProtocol(t, func(t *testing.T, call caller) {
				number := servertest.FreshNumber()
				details := func(number, code string, want map[string]string) {
					t.Helper()
					for _, md := range [][]string{nil, {"want-details", "true"}} {
						reason, _, header := call(t, c.r, number, code, append(md, "verification-context", "login")...)
						for field, value := range want {
							if md == nil || !c.want {
								value = ""
							}
							if got := header.Get(field); reason != "OK" || got != value {
								t.Errorf("%s %s with %v: got %s, %s %q; want %q", number, code, md, reason, field, got, value)
							}
						}
					}
				}
				details(number, "", map[string]string{"Code-Expires-In": "600", "Resend-After": "60"})
				details("+85251234567", "", map[string]string{"Code-Expires-In": "600", "Resend-After": ""})
				code := inbox.Messages(verify.Number("+86" + number))[0].Code
				details(number, wrong(code, 0), map[string]string{"Verification-Outcome": "mismatch", "Attempts-Left": "1"})
				reason, _, header := call(t, c.r, number, code, "want-details", "true")
				if got := header.Get("Verification-Outcome"); reason != "OK" || c.want && got != "no_code" {
					t.Errorf("in another context: got %s, %q; want no_code", reason, got)
				}
			})
		})
	}
}

// TestDetails_ResendAfterCountsFromTheAcceptance has an Aliyun that answers after 1.5 seconds.
func TestDetails_ResendAfterCountsFromTheAcceptance(t *testing.T) {
	start := time.Now()
	var later atomic.Int64 // nanoseconds
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), senderFunc(func(verify.Message) (verify.Receipt, error) {
		later.Add(int64(1500 * time.Millisecond))
		return verify.Receipt{}, nil
	}), func(c *server.Config) {
		c.DetailsForAll = true
		c.Verifier.Now = func() time.Time { return start.Add(time.Duration(later.Load())) }
	})
	md := []string{"want-details", "true", "idempotency-key", secretKey}
	number := servertest.FreshNumber()
	for _, want := range []struct{ replayed, expires, resend string }{{"", "599", "60"}, {"true", "599", "59"}} {
		_, _, header := callers["JSON"](t, r, number, "", md...)
		replayed, expires, resend := header.Get("Idempotency-Replayed"), header.Get("Code-Expires-In"), header.Get("Resend-After")
		if replayed != want.replayed || expires != want.expires || resend != want.resend {
			t.Errorf("got replayed %q, code-expires-in %q, resend-after %q; want %v", replayed, expires, resend, want)
		}
	}
}

func TestCORS_PagesMayUseTheMetadata(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Origins = []string{"*"} })
	preflight, _ := r.Exchange(t, http.MethodOptions, sendPath, "", "Origin", "https://app.example.org",
		"Access-Control-Request-Method", "POST",
		"Access-Control-Request-Headers", "content-type,idempotency-key,verification-context,want-details")
	if preflight.Header.Get("Access-Control-Allow-Headers") == "" {
		t.Errorf("preflight: got %v; want the headers allowed", preflight.Header)
	}
	res, _ := r.Exchange(t, http.MethodPost, sendPath, `{"phone_number":"18600000000"}`, "Content-Type", "application/json",
		"Origin", "https://app.example.org")
	exposed := strings.ToLower(res.Header.Get("Access-Control-Expose-Headers"))
	for _, name := range []string{"idempotency-replayed", "code-expires-in", "resend-after", "attempts-left", "verification-outcome"} {
		if !strings.Contains(exposed, name) {
			t.Errorf("exposed headers: got %s; want %s too", exposed, name)
		}
	}
}

func TestMetrics_IdempotentSendsAreCounted(t *testing.T) {
	var metrics *telemetry.Metrics
	r, _ := startDev(t, func(c *server.Config) { metrics = c.Telemetry.Metrics })
	number := servertest.FreshNumber()
	for range 3 {
		callers["JSON"](t, r, number, "", "idempotency-key", secretKey)
	}
	w := httptest.NewRecorder()
	metrics.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{`{caller="",result="new"} 1`, `{caller="",result="replayed"} 2`} {
		if !strings.Contains(w.Body.String(), "phonenumber_idempotent_sends_total"+want) {
			t.Errorf("metrics: want %s", want)
		}
	}
	testutil.Eventually(t, "the log has three calls", func() bool { return r.Log.Count("msg=call") == 3 })
}
