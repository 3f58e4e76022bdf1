package ramrole

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole/ststest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// oidc returns a source at the fake's STS, and its token file.
func oidc(t *testing.T, fake *ststest.Server) (OIDC, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	putToken(t, file, ststest.FirstToken)
	endpoint, err := sms.ParseEndpoint(fake.STSURL)
	if err != nil {
		t.Fatal(err)
	}
	transport, err := sms.NewTransport(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(transport.CloseIdleConnections)
	return OIDC{
		RoleARN: ststest.RoleARN, ProviderARN: ststest.ProviderARN, TokenFile: file, SessionName: "phone-number-service",
		Endpoint: endpoint, Transport: transport,
	}, file
}

func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func putToken(t *testing.T, file, token string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// sources returns a source of each kind.
func sources(t *testing.T, fake *ststest.Server) []Source {
	o, _ := oidc(t, fake)
	return []Source{o, ECS{Role: ststest.ECSRole, Endpoint: fake.MetadataURL}}
}

func TestFetch_ReturnsUsableCredentials(t *testing.T) {
	fake := ststest.New(t)
	for _, source := range sources(t, fake) {
		set, err := source.Fetch(t.Context())
		if err != nil {
			t.Errorf("%s: %v", source.Provider(), err)
			continue
		}
		issued, ok := fake.Issued(set.AccessKeyID)
		want := sms.Credentials{
			AccessKeyID: set.AccessKeyID, AccessKeySecret: issued.AccessKeySecret, SecurityToken: issued.SecurityToken,
			Provider: source.Provider(),
		}
		if !ok || set.Credentials != want {
			t.Errorf("%s: got %+v; want %+v", source.Provider(), set.Credentials, want)
		}
		if d := set.Expires.Sub(issued.Expires).Abs(); d > 2*time.Second {
			t.Errorf("%s: got the end %v; want %v", source.Provider(), set.Expires, issued.Expires)
		}
	}
}

// The lifetime is the difference of two times of Aliyun's clock.
func TestFetch_LifetimeIgnoresAWrongClock(t *testing.T) {
	for _, skew := range []time.Duration{-14 * time.Minute, 14 * time.Minute} { // Aliyun accepts 15 minutes
		fake := ststest.New(t)
		fake.SetSkew(skew)
		for _, source := range sources(t, fake) {
			set, err := source.Fetch(t.Context())
			if err != nil || (set.Lifetime-time.Hour).Abs() > 2*time.Second {
				t.Errorf("%s, clock off by %v: got a lifetime of %v, %v; want an hour", source.Provider(), skew, set.Lifetime, err)
			}
		}
	}
}

func TestFetch_OIDCReadsTheTokenFileEachTime(t *testing.T) {
	fake := ststest.New(t)
	source, file := oidc(t, fake)
	if _, err := source.Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	fake.SetToken("another.token.of.the-account")
	if _, err := source.Fetch(t.Context()); err == nil {
		t.Error("with the old token: got nil; want an error")
	}
	putToken(t, file, "another.token.of.the-account")
	if _, err := source.Fetch(t.Context()); err != nil {
		t.Errorf("with the new token: got %v; want nil", err)
	}
}

// Every error has fixed words, and names the setting that can be wrong.
func TestFetch_ErrorsNameTheCauseAndNoSecret(t *testing.T) {
	const set = `{"Credentials":{"AccessKeyId":"STS.NLeak01","AccessKeySecret":"LeakedSecret","SecurityToken":"LeakedToken","Expiration":"EXPIRES"}}`
	const flat = `{"Code":"Success","AccessKeyId":"STS.NLeak01","AccessKeySecret":"LeakedSecret","SecurityToken":"LeakedToken","Expiration":"EXPIRES"}`
	at := func(d time.Duration) *strings.Replacer {
		return strings.NewReplacer("EXPIRES", time.Now().Add(d).UTC().Format(time.RFC3339))
	}
	type source func(t *testing.T, fake *ststest.Server) Source
	edited := func(edit func(*OIDC, string)) source {
		return func(t *testing.T, fake *ststest.Server) Source {
			o, file := oidc(t, fake)
			edit(&o, file)
			return o
		}
	}
	good := edited(func(*OIDC, string) {})
	ecs := func(_ *testing.T, fake *ststest.Server) Source { return ECS{ststest.ECSRole, fake.MetadataURL} }
	// broken is a metadata service that gives a session token and then this reply.
	broken := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				ststest.Body(200, "SessionToken==")(w, r)
				return
			}
			ststest.Body(status, body)(w, r)
		}
	}
	// switched replies 101 and waits until the client hangs up.
	switched := func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		io.Copy(io.Discard, conn)
	}
	elsewhere := ststest.New(t)
	for _, c := range []struct {
		name   string
		source source
		setUp  func(*ststest.Server)
		want   string
	}{
		{"no token file", edited(func(_ *OIDC, file string) { os.Remove(file) }), nil, "the file that ALIBABA_CLOUD_OIDC_TOKEN_FILE names cannot be read, or is empty"},
		{"an empty token file", edited(func(_ *OIDC, file string) { os.WriteFile(file, []byte("\n"), 0o600) }), nil, "the file that ALIBABA_CLOUD_OIDC_TOKEN_FILE names cannot be read, or is empty"},
		{"a token that STS does not accept", good, func(f *ststest.Server) { f.SetToken("other") }, "STS: HTTP 400, AuthenticationFail.OIDCToken.Invalid, 964E0EC5-575B-4FF5-8FD0-D4BD8025602A: Aliyun does not accept the token in ALIBABA_CLOUD_OIDC_TOKEN_FILE"},
		{"a role that does not exist", edited(func(o *OIDC, _ string) { o.RoleARN += "x" }), nil, "STS: HTTP 404, EntityNotExist.Role, 964E0EC5-575B-4FF5-8FD0-D4BD8025602A: ALIBABA_CLOUD_ROLE_ARN or"},
		{
			"a provider that does not exist", edited(func(o *OIDC, _ string) { o.ProviderARN += "x" }), nil,
			"STS: HTTP 404, EntityNotExist.OIDCProvider, ",
		},
		{"a role that was revoked", good, func(f *ststest.Server) { f.Revoke(true) }, "STS: HTTP 403, AuthenticationFail.NoPermission, 964E0EC5-575B-4FF5-8FD0-D4BD8025602A: the trust policy of ALIBABA_CLOUD_ROLE_ARN must let"},
		{"a clock that is wrong", good, func(f *ststest.Server) { f.SetSkew(time.Hour) }, "STS: HTTP 400, InvalidTimeStamp.Expired, 964E0EC5-575B-4FF5-8FD0-D4BD8025602A: this machine's clock is wrong; it needs NTP"},
		{"a refused connection", edited(func(o *OIDC, _ string) { o.Endpoint, _ = url.Parse("http://" + testutil.RefusingAddress) }), nil, "STS: connection refused; ALIYUN_STS_ENDPOINT must be"},
		{"HTML", good, func(f *ststest.Server) { f.Break(ststest.Body(502, "<html>502")) }, "STS: HTTP 502"},
		{"a hang", good, func(f *ststest.Server) { f.Break(ststest.Hang) }, "STS: no reply in time"},
		{"a lost reply", good, func(f *ststest.Server) { f.Break(ststest.HangUp) }, "STS: no connection"},
		{"another protocol", good, func(f *ststest.Server) { f.Break(switched) }, "STS: protocol switched instead of a reply"},
		{"an empty reply", good, func(f *ststest.Server) { f.Break(ststest.Body(200, "")) }, "STS: the reply is no JSON object"},
		{"an empty object", good, func(f *ststest.Server) { f.Break(ststest.Body(200, "{}")) }, "STS: the reply has no usable credentials"},
		{"no token in the set", good, func(f *ststest.Server) { f.Break(ststest.Body(200, strings.Replace(set, "LeakedToken", "", 1))) }, "STS: the reply has no usable credentials"},
		{"a line break in the set", good, func(f *ststest.Server) {
			f.Break(ststest.Body(200, at(time.Hour).Replace(strings.Replace(set, "LeakedToken", `LeakedToken\nx`, 1))))
		}, "STS: the reply has no usable credentials"},
		{"no end", good, func(f *ststest.Server) { f.Break(ststest.Body(200, set)) }, "STS: the reply has no usable credentials"},
		{"credentials that have ended", good, func(f *ststest.Server) { f.Break(ststest.Body(200, at(-time.Hour).Replace(set))) }, "STS: the reply has credentials that have ended; a clock is wrong"},
		{"a truncated reply", good, func(f *ststest.Server) { f.Break(ststest.Body(200, at(time.Hour).Replace(set)[:100])) }, "STS: the reply is no JSON object"},
		{"a huge reply", good, func(f *ststest.Server) { f.Break(ststest.Body(200, strings.Repeat(" ", 1<<20))) }, "STS: the reply was cut off, or has over 64 KiB"},
		{"a redirect", good, func(f *ststest.Server) {
			f.Break(func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, elsewhere.STSURL, http.StatusTemporaryRedirect)
			})
		}, "STS: HTTP 307"},
		{"a code that is the token", good, func(f *ststest.Server) { f.Break(ststest.Body(400, `{"Code":"FirstServiceAccountToken"}`)) }, "STS: HTTP 400"},
		{"a code that is a key", good, func(f *ststest.Server) { f.Break(ststest.Body(400, `{"Code":"LeakedSecret",`+set[1:])) }, "STS: HTTP 400"},

		{"ECS: another role", func(_ *testing.T, fake *ststest.Server) Source { return ECS{"other", fake.MetadataURL} }, nil, "ECS metadata: HTTP 404: the RAM role that ALIBABA_CLOUD_ECS_METADATA names is not attached to this instance"},
		{"ECS: a role that was revoked", ecs, func(f *ststest.Server) { f.Revoke(true) }, "ECS metadata: HTTP 404: the RAM role that ALIBABA_CLOUD_ECS_METADATA names is not attached to this instance"},
		{"ECS: elsewhere", func(*testing.T, *ststest.Server) Source { return ECS{"role", "http://" + testutil.RefusingAddress} }, nil, "ECS metadata: connection refused; ALIBABA_CLOUD_ECS_METADATA needs an ECS instance"},
		{"ECS: only version 1", ecs, func(f *ststest.Server) { f.Break(ststest.Body(404, "")) }, "ECS metadata: HTTP 404: no session token: the instance must offer version 2"},
		{
			"ECS: a session token with a line break", ecs, func(f *ststest.Server) { f.Break(ststest.Body(200, "a\nb")) },
			"ECS metadata: HTTP 200: no session token",
		},
		{"ECS: not Success", ecs, func(f *ststest.Server) { f.Break(broken(200, `{"Code":"Failed"}`)) }, "ECS metadata: HTTP 200, Failed"},
		{"ECS: another protocol", ecs, func(f *ststest.Server) { f.Break(switched) }, "ECS metadata: protocol switched instead of a reply"},
		{"ECS: HTML", ecs, func(f *ststest.Server) { f.Break(broken(200, "<html>")) }, "ECS metadata: the reply is no JSON object"},
		{"ECS: no end", ecs, func(f *ststest.Server) { f.Break(broken(200, flat)) }, "ECS metadata: the reply has no usable credentials"},
		{"ECS: credentials that have ended", ecs, func(f *ststest.Server) { f.Break(broken(200, at(-time.Hour).Replace(flat))) }, "ECS metadata: the reply has credentials that have ended"},
		{
			"ECS: a code that is the session token", ecs, func(f *ststest.Server) { f.Break(broken(500, `{"Code":"SessionToken"}`)) },
			"ECS metadata: HTTP 500",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			fake := ststest.New(t)
			s := c.source(t, fake)
			if c.setUp != nil {
				c.setUp(fake)
			}
			ctx := t.Context()
			if c.name == "a hang" {
				ctx = deadline(t, 100*time.Millisecond)
			}
			got, err := s.Fetch(ctx)
			if err == nil || !strings.HasPrefix(err.Error(), c.want) || got != (Set{}) {
				t.Fatalf("got %+v, %v; want the error %q", got, err, c.want)
			}
			for _, secret := range append(fake.Secrets(), "LeakedSecret", "LeakedToken", "STS.NLeak01", "FirstServiceAccountToken", "SessionToken") {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("got %q; want nothing of a secret, such as %s", err, secret)
				}
			}
		})
	}
	if n := elsewhere.Requests(); n != 0 {
		t.Errorf("got %d requests to a redirect's target; want none", n)
	}
}

