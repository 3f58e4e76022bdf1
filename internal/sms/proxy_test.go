package sms

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// setProxy sets the variables of a proxy, and unsets those that are not in values.
func setProxy(t *testing.T, values map[string]string) {
	t.Helper()
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "REQUEST_METHOD"} {
		t.Setenv(name, values[name])
	}
}

func TestProxy_UnreadableValueIsRejectedByName(t *testing.T) {
	endpoint, err := ParseEndpoint(DefaultEndpoint)
	if err != nil {
		t.Fatal(err)
	}
	for _, value := range []string{
		"http://u:hunter#2@10.0.0.1:3128", "http://u:1#hunter@10.0.0.1:3128", "http://u:hunter/2@10.0.0.1:3128",
		"http://u:1/hunter@10.0.0.1:3128",
		"http://u:hunter?2@10.0.0.1:3128", "http://u:hunter 2@10.0.0.1:3128", "http://u:hunter%2@10.0.0.1:3128", "u:hunter#2@10.0.0.1:3128",
		"http:/10.0.0.1:3128", "http:10.0.0.1:3128", "http//10.0.0.1:3128", "http://http://10.0.0.1:3128",
		"http://10.0.0.1:3128 ", " http://10.0.0.1:3128", "10.0.0.1:3128 ", "http://proxy ", "proxy\n", "http://10.0.0.1:3128\r",
		"http://10.0.0.1:31 28",
		`"http://10.0.0.1:3128"`, `'http://10.0.0.1:3128'`, `"proxy"`, `'proxy'`, `"10.0.0.1:3128"`, `http://"proxy":3128`,
		"http://10.0.0.1:3128;",
		"http://", "http://:3128", ":3128", "http://u:hunter2@", "http://u:hunter2@:3128", "http://10.0.0.1:", "http://10.0.0.1:0",
		"http://10.0.0.1:65536", "http://10.0.0.1:port",
		"http://fd00::1:3128", "http://[fd00::1:3128", "http://proxy..example", "http://$PROXY_HOST:3128", "http://{{ proxy }}:3128",
		"ftp://10.0.0.1:3128", "socks://10.0.0.1:1080", "socks4://10.0.0.1:1080", "tcp://10.0.0.1:3128", "://10.0.0.1:3128",
		"http://10.0.0.1:3128/path", "http://10.0.0.1:3128?", "http://10.0.0.1:3128?a=hunter", "http://10.0.0.1:3128#a",
	} {
		for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
			setProxy(t, map[string]string{name: value})
			_, err := proxyFor(endpoint)
			if err == nil {
				t.Errorf("%s=%q: got nil; want an error", name, value)
				continue
			}
			if !strings.HasPrefix(err.Error(), name+" must be ") || strings.Contains(err.Error(), "hunter") ||
				strings.Contains(err.Error(), "10.0.0.1") {
				t.Errorf("%s=%q: got %q; want the variable's name and no part of its value", name, value, err)
			}
			if _, again := NewAliyun(AliyunConfig{}); again == nil || again.Error() != err.Error() {
				t.Errorf("%s=%q: NewAliyun: got %v; want %v", name, value, again, err)
			}
		}
	}
}

func TestProxy_ReadableValueIsUsed(t *testing.T) {
	for value, want := range map[string]string{
		"http://10.0.0.1:3128":                  "http://10.0.0.1:3128",
		"10.0.0.1:3128":                         "http://10.0.0.1:3128",
		"proxy:3128":                            "http://proxy:3128",
		"proxy.example.org.":                    "http://proxy.example.org.",
		"HTTP://Proxy_1:3128/":                  "http://Proxy_1:3128/",
		"http://u:hunter%232@10.0.0.1:3128":     "http://u:hunter%232@10.0.0.1:3128",
		"u:p@ss@10.0.0.1:3128":                  "http://u:p%40ss@10.0.0.1:3128",
		"https://proxy.example.org":             "https://proxy.example.org",
		"socks5://u:hunter2@[fd00::1]:1080":     "socks5://u:hunter2@[fd00::1]:1080",
		"socks5h://10.0.0.1":                    "socks5h://10.0.0.1",
		"http://прокси.example:3128":            "http://%D0%BF%D1%80%D0%BE%D0%BA%D1%81%D0%B8.example:3128",
		"http://[fe80::1%25eth0]:3128":          "http://[fe80::1%25eth0]:3128",
		"http://phone-proxy.infra.svc.cluster.": "http://phone-proxy.infra.svc.cluster.",
	} {
		setProxy(t, map[string]string{"HTTPS_PROXY": value, "https_proxy": "http://other"})
		a, err := NewAliyun(AliyunConfig{})
		if err != nil {
			t.Errorf("%s: got %v; want nil", value, err)
			continue
		}
		if got, _ := a.endpoints[SMS].transport.Proxy(nil); got.String() != want {
			t.Errorf("%s: got the proxy %v; want %s", value, got, want)
		}
	}
}

