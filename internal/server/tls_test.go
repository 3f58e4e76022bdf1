package server_test

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/connmux"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
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
		if !r.Log.Contains(want) {
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
