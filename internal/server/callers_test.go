package server_test

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A caller that is removed after the headers of its call, and before its message, is rejected.
func TestAuthorization_ChecksTheCallerWhenTheMessageArrives(t *testing.T) {
	var removed atomic.Bool
	r, _ := startDev(t, func(c *server.Config) {
		c.Authenticate = func([]string, *x509.Certificate) (*auth.Caller, error) {
			if removed.Load() {
				return nil, auth.ErrUnknown
			}
			return &auth.Caller{Name: "shop"}, nil
		}
	})
	r.MustSend(t, servertest.FreshNumber())
	stream, err := r.Conn.NewStream(t.Context(), &grpc.StreamDesc{}, pb.PhoneNumberService_SendSMS_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // until the headers have arrived
	removed.Store(true)
	if err := stream.SendMsg(servertest.SendRequest(servertest.FreshNumber())); err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(&pb.Empty{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a call whose caller was removed before the message: got %v; want UNAUTHENTICATED", err)
	}
}

func asCaller(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

func hashOf(token string) string {
	h := sha256.Sum256([]byte(token))
	return hex.EncodeToString(h[:])
}

// TestRate_ARepeatedSendTakesNothingFromIt repeats a send with its idempotency key.
func TestRate_ARepeatedSendTakesNothingFromIt(t *testing.T) {
	list, err := auth.Parse("callers.yaml", []byte(`
callers:
  - name: login
    token_sha256: `+hashOf("token-of-login")+`
    sends_per_minute: 1
    burst: 2
`), auth.ParseOptions{})
	if err != nil {
		t.Fatal(err)
	}
	set := &auth.Registry{}
	set.Replace(list)
	r, inbox := startDev(t, func(c *server.Config) { c.Authenticate = set.Authenticate })
	numbers := []string{servertest.FreshNumber(), servertest.FreshNumber(), servertest.FreshNumber()}
	for i, want := range []struct {
		number string
		code   codes.Code
	}{
		{numbers[0], codes.OK}, {numbers[0], codes.OK}, {numbers[1], codes.OK}, {numbers[2], codes.ResourceExhausted}, {numbers[0], codes.OK},
	} {
		ctx := metadata.AppendToOutgoingContext(asCaller(t.Context(), "token-of-login"), "idempotency-key", secretKey)
		if _, err := r.SendSMS(ctx, servertest.SendRequest(want.number)); status.Code(err) != want.code {
			t.Errorf("send %d: got %v; want %v", i+1, err, want.code)
		}
	}
	if n := len(inbox.Messages("")); n != 2 {
		t.Errorf("messages: got %d; want 2", n)
	}
}

func TestAuthorization_FollowsTheCallersFile(t *testing.T) {
	list, err := auth.Parse("callers.yaml", []byte(`
callers:
  - name: login
    token_sha256: `+hashOf("token-of-login")+`
    sign_names: [阿里云]
    template_codes: [SMS_123456789]
    countries: [CN]
    sends_per_minute: 1
    burst: 2
  - name: checks
    token_sha256: `+hashOf("token-of-checks")+`
    calls: [Valid]
`), auth.ParseOptions{Calls: []string{"SendSMS", "Valid"}, Countries: map[string]bool{"CN": true}})
	if err != nil {
		t.Fatal(err)
	}
	set := &auth.Registry{}
	set.Replace(list)
	var scrape func(string) (int, string)
	r, inbox := startDev(t, func(c *server.Config) {
		c.Authenticate = set.Authenticate
		scrape = scraped(t, c)
	})
	login, checks := asCaller(t.Context(), "token-of-login"), asCaller(t.Context(), "token-of-checks")
	send := func(ctx context.Context, q *pb.SendSMSRequest) error {
		_, err := r.SendSMS(ctx, q)
		return err
	}
	validAs := func(ctx context.Context) error {
		_, err := r.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"})
		return err
	}
	abroad := servertest.SendRequest("+85251234567")
	other := servertest.SendRequest("18600000000")
	other.Signature = "Acme"
	template := servertest.SendRequest("18600000000")
	template.TemplateCode = "SMS_1"
	for _, c := range []struct {
		name   string
		err    error
		code   codes.Code
		denied string // the permission that the caller lacks
	}{
		{"no token", send(t.Context(), servertest.SendRequest("18600000000")), codes.Unauthenticated, ""},
		{"a wrong token", send(asCaller(t.Context(), "token-of-Login"), servertest.SendRequest("18600000000")), codes.Unauthenticated, ""},
		{"a check without a token", validAs(t.Context()), codes.Unauthenticated, ""},
		{"a call that is not allowed", send(checks, servertest.SendRequest("18600000000")), codes.PermissionDenied, "call"},
		{"a sign name that is not allowed", send(login, other), codes.PermissionDenied, "signature"},
		{"a template that is not allowed", send(login, template), codes.PermissionDenied, "template_code"},
		{"a country that is not allowed", send(login, abroad), codes.PermissionDenied, "country"},
		{"a check", validAs(checks), codes.OK, ""},
		{"a send", send(login, servertest.SendRequest("18600000000")), codes.OK, ""},
		{"another send", send(login, servertest.SendRequest("18600000000")), codes.OK, ""},
		{"a send over the rate", send(login, servertest.SendRequest("18600000000")), codes.ResourceExhausted, ""},
		{"a check after the last send", validAs(login), codes.OK, ""},
	} {
		if status.Code(c.err) != c.code {
			t.Errorf("%s: got %v; want %v", c.name, c.err, c.code)
			continue
		}
		switch c.code {
		case codes.Unauthenticated:
			if reasonOf(t, c.err) != "Unauthenticated CALLER_UNKNOWN" {
				t.Errorf("%s: got %v; want CALLER_UNKNOWN", c.name, c.err)
			}
		case codes.PermissionDenied:
			info, _, _ := servertest.Details(t, status.Convert(c.err))
			if info.Reason != "CALLER_NOT_ALLOWED" || info.Metadata["refused"] != c.denied || !strings.Contains(c.err.Error(), c.denied) {
				t.Errorf("%s: got %v, %v; want CALLER_NOT_ALLOWED that names %s", c.name, c.err, info, c.denied)
			}
		case codes.ResourceExhausted:
			info, retry, _ := servertest.Details(t, status.Convert(c.err))
			if info.Reason != "CALLER_RATE_LIMITED" || retry.RetryDelay.AsDuration() < 50*time.Second {
				t.Errorf("%s: got %v, %v; want CALLER_RATE_LIMITED and a retry after at least 50 s", c.name, info, retry)
			}
		}
	}
	for _, c := range []struct {
		headers []string
		want    int
	}{{nil, 401}, {[]string{"Authorization", "Bearer x"}, 401}, {
		[]string{"Authorization", "Bearer token-of-checks"},
		403,
	}, {[]string{"Authorization", "Bearer token-of-login"}, 429}} {
		if code, body := r.Post(t, "SendSMS", `{"phone_number":"18600000000","signature":"阿里云","template_code":"SMS_123456789"}`, c.headers...); code != c.want {
			t.Errorf("JSON with %v: got %d %s; want %d", c.headers, code, body, c.want)
		}
	}
	if n := len(inbox.Messages("")); n != 2 {
		t.Errorf("messages: got %d; want 2", n)
	}
	testutil.Eventually(t, "health is SERVING without a token", func() bool {
		res, err := healthpb.NewHealthClient(r.Conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return err == nil && res.Status == healthpb.HealthCheckResponse_SERVING
	})
	if code, body := r.Ask(t, "GET", "/", ""); code != 200 {
		t.Errorf("GET /: got %d %s; want 200", code, body)
	}
	_, metrics := scrape("/metrics")
	for _, want := range []string{
		`phonenumber_call_duration_seconds_count{caller="login",method="SendSMS",status="OK"} 2`,
		`phonenumber_call_duration_seconds_count{caller="unknown",method="SendSMS",status="Unauthenticated"} 4`,
		`phonenumber_call_duration_seconds_count{caller="checks",method="SendSMS",status="PermissionDenied"} 2`,
		`phonenumber_sends_total{aliyun_code="OK",caller="login",country="CN",product="sms",result="accepted"} 2`,
		`phonenumber_verifications_total{caller="checks",country="CN",outcome="no_code"} 1`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	log := r.Log.String()
	if strings.Contains(log, "token-of") || strings.Contains(log, hashOf("token-of-login")) {
		t.Error("the log contains a token or its hash")
	}
	for line := range strings.Lines(log) {
		if (strings.Contains(line, "msg=call") || strings.Contains(line, "msg=step")) && !strings.Contains(line, " caller=") {
			t.Errorf("got a line without its caller: %s", line)
		}
	}
}