// A variable that is not used for the endpoint may have an invalid value.
func TestProxy_IgnoresVariablesOfOtherEndpoints(t *testing.T) {
	const unreadable = "http://u:p#ss@10.0.0.1:3128"
	for _, c := range []struct {
		endpoint string
		env      map[string]string
	}{
		{DefaultEndpoint, map[string]string{"HTTP_PROXY": unreadable, "http_proxy": unreadable}},
		{DefaultEndpoint, map[string]string{"HTTPS_PROXY": unreadable, "NO_PROXY": "localhost,.aliyuncs.com"}},
		{DefaultEndpoint, map[string]string{"HTTPS_PROXY": unreadable, "no_proxy": "*"}},
		{"https://10.1.2.3:8443", map[string]string{"https_proxy": unreadable, "NO_PROXY": "10.0.0.0/8"}},
		{"http://127.0.0.1:8080", map[string]string{"HTTPS_PROXY": unreadable, "HTTP_PROXY": unreadable}},
		{"https://localhost:8080", map[string]string{"HTTPS_PROXY": unreadable}},
	} {
		setProxy(t, c.env)
		a, err := NewAliyun(AliyunConfig{Endpoint: c.endpoint, PNVSEndpoint: c.endpoint})
		if err != nil {
			t.Errorf("%s, %v: got %v; want nil", c.endpoint, c.env, err)
		} else if a.endpoints[SMS].transport.Proxy != nil {
			t.Errorf("%s, %v: got a proxy; want none", c.endpoint, c.env)
		}
	}
}

// The detail begins with "proxy:" if the proxy failed. It ends with "through the proxy" if the
// connection failed behind the proxy.
func TestProxy_LogDetailNamesTheProxy(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	listen := func(handler http.HandlerFunc, start func(*httptest.Server)) string {
		s := httptest.NewUnstartedServer(handler)
		s.Config.ErrorLog = quietLog
		start(s)
		t.Cleanup(s.Close)
		return s.Listener.Addr().String()
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	overTLS := listen(status(200), (*httptest.Server).StartTLS) // from an unknown authority
	tunnelsTo := func(address string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			upstream, err := net.Dial("tcp", address)
			if err != nil {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			defer upstream.Close()
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
			go io.Copy(upstream, conn)
			io.Copy(conn, upstream)
		}
	}
	plain := (*httptest.Server).Start
	hangsUp := dysmsapitest.New(t)
	hangsUp.Always(dysmsapitest.CloseBeforeReading())
	for _, c := range []struct{ name, proxy, detail string }{
		{"refused connection", "http://" + testutil.RefusingAddress, "proxy: connection refused"},
		{"unknown name", "http://proxy.invalid:3128", "proxy: host name not resolved"},
		{"CONNECT refused", "http://" + listen(status(407), plain), "proxy: refused to connect to Aliyun, HTTP 407"},
		{
			"CONNECT to a closed port", "http://" + listen(tunnelsTo(testutil.RefusingAddress), plain),
			"proxy: refused to connect to Aliyun, HTTP 502",
		},
		{"untrusted proxy", "https://" + overTLS, "proxy: server certificate not trusted"},
		{"hangs up", "socks5://" + strings.TrimPrefix(hangsUp.URL, "http://"), "proxy: no connection"},
		{"SOCKS refused connection", "socks5h://" + testutil.RefusingAddress, "proxy: connection refused"},
		{"untrusted gateway", "http://" + listen(tunnelsTo(overTLS), plain), "server certificate not trusted, through the proxy"},
		{"silent", "http://" + silent.Addr().String(), "time was up before the request was written, through the proxy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			setProxy(t, map[string]string{"HTTPS_PROXY": c.proxy})
			a := sender(t, dysmsapitest.New(t), "https://aliyun.invalid")
			timeout := 10 * time.Second
			switch c.name {
			case "unknown name":
				a.endpoints[SMS].transport.DialContext = unresolved
			case "silent":
				timeout = 100 * time.Millisecond
			}
			got := failure(deadline(t, timeout), t, a)
			matches(t, got, verify.SendError{Kind: verify.SendNotAttempted})
			if got.Detail != c.detail {
				t.Errorf("got detail %q; want %q", got.Detail, c.detail)
			}
		})
	}
}
