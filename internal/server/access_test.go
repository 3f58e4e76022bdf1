package server_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/connmux"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// certificates returns certificates for the port, issued by ca. clientCA may be nil.
func certificates(t *testing.T, ca, clientCA *catest.CA) (*connmux.Certificates, connmux.CertificateFiles) {
	t.Helper()
	var f connmux.CertificateFiles
	f.Certificate.Name, f.Key.Name = "tls.crt", "tls.key"
	f.Certificate.Content, f.Key.Content = ca.Issue("127.0.0.1")
	if clientCA != nil {
		f.ClientCA = connmux.File{Name: "ca.crt", Content: clientCA.PEM}
	}
	c := &connmux.Certificates{}
	if err := c.Replace(f); err != nil {
		t.Fatal(err)
	}
	return c, f
}

// secureClient returns a client of r with a new connection.
func secureClient(t *testing.T, r *servertest.Replica, config *tls.Config) pb.PhoneNumberServiceClient {
	t.Helper()
	return pb.NewPhoneNumberServiceClient(secureConn(t, r, config))
}

func secureConn(t *testing.T, r *servertest.Replica, config *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(r.Addr, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func httpsClient(t *testing.T, config *tls.Config) *http.Client {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true} // offers both, as browsers and curl do
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 20 * time.Second}
}

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

func TestTLS_OnePortServesGRPCAndJSON(t *testing.T) {
	ca := catest.New(t)
	r, inbox := startDev(t, func(c *server.Config) { c.TLS, _ = certificates(t, ca, nil) })
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		config := ca.Client()
		config.MaxVersion = version
		if _, err := secureClient(t, r, config.Clone()).SendSMS(t.Context(), servertest.SendRequest("18600000000")); err != nil {
			t.Errorf("gRPC over TLS %x: got %v; want OK", version, err)
		}
		code, proto, body := postJSON(t, httpsClient(t, config), "https://"+r.Addr+sendPath, `{"phone_number":"18600000000"}`)
		if code != 200 || body != "{}" || proto != "HTTP/1.1" {
			t.Errorf("JSON over TLS %x: got %d %s over %s; want 200 {} over HTTP/1.1", version, code, body, proto)
		}
	}
	if m := inbox.Messages(""); len(m) != 4 {
		t.Errorf("messages: got %d; want 4", len(m))
	}
	old := ca.Client()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if c, err := tls.Dial("tcp", r.Addr, old); err == nil {
		c.Close()
		t.Error("TLS 1.1: got a connection; want an error")
	}
	if _, err := r.SendSMS(t.Context(), servertest.SendRequest("18600000000")); status.Code(err) != codes.Unavailable {
		t.Errorf("gRPC in plaintext: got %v; want Unavailable", err)
	}
	if code, body := r.Post(t, "SendSMS", `{}`); code != 400 || !strings.Contains(body, "https://") {
		t.Errorf("JSON in plaintext: got %d %q; want 400 and a hint to https", code, body)
	}
}

