package server_test

import (
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

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

func TestWebPage_ForeignPageCannotSend(t *testing.T) {
	r, inbox := startDev(t)
	const body = `{"phone_number":"18600000000"}`
	for _, headers := range [][]string{
		{"Origin", "http://evil.example"},
		{"Origin", "null"},
		{"Sec-Fetch-Site", "cross-site"},
		{"Sec-Fetch-Site", "same-site"},
		{"Content-Type", "text/plain", "Origin", "http://evil.example"},
		{"Content-Type", "text/plain;charset=UTF-8", "Origin", "http://evil.example"},
		{"Content-Type", "text/xml"},
		{"Content-Type", "multipart/form-data; boundary=x"},
	} {
		if code, got := r.Post(t, "SendSMS", body, headers...); code != http.StatusUnsupportedMediaType {
			t.Errorf("%v: got %d %s; want 415", headers, code, got)
		}
	}
	if m := inbox.Messages(""); len(m) != 0 {
		t.Fatalf("messages: got %d; want 0", len(m))
	}
	for _, headers := range [][]string{
		{"Origin", "http://" + r.Addr, "Sec-Fetch-Site", "same-origin"},
		{"Sec-Fetch-Site", "none"},
		{"Content-Type", ""},
		{"Content-Type", "text/plain"},
		{"Content-Type", "text/plain;charset=UTF-8"},
	} {
		if code, got := r.Post(t, "SendSMS", body, headers...); code != 200 {
			t.Errorf("%v: got %d %s; want 200", headers, code, got)
		}
	}
}

// With DNS rebinding, Origin and Host of an attacker's page are equal. So only the list of
// origins lets a page call.
func TestWebPage_CannotCallServeUnlessItsOriginIsListed(t *testing.T) {
	const listed = "https://app.example.org"
	for _, origins := range [][]string{nil, {listed}} {
		var sends atomic.Int64
		r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), senderFunc(func(verify.Message) (verify.Receipt, error) {
			sends.Add(1)
			return verify.Receipt{BizID: "1"}, nil
		}), func(c *server.Config) { c.Origins = origins })
		own := "http://" + r.Addr
		message, err := proto.Marshal(servertest.SendRequest("18600000000"))
		if err != nil {
			t.Fatal(err)
		}
		const json = `{"phone_number":"18600000000","signature":"a","template_code":"b"}`
		for contentType, body := range map[string]string{
			"application/json": json, "text/plain": json, "": json, "application/proto": string(message), "application/grpc-web+proto": enveloped(0,
				string(message)),
		} {
			for _, c := range []struct {
				headers []string
				want    bool
			}{
				{nil, true},
				{[]string{"Sec-Fetch-Site", "none"}, true},
				{[]string{"Origin", own}, false},
				{[]string{"Origin", own, "Sec-Fetch-Site", "same-origin"}, false},
				{[]string{"Sec-Fetch-Site", "same-origin"}, false},
				{[]string{"Sec-Fetch-Site", "same-site"}, false},
				{[]string{"Sec-Fetch-Site", "cross-site"}, false},
				{[]string{"Origin", "null"}, false},
				{[]string{"Origin", ""}, false},
				{[]string{"Origin", "https://evil.example", "Sec-Fetch-Site", "none"}, false},
				{[]string{"Origin", listed, "Sec-Fetch-Site", "cross-site"}, len(origins) > 0},
			} {
				if c.want && len(c.headers) == 4 && contentType != "application/json" && !strings.Contains(contentType, "proto") {
					c.want = false // a page of another origin must declare the type
				}
				before := sends.Load()
				res, response := r.Exchange(t, "POST", sendPath, body, append([]string{"Content-Type", contentType}, c.headers...)...)
				if got := sends.Load() - before; (got == 1) != c.want {
					t.Errorf("origins %v, %q, %q: got %d sends, HTTP %d; want exactly one: %v", origins, contentType, c.headers, got, res.StatusCode, c.want)
					continue
				}
				if c.want || res.StatusCode == http.StatusUnsupportedMediaType {
					continue
				}
				s := statusOf(t, res, response)
				if info, _, _ := servertest.Details(t, s); s.Code() != codes.PermissionDenied || info.GetReason() != "ORIGIN_NOT_ALLOWED" {
					t.Errorf("origins %v, %q, %q: got %v %s; want PermissionDenied ORIGIN_NOT_ALLOWED", origins, contentType, c.headers, s.Code(), info.GetReason())
				}
			}
		}
		if !r.Log.Contains("msg=call method=SendSMS status=PermissionDenied") {
			t.Error("the log lacks a rejected call of a page")
		}
	}
}