// A proxy would see the credentials. net/http reads the variables of a proxy once in a process, and ignores
// them for a loopback address. So the test runs itself in a process that has them, and the service is
// at 0.0.0.0.
func TestFetch_ECSUsesNoProxy(t *testing.T) {
	const variable = "TEST_METADATA_URL"
	if endpoint := os.Getenv(variable); endpoint != "" {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, endpoint+"/by-proxy", nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultTransport.RoundTrip(request) // shows that the variables are in effect
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if _, err := (ECS{ststest.ECSRole, endpoint}).Fetch(t.Context()); err != nil {
			t.Error(err)
		}
		return
	}
	var mu sync.Mutex
	var proxied []string
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		proxied = append(proxied, r.Method+" "+r.URL.Path)
	}))
	defer proxy.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	endpoint := strings.Replace(ststest.New(t).MetadataURL, "127.0.0.1", "0.0.0.0", 1)
	cmd.Env = []string{variable + "=" + endpoint, "HTTP_PROXY=" + proxy.URL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("got %v\n%s\nwant credentials", err, out)
	}
	mu.Lock()
	defer mu.Unlock()
	if want := []string{"GET /by-proxy"}; !slices.Equal(proxied, want) {
		t.Errorf("at the proxy: got %v; want only %v, of the test", proxied, want)
	}
}