// A proxy that offers HTTP/1.1 and h2 gets HTTP/1.1, over which gRPC is impossible. A proxy
// that offers only h2 gets h2.
func TestTLS_ProxyMustOfferOnlyHTTP2ForGRPC(t *testing.T) {
	ca := catest.New(t)
	r, _ := startDev(t, func(c *server.Config) { c.TLS, _ = certificates(t, ca, nil) })
	upstream, err := url.Parse("https://" + r.Addr)
	if err != nil {
		t.Fatal(err)
	}
	startProxy := func(t *testing.T, transport *http.Transport) (*httptest.Server, *catest.CA) {
		transport.TLSClientConfig = ca.Client()
		proxy := httputil.NewSingleHostReverseProxy(upstream)
		proxy.Transport, proxy.FlushInterval = transport, -1
		front := httptest.NewUnstartedServer(proxy)
		front.EnableHTTP2 = true
		front.StartTLS()
		t.Cleanup(front.Close)
		t.Cleanup(transport.CloseIdleConnections)
		return front, ca
	}
	call := func(t *testing.T, front *httptest.Server) error {
		config := &tls.Config{RootCAs: front.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, ServerName: "example.com"}
		conn, err := grpc.NewClient(front.Listener.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = pb.NewPhoneNumberServiceClient(conn).SendSMS(t.Context(), servertest.SendRequest("18600000000"))
		return err
	}
	both, _ := startProxy(t, &http.Transport{ForceAttemptHTTP2: true})
	if err := call(t, both); err == nil {
		t.Error("gRPC through a proxy that offers both: got OK; want an error")
	}
	if code, _, body := postJSON(t, both.Client(), both.URL+sendPath, `{"phone_number":"18600000000"}`); code != 200 || body != "{}" {
		t.Errorf("JSON through a proxy that offers both: got %d %s; want 200 {}", code, body)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	onlyHTTP2, _ := startProxy(t, &http.Transport{Protocols: protocols})
	if err := call(t, onlyHTTP2); err != nil {
		t.Errorf("gRPC through a proxy that offers only h2: got %v; want OK", err)
	}
}

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

func TestClientCA_CallsNeedACertificateHealthDoesNot(t *testing.T) {
	ca, clients := catest.New(t), catest.New(t)
	r, inbox := startDev(t, func(c *server.Config) {
		c.TLS, _ = certificates(t, ca, clients)
		c.Authenticate = auth.AnyCertificate
	})
	withoutCertificate := secureConn(t, r, ca.Client())
	testutil.Eventually(t, "health is SERVING without a certificate", func() bool {
		res, err := healthpb.NewHealthClient(withoutCertificate).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return err == nil && res.Status == healthpb.HealthCheckResponse_SERVING
	})
	if _, err := pb.NewPhoneNumberServiceClient(withoutCertificate).SendSMS(t.Context(), servertest.SendRequest("18600000000")); reasonOf(t,
		err) != "Unauthenticated CALLER_UNKNOWN" {
		t.Errorf("a call without a certificate: got %v; want Unauthenticated CALLER_UNKNOWN", err)
	}
	if code, _, body := postJSON(t, httpsClient(t, ca.Client()), "https://"+r.Addr+sendPath, `{"phone_number":"18600000000"}`); code != 401 || !strings.Contains(body, "CALLER_UNKNOWN") {
		t.Errorf("JSON without a certificate: got %d %s; want 401 CALLER_UNKNOWN", code, body)
	}
	foreign := catest.New(t).Client("login.example.org")
	foreign.RootCAs = ca.Pool
	if _, err := secureClient(t, r, foreign).SendSMS(t.Context(), servertest.SendRequest("18600000000")); err == nil {
		t.Error("a call with a certificate of another CA: got OK; want an error")
	}
	if n := len(inbox.Messages("")); n != 0 {
		t.Fatalf("messages: got %d; want 0", n)
	}
	known := clients.Client("login.example.org")
	known.RootCAs = ca.Pool
	if _, err := secureClient(t, r, known.Clone()).SendSMS(t.Context(), servertest.SendRequest("18600000000")); err != nil {
		t.Errorf("a call with a certificate: got %v; want OK", err)
	}
	if code, _, body := postJSON(t, httpsClient(t, known), "https://"+r.Addr+sendPath, `{"phone_number":"18600000000"}`); code != 200 {
		t.Errorf("JSON with a certificate: got %d %s; want 200", code, body)
	}
	for _, want := range []string{"status=Unauthenticated", "caller=unknown", "caller=login.example.org"} {
		if !strings.Contains(r.Log.String(), want) {
			t.Errorf("the log lacks %s", want)
		}
	}
}

func TestCertificates_ReplaceCutsNoCallAndRejectsInvalid(t *testing.T) {
	before, after, clients := catest.New(t), catest.New(t), catest.New(t)
	var certs *connmux.Certificates
	var files connmux.CertificateFiles
	r, _ := startDev(t, func(c *server.Config) {
		certs, files = certificates(t, before, clients)
		c.TLS, c.Authenticate = certs, auth.AnyCertificate
	})
	client := func(root *catest.CA, of *catest.CA) pb.PhoneNumberServiceClient {
		config := of.Client("login.example.org")
		config.RootCAs = root.Pool
		return secureClient(t, r, config)
	}
	valid := func(c pb.PhoneNumberServiceClient) error {
		_, err := c.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"})
		return err
	}
	old := client(before, clients)
	if err := valid(old); err != nil {
		t.Fatal(err)
	}
	good := files
	for name, c := range map[string]struct {
		change func(*connmux.CertificateFiles)
		want   string
	}{
		"another key":        {func(f *connmux.CertificateFiles) { _, f.Key.Content = after.Issue("127.0.0.1") }, "tls.key: line 1: must be the key of the first certificate in tls.crt"},
		"no key":             {func(f *connmux.CertificateFiles) { f.Key.Content = "secret words" }, "tls.key: line 1: must be a private key in PEM"},
		"half a certificate": {func(f *connmux.CertificateFiles) { f.Certificate.Content = "# mine\n" + f.Certificate.Content[:200] }, "tls.crt: line 2: is no whole certificate in PEM"},
		"no certificate":     {func(f *connmux.CertificateFiles) { f.Certificate.Content = "" }, "tls.crt: line 1: must hold a certificate"},
		"an invalid one in a list": {func(f *connmux.CertificateFiles) {
			f.ClientCA.Content += "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
		}, fmt.Sprintf("ca.crt: line %d: is no X.509 certificate", 1+strings.Count(clients.PEM, "\n"))},
		"an empty client CA": {func(f *connmux.CertificateFiles) { f.ClientCA.Content = "\n" }, "ca.crt: line 1: must hold a certificate"},
	} {
		files := good
		c.change(&files)
		if err := certs.Replace(files); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret words") {
			t.Errorf("%s: got %v; want %q", name, err, c.want)
		}
		if err := valid(client(before, clients)); err != nil {
			t.Errorf("a new connection after %s: got %v; want OK", name, err)
		}
	}
	files.Certificate.Content, files.Key.Content = after.Issue("127.0.0.1")
	files.ClientCA.Content = after.PEM
	if err := certs.Replace(files); err != nil {
		t.Fatal(err)
	}
	if err := valid(old); err != nil {
		t.Errorf("a call on an old connection: got %v; want OK", err)
	}
	if err := valid(client(after, after)); err != nil {
		t.Errorf("a call with the new certificates: got %v; want OK", err)
	}
	if err := valid(client(after, clients)); err == nil {
		t.Error("a client certificate of the removed CA: got OK; want an error")
	}
}

func asCaller(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

func hashOf(token string) string {
	h := sha256.Sum256([]byte(token))
	return hex.EncodeToString(h[:])
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
		`phonenumber_sends_total{aliyun_code="OK",caller="login",country="CN",result="accepted"} 2`,
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

func TestReflection_OffIsUnimplemented(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Reflection = false })
	stream, err := reflectionpb.NewServerReflectionClient(r.Conn).ServerReflectionInfo(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("reflection: got %v; want Unimplemented", err)
	}
}

func TestCORS_PagesOfAllowedOriginsMayCall(t *testing.T) {
	const allowed, other = "https://app.example.org", "https://evil.example"
	for name, origins := range map[string][]string{"none": nil, "one": {allowed}, "any": {"*"}} {
		t.Run(name, func(t *testing.T) {
			r, inbox := startDev(t, func(c *server.Config) { c.Origins = origins })
			ask := func(method, path, origin string, headers ...string) *http.Response {
				q, err := http.NewRequest(method, "http://"+r.Addr+path, strings.NewReader(`{"phone_number":"18600000000"}`))
				if err != nil {
					t.Fatal(err)
				}
				q.Header.Set("Origin", origin)
				for i := 0; i < len(headers); i += 2 {
					q.Header.Set(headers[i], headers[i+1])
				}
				res, err := http.DefaultClient.Do(q)
				if err != nil {
					t.Fatal(err)
				}
				res.Body.Close()
				return res
			}
			for origin, want := range map[string]bool{allowed: name != "none", other: name == "any"} {
				preflight := ask(http.MethodOptions, sendPath, origin, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers",
					"authorization,connect-protocol-version,content-type")
				allowedOrigin := preflight.Header.Get("Access-Control-Allow-Origin")
				if (allowedOrigin != "") != want || want && preflight.StatusCode/100 != 2 {
					t.Errorf("preflight from %s: got %d %v; want it allowed: %v", origin, preflight.StatusCode, preflight.Header, want)
				}
				if preflight := ask(http.MethodOptions, sendPath, origin, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers",
					"x-evil"); preflight.Header.Get("Access-Control-Allow-Headers") != "" {
					t.Errorf("preflight for the header x-evil: got %v; want no allowed headers", preflight.Header)
				}
				if res := ask(http.MethodGet, "/inbox.json", origin); res.StatusCode != http.StatusForbidden || res.Header.Get("Access-Control-Allow-Origin") != "" {
					t.Errorf("GET /inbox.json from %s: got %d %v; want 403", origin, res.StatusCode, res.Header)
				}
			}
			if name == "none" {
				return
			}
			sent := len(inbox.Messages(""))
			res := ask(http.MethodPost, sendPath, allowed, "Content-Type", "application/json", "Sec-Fetch-Site", "cross-site")
			if got := res.Header.Get("Access-Control-Allow-Origin"); res.StatusCode != 200 || got == "" || len(inbox.Messages("")) != sent+1 {
				t.Errorf("a call from an allowed origin: got %d, allowed origin %q; want 200 and the origin", res.StatusCode, got)
			}
		})
	}
}

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
	for range limit {
		go func() {
			_, err := r.SendSMS(context.Background(), servertest.SendRequest(servertest.FreshNumber()))
			done <- err
		}()
	}
	for range limit {
		<-atAliyun
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

func TestConnections_OverTheLimitAreClosed(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Limits.Connections = 2 })
	var open []net.Conn
	closed := func(c net.Conn) bool {
		c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err := c.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	for range 2 {
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	testutil.Eventually(t, "a third connection is closed", func() bool {
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return closed(c)
	})
	for _, c := range open {
		c.Close()
	}
	if _, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("a call after the connections closed: got %v; want OK", err)
	}
}

// HTTP connections have the same maximum age as gRPC connections. Otherwise a client with a
// certificate of a removed CA could keep its connection permanently.
func TestConnectionAge_HTTPClosesAfterTheResponse(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Limits.ConnectionAge = 300 * time.Millisecond })
	client := httpsClient(t, nil)
	ask := func() bool {
		q, err := http.NewRequest(http.MethodPost, "http://"+r.Addr+sendPath, strings.NewReader(`{"phone_number":"18600000000"}`))
		if err != nil {
			t.Fatal(err)
		}
		res, err := client.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		io.Copy(io.Discard, res.Body)
		if res.StatusCode != 200 {
			t.Fatalf("got %d; want 200", res.StatusCode)
		}
		return res.Close
	}
	if ask() {
		t.Error("a new connection: got closed; want open")
	}
	testutil.Eventually(t, "the old connection is closed", ask)
	if ask() {
		t.Error("the connection after it: got closed; want open")
	}
}

// Connections are replaced at their maximum age, and no call fails.
func TestConnectionAge_GRPCFailsNoCall(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) {
		c.Limits.ConnectionAge, c.Limits.ConnectionAgeGrace = 200*time.Millisecond, 5*time.Second
	})
	calls := 0
	for deadline := time.Now().Add(1500 * time.Millisecond); time.Now().Before(deadline); {
		if _, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); err != nil {
			t.Fatalf("call %d: got %v; want OK", calls+1, err)
		}
		calls++
	}
}

// Canceled health watches do not count as early resets (rapid reset).
func TestConnections_SurviveManyStreams(t *testing.T) {
	r, _ := startDev(t)
	health := healthpb.NewHealthClient(r.Conn)
	for i := range 1200 {
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := health.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		cancel()
		if err != nil {
			t.Fatalf("stream %d: got %v; want a response", i, err)
		}
	}
	if strings.Contains(r.Log.String(), "reason=frames") {
		t.Error("the log: got a connection closed for its streams; want none")
	}
}
