package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// put writes a file into dir and returns the file's path.
func put(t *testing.T, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newToken runs the command token and returns the two values that it prints.
func newToken(t *testing.T) (token, hash string) {
	t.Helper()
	out, err := command(nil, "token").CombinedOutput()
	if err != nil {
		t.Fatalf("token: %v\n%s", err, out)
	}
	if n, err := fmt.Sscanf(string(out), "token:        %s\ntoken_sha256: %s\n", &token, &hash); n != 2 {
		t.Fatalf("token printed %q: %v", out, err)
	}
	return token, hash
}

func TestReload_CertificatesAndCallersFailNoCall(t *testing.T) {
	t.Parallel()
	ca, fake, dir := catest.New(t), dysmsapitest.New(t), t.TempDir()
	first, firstHash := newToken(t)
	second, secondHash := newToken(t)
	callersFile := func(hash string) string {
		return put(t, dir, "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+hash+"\n")
	}
	certificate, key := ca.Issue("127.0.0.1")
	metrics := servicetest.FreeAddress(t)
	env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")),
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_CALLERS="+callersFile(firstHash),
		"PHONENUMBER_TLS_CERT="+put(t, dir, "tls.crt", certificate), "PHONENUMBER_TLS_KEY="+put(t, dir, "tls.key", key))
	p := run(t, env)
	testutil.Eventually(t, "healthcheck succeeds over TLS", func() bool {
		return command([]string{"PHONENUMBER_TLS_CERT=" + filepath.Join(dir, "tls.crt")}, "healthcheck", "--address", p.Addr).Run() == nil
	})
	if out := p.Output.String(); !strings.Contains(out, `level=INFO msg=listening`) || !strings.Contains(out, "tls=on") || !strings.Contains(out, "callers=file") {
		t.Errorf("the start-up line lacks TLS or the callers file:\n%s", out)
	}
	connect := func(ca *catest.CA) *grpc.ClientConn {
		conn, err := grpc.NewClient(p.Addr, grpc.WithTransportCredentials(credentials.NewTLS(ca.Client())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	call := func(conn *grpc.ClientConn, token string) error {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token), 20*time.Second)
		defer cancel()
		_, err := pb.NewPhoneNumberServiceClient(conn).Valid(ctx, &pb.ValidRequest{PhoneNumber: "18612345678", Code: "000000"})
		return err
	}
	old := connect(ca)
	if err := call(old, first); err != nil {
		t.Fatal(err)
	}

	// Calls continue during the whole test, with a token that every valid callers file has.
	both := "[" + firstHash + ", " + secondHash + "]"
	var calls atomic.Int64
	var callErr error
	stop := make(chan struct{})
	var calling sync.WaitGroup
	calling.Go(func() {
		for callErr == nil {
			select {
			case <-stop:
				return
			default:
				callErr = call(old, first)
				calls.Add(1)
			}
		}
	})
	gauge := func(name string) string {
		return regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindString(get(t, metrics, "/metrics", 200))
	}
	expiry := gauge(`phonenumber_certificate_expiry_timestamp_seconds{certificate="server"}`)
	if expiry == "" {
		t.Error("the metrics lack the expiry of the certificate")
	}

	reloaded := p.logged("reloaded callers")
	callersFile(both)
	testutil.Eventually(t, "the new callers are in use", reloaded)
	if err := call(old, second); err != nil {
		t.Errorf("a call with the second token: got %v; want OK", err)
	}
	rejected := p.logged("failed to reload callers; keeping the previous version")
	put(t, dir, "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+second+"\n")
	testutil.Eventually(t, "a plaintext token is rejected", rejected)
	if out := p.Output.String(); !strings.Contains(out, "callers.yaml: line 3: token_sha256 must be the SHA-256") ||
		strings.Contains(out, second) {
		t.Errorf("the log: want the file and the line, and no token:\n%s", out)
	}
	if got := gauge(`phonenumber_config_last_reload_successful{files="callers"}`); !strings.HasSuffix(got, " 0") {
		t.Errorf("gauge of rejected files: got %q; want 1", got)
	}
	callersFile(both)
	testutil.Eventually(t, "the gauge is 1 again", func() bool {
		return strings.HasSuffix(gauge(`phonenumber_config_last_reload_successful{files="callers"}`), " 1")
	})

	rejected = p.logged("failed to reload certificates; keeping the previous version")
	_, otherKey := ca.Issue("127.0.0.1")
	put(t, dir, "tls.key", otherKey)
	testutil.Eventually(t, "a key of another certificate is rejected", rejected)
	if err := call(connect(ca), first); err != nil {
		t.Errorf("a new connection while the key file is invalid: got %v; want OK", err)
	}
	if got := gauge(`phonenumber_config_last_reload_successful{files="certificates"}`); !strings.HasSuffix(got, " 0") {
		t.Errorf("gauge of rejected files: got %q; want 1", got)
	}
	next := catest.New(t)
	certificate, key = next.Issue("127.0.0.1")
	reloaded = p.logged("reloaded certificates")
	put(t, dir, "tls.crt", certificate)
	put(t, dir, "tls.key", key)
	testutil.Eventually(t, "the new certificates are in use", reloaded)
	if err := call(connect(next), first); err != nil {
		t.Errorf("a call with the new certificate: got %v; want OK", err)
	}
	callersFile(secondHash)
	close(stop)
	calling.Wait()
	if callErr != nil || calls.Load() == 0 {
		t.Errorf("calls during the reloads: got %d calls, the last %v; want more than 0 and OK", calls.Load(), callErr)
	}
	testutil.Eventually(t, "a removed token is rejected", func() bool { return status.Code(call(old, first)) == codes.Unauthenticated })
	if out := p.Output.String(); strings.Contains(out, first) || strings.Contains(out, second) {
		t.Error("the log contains a token")
	}
}

func TestServe_OpenPortIsTwoWarnings(t *testing.T) {
	fake := dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
	out := p.Output.String()
	for _, want := range []string{
		"tls=off callers=unauthenticated\n", `level=WARN msg="TLS is off: `,
		`level=WARN msg="callers are not authenticated: `,
	} {
		if got := strings.Count(out, want); got != 1 {
			t.Errorf("the log of serve: got %q %d times; want once:\n%s", want, got, out)
		}
	}
	if out := run(t, nil, "dev").serving(t).Output.String(); strings.Contains(out, "TLS is off") ||
		strings.Contains(out, "not authenticated") {
		t.Errorf("dev: got a warning about its open port; want none:\n%s", out)
	}
}

func TestSettings_BadFilesAndLimitsStopTheStart(t *testing.T) {
	ca, dir := catest.New(t), t.TempDir()
	certificate, key := ca.Issue("login.example.org")
	_, another := ca.Issue("login.example.org")
	crt, pkey := put(t, dir, "tls.crt", certificate), put(t, dir, "tls.key", key)
	tlsWith := func(name, content string) []string {
		env := map[string]string{"PHONENUMBER_TLS_CERT": crt, "PHONENUMBER_TLS_KEY": pkey}
		env[name] = put(t, t.TempDir(), "file", content)
		list := []string{}
		for name, path := range env {
			list = append(list, name+"="+path)
		}
		return list
	}
	callersFile := func(content string) []string {
		return []string{"PHONENUMBER_CALLERS=" + put(t, t.TempDir(), "callers.yaml", content)}
	}
	for name, c := range map[string]struct {
		env   []string
		wants []string
	}{
		"only a certificate":     {[]string{"PHONENUMBER_TLS_CERT=" + crt}, []string{"--tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY) must be set both"}},
		"only a client CA":       {[]string{"PHONENUMBER_TLS_CLIENT_CA=" + crt}, []string{"--tls-client-ca (PHONENUMBER_TLS_CLIENT_CA) needs --tls-cert"}},
		"no such file":           {[]string{"PHONENUMBER_TLS_CERT=" + crt, "PHONENUMBER_TLS_KEY=/nowhere/tls.key"}, []string{"--tls-key (PHONENUMBER_TLS_KEY): /nowhere/tls.key: no such file"}},
		"a key as the file name": {[]string{"PHONENUMBER_TLS_CERT=" + crt, "PHONENUMBER_TLS_KEY=" + key}, []string{"--tls-key (PHONENUMBER_TLS_KEY): what it holds is no file's name"}},
		"another certificate's key": {
			tlsWith("PHONENUMBER_TLS_KEY", another),
			[]string{"/file: line 1: must be the key of the first certificate in " + crt},
		},
		"an invalid key":     {tlsWith("PHONENUMBER_TLS_KEY", "hunter2"), []string{"/file: line 1: must be a private key in PEM"}},
		"an empty client CA": {tlsWith("PHONENUMBER_TLS_CLIENT_CA", ""), []string{"/file: line 1: must hold a certificate in PEM"}},
		"a plaintext token": {callersFile("callers:\n  - name: a\n    token_sha256: hunter2\n    quota: 3"), []string{
			"/callers.yaml: line 3: token_sha256 must be the SHA-256", "/callers.yaml: line 4: is no field here",
		}},
		"no client CA is set": {callersFile("callers:\n  - name: a\n    dns_san: a.example.org"), []string{"/callers.yaml: line 3: certificates are asked for with PHONENUMBER_TLS_CLIENT_CA"}},
		"a directory": {
			[]string{"PHONENUMBER_CALLERS=" + dir},
			[]string{"--callers (PHONENUMBER_CALLERS): " + dir + ": is a directory"},
		},
		"origins and reflection": {[]string{"PHONENUMBER_CORS_ORIGINS=*", "PHONENUMBER_REFLECTION=maybe"}, []string{`PHONENUMBER_CORS_ORIGINS): origin 1 cannot match a web page`, `PHONENUMBER_REFLECTION) is "maybe"; it must be on or off`}},
		"an origin with a path":  {[]string{"PHONENUMBER_CORS_ORIGINS=https://a.example.org,https://b.example.org/x"}, []string{"PHONENUMBER_CORS_ORIGINS): origin 2 cannot"}},
		"an origin with a user":  {[]string{"PHONENUMBER_CORS_ORIGINS=https://login:hunter2@a.example.org"}, []string{"PHONENUMBER_CORS_ORIGINS): origin 1 cannot"}},
		"no origin at all":       {[]string{"PHONENUMBER_CORS_ORIGINS=, "}, []string{"PHONENUMBER_CORS_ORIGINS) holds no origin"}},
		"limits": {
			[]string{
				"PHONENUMBER_MAX_CONNECTIONS=0", "PHONENUMBER_MAX_STREAMS=x", "PHONENUMBER_MAX_CALLS=-1", "PHONENUMBER_MAX_MESSAGE_BYTES=9999999",
				"PHONENUMBER_MAX_HEADER_BYTES=1",
				"PHONENUMBER_CONNECTION_TIMEOUT=1h", "PHONENUMBER_READ_TIMEOUT=0s", "PHONENUMBER_IDLE_TIMEOUT=1ms", "PHONENUMBER_CONNECTION_AGE=x",
				"PHONENUMBER_CONNECTION_AGE_GRACE=x", "PHONENUMBER_PING_INTERVAL=1ms", "PHONENUMBER_CALL_TIMEOUT=1h",
			},
			[]string{
				`PHONENUMBER_MAX_CONNECTIONS) is "0"; it must be a whole number from 1`, "PHONENUMBER_MAX_STREAMS", "PHONENUMBER_MAX_CALLS", "PHONENUMBER_MAX_MESSAGE_BYTES", "PHONENUMBER_MAX_HEADER_BYTES",
				`PHONENUMBER_CONNECTION_TIMEOUT) is "1h"; it must be a duration from 100ms to 1m`, "PHONENUMBER_READ_TIMEOUT", "PHONENUMBER_IDLE_TIMEOUT", "PHONENUMBER_CONNECTION_AGE)", "PHONENUMBER_CONNECTION_AGE_GRACE", "PHONENUMBER_PING_INTERVAL", "PHONENUMBER_CALL_TIMEOUT",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, subcommand := range []string{"serve", "dev"} {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				cmd := command(c.env, subcommand)
				kill := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
				out, err := cmd.CombinedOutput()
				kill.Stop()
				if err == nil || ctx.Err() != nil {
					t.Fatalf("%s started; want an error", subcommand)
				}
				for _, want := range c.wants {
					if !strings.Contains(string(out), want) {
						t.Errorf("%s: the message lacks %q:\n%s", subcommand, want, out)
					}
				}
				if strings.Contains(string(out), "hunter2") || strings.Contains(string(out), strings.Split(key, "\n")[1]) {
					t.Errorf("%s: the message contains a secret:\n%s", subcommand, out)
				}
			}
		})
	}
}

func TestCORSOrigins_MatchHoweverTheyAreWritten(t *testing.T) {
	fake := dysmsapitest.New(t)
	env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), "PHONENUMBER_CORS_ORIGINS=HTTPS://App.Example.org:443, http://bücher.example:80")
	p := run(t, env).serving(t)
	for _, origin := range []string{"https://app.example.org", "http://xn--bcher-kva.example"} {
		q, err := http.NewRequest(http.MethodOptions, "http://"+p.Addr+pb.PhoneNumberService_SendSMS_FullMethodName, nil)
		if err != nil {
			t.Fatal(err)
		}
		q.Header.Set("Origin", origin)
		q.Header.Set("Access-Control-Request-Method", "POST")
		res, err := http.DefaultClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got := res.Header.Get("Access-Control-Allow-Origin"); got != origin {
			t.Errorf("preflight from %s: got the allowed origin %q; want the same origin", origin, got)
		}
	}
}
