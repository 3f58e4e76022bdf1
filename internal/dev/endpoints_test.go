package dev

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
)

func TestInbox_ListsNewestFirst(t *testing.T) {
	r, _ := startDev(t)
	r.MustSend(t, "18600000001")
	r.MustSend(t, "18600000002")
	r.MustSend(t, "18600000001")
	r.MustSend(t, "+85291234567")
	get := func(query string) (numbers []string) {
		t.Helper()
		code, body := r.Ask(t, "GET", "/inbox.json"+query, "")
		var messages []map[string]string
		if err := json.Unmarshal([]byte(body), &messages); code != 200 || err != nil {
			t.Fatalf("%s: got %d %s; want 200 and a list", query, code, body)
		}
		for _, m := range messages {
			numbers = append(numbers, m["phone_number"])
			at, err := time.Parse(time.RFC3339, m["sent_at"])
			if len(m) != 5 || m["signature"] != "阿里云" || m["template_code"] != "SMS_123456789" || len(m["code"]) != 6 || err != nil ||
				time.Since(at) > time.Hour {
				t.Errorf("message: got %v; want the five fields of the send", m)
			}
		}
		return numbers
	}
	one, two, abroad := "+8618600000001", "+8618600000002", "+85291234567"
	for query, want := range map[string][]string{
		"":                               {abroad, one, two, one},
		"?phone_number=+85291234567":     {abroad}, // the + arrives as a space
		"?phone_number=%2B8618600000002": {two},
		"?phone_number=186-0000-0002":    {two},
		"?phone_number=18600000003":      nil,
	} {
		if got := get(query); !slices.Equal(got, want) {
			t.Errorf("%s: got %v; want %v", query, got, want)
		}
	}
	if code, body := r.Ask(t, "GET", "/inbox.json?phone_number=10086", ""); code != 400 || !strings.Contains(body, "phone_number") {
		t.Errorf("an invalid number: got %d %s; want 400 that names phone_number", code, body)
	}
}

// DNS rebinding: the owner of a name in public DNS can point it at this address.
func TestDev_RejectsPublicHostNames(t *testing.T) {
	everywhere := func(c *server.Config) {
		_, port, _ := net.SplitHostPort(c.Listener.Addr().String())
		c.Listener.Close()
		var err error
		if c.Listener, err = net.Listen("tcp", "0.0.0.0:"+port); err != nil {
			t.Fatal(err)
		}
	}
	for listens, change := range map[string]func(*server.Config){"on loopback": func(*server.Config) {}, "on every address": everywhere} {
		r, _ := startDev(t, change)
		_, port, _ := net.SplitHostPort(r.Addr)
		for host, want := range map[string]int{
			"evil.example": 421, "evil.example:" + port: 421, "localhost.evil.example": 421, "127.0.0.1.nip.io": 421, "local": 200,
			"EVIL.example.": 421, "localhost.evil": 421, "local.": 200, "localhost..": 421, ".": 421,
			"localhost.": 200, "LocalHost:" + port: 200, "Phone.LOCAL": 200, "phone.local.": 200, "phone.local.:" + port: 200, "Sms.Internal.": 200,
			"127.0.0.1.":        200,
			"localhost:" + port: 200, "127.0.0.1": 200, "[::1]:" + port: 200, "sms:50511": 200, "sms.internal": 200, "phone.localhost": 200,
		} {
			for _, path := range []string{"/inbox.json", "/"} {
				q, _ := http.NewRequest("GET", "http://"+r.Addr+path, nil)
				q.Host = host
				if code, body := servertest.Do(t, q); code != want {
					t.Errorf("listens %s, Host %s: got %d %s; want %d", listens, host, code, body, want)
				}
			}
		}
		warned := r.Log.Contains("every host that can reach this address")
		if warned != (listens == "on every address") {
			t.Errorf("listens %s: the log warns: got %v; want %v", listens, warned, !warned)
		}
	}
}

func TestDev_RejectsForeignPages(t *testing.T) {
	r, inbox := startDev(t)
	r.MustSend(t, "18600000001")
	for _, headers := range [][]string{
		{"Origin", "http://evil.example"},
		{"Origin", "null"},
		{"Origin", "http://localhost:3000"},
		{"Sec-Fetch-Site", "cross-site"},
		{"Sec-Fetch-Site", "same-site"},
	} {
		for _, endpoint := range []string{
			"GET /inbox.json", "DELETE /inbox.json", "GET /inbox/events", "GET /failures.json", "PUT /failures.json", "DELETE /failures.json",
			"GET /number.json?phone_number=1",
		} {
			method, path, _ := strings.Cut(endpoint, " ")
			if code, body := r.Ask(t, method, path, `{"kind":"timeout"}`, headers...); code != 403 {
				t.Errorf("%s with %v: got %d %s; want 403", endpoint, headers, code, body)
			}
		}
		if code, _ := r.Ask(t, "GET", "/", "", headers...); code != 200 {
			t.Errorf("a link to the page, with %v: got %d; want 200", headers, code)
		}
	}
	if code, _ := r.Ask(t, "GET", "/inbox.json", "", "Origin", "http://"+r.Addr, "Sec-Fetch-Site", "same-origin"); code != 200 ||
		len(inbox.Messages("")) != 1 {
		t.Errorf("the page of dev: got %d, %v; want 200 and one message", code, inbox.Messages(""))
	}
}

func TestInbox_WaitEndsWithAMessageOrInTime(t *testing.T) {
	r, _ := startDev(t)
	type response struct {
		code int
		body string
	}
	waited := make(chan response, 1)
	go func() {
		code, body := r.Ask(t, "GET", "/inbox.json?phone_number=+8618600000001&wait=1m", "")
		waited <- response{code, body}
	}()
	r.MustSend(t, "18600000002") // a message to another number does not end the wait
	r.MustSend(t, "18600000001")
	if got := <-waited; got.code != 200 || strings.Count(got.body, "phone_number") != 1 || !strings.Contains(got.body, "+8618600000001") {
		t.Errorf("a wait for +8618600000001: got %d %s; want 200 and one message", got.code, got.body)
	}
	began := time.Now()
	if code, body := r.Ask(t, "GET", "/inbox.json?phone_number=18600000003&wait=150ms", ""); code != 200 || strings.TrimSpace(body) != "[]" ||
		time.Since(began) < 150*time.Millisecond {
		t.Errorf("a wait without a message: got %d %s after %v; want 200 [] after 150ms", code, body, time.Since(began))
	}
}

// The timeouts of ordinary requests do not apply to a request that waits.
func TestInbox_WaitMayExceedEveryTimeout(t *testing.T) {
	t.Parallel()
	r, _ := startDev(t)
	const wait = 6 * time.Second // longer than the read timeout of 5 s
	began := time.Now()
	if code, body := r.Ask(t, "GET", "/inbox.json?wait="+wait.String(), ""); code != 200 || time.Since(began) < wait {
		t.Errorf("got %d %s after %v; want 200 after %v", code, body, time.Since(began), wait)
	}
}

func TestInbox_DeleteKeepsTheCodes(t *testing.T) {
	r, inbox := startDev(t)
	r.MustSend(t, "18600000001")
	r.MustSend(t, "18600000002")
	code := inbox.Messages("+8618600000001")[0].Code
	if status, body := r.Ask(t, "DELETE", "/inbox.json?phone_number=+86 186 0000 0001", ""); status != 400 {
		t.Errorf("a query with spaces: got %d %s; want 400", status, body) // from net/http
	}
	if status, body := r.Ask(t, "DELETE", "/inbox.json?phone_number=+8618600000001", ""); status != 204 {
		t.Errorf("DELETE of one number: got %d %s; want 204", status, body)
	}
	if m := inbox.Messages(""); len(m) != 1 || m[0].PhoneNumber != "+8618600000002" {
		t.Errorf("messages after DELETE: got %v; want the one of +8618600000002", m)
	}
	if !r.IsValid(t, "18600000001", code) {
		t.Error("the code of a deleted message: got invalid; want valid")
	}
	if status, _ := r.Ask(t, "DELETE", "/inbox.json", ""); status != 204 || len(inbox.Messages("")) != 0 {
		t.Errorf("DELETE of all: got %d, messages %v; want 204, none", status, inbox.Messages(""))
	}
}

func TestFailures_SendsFailLikeAtAliyun(t *testing.T) {
	r, inbox := startDev(t, func(c *server.Config) { c.Verifier.SMSTimeout = 100 * time.Millisecond })
	for _, f := range []struct {
		kind   string
		code   codes.Code
		reason string
		retry  time.Duration
		field  string
		sent   int // messages in the inbox
	}{
		{"limit_minute", codes.ResourceExhausted, "isv.BUSINESS_LIMIT_CONTROL", time.Minute, "", 0},
		{"limit_hour", codes.ResourceExhausted, "isv.BUSINESS_LIMIT_CONTROL", time.Hour, "", 0},
		{"limit_day", codes.ResourceExhausted, "isv.BUSINESS_LIMIT_CONTROL", 24 * time.Hour, "", 0},
		{"illegal_number", codes.InvalidArgument, "isv.MOBILE_NUMBER_ILLEGAL", 0, "phone_number", 0},
		{"no_balance", codes.FailedPrecondition, "isv.AMOUNT_NOT_ENOUGH", 0, "", 0},
		{"timeout", codes.DeadlineExceeded, "SMS_TIMEOUT", 0, "", 0},
		{"timeout_delivered", codes.DeadlineExceeded, "SMS_TIMEOUT", 0, "", 1},
	} {
		number := servertest.FreshNumber()
		r.MustSend(t, number)
		earlier := inbox.Messages("")[0].Code
		if status, body := r.Ask(t, "PUT", "/failures.json", `{"kind":"`+f.kind+`","times":1}`); status != 200 ||
			!strings.Contains(body, f.kind) {
			t.Fatalf("PUT %s: got %d %s", f.kind, status, body)
		}
		before := len(inbox.Messages(""))
		_, err := r.SendSMS(t.Context(), servertest.SendRequest(number))
		s := status.Convert(err)
		info, retry, bad := servertest.Details(t, s)
		field := servertest.FieldOf(bad)
		if s.Code() != f.code || info.GetReason() != f.reason || retry.GetRetryDelay().AsDuration() != f.retry || field != f.field {
			t.Errorf("%s: got %v, reason %s, retry %v, field %q; want %v, %s, %v, %q", f.kind, s, info.GetReason(), retry.GetRetryDelay().AsDuration(), field, f.code, f.reason, f.retry, f.field)
		}
		if info.GetDomain() == "aliyun.com" && info.GetMetadata()["request_id"] == "" {
			t.Errorf("%s: got no request_id; want Aliyun's", f.kind)
		}
		messages := inbox.Messages("")
		if len(messages)-before != f.sent {
			t.Errorf("%s: messages: got %d; want %d", f.kind, len(messages)-before, f.sent)
		}
		if code := messages[0].Code; f.sent == 1 && !r.IsValid(t, number, code) {
			t.Errorf("%s: the code in the inbox: got invalid; want valid", f.kind)
		} else if f.sent == 0 && !r.IsValid(t, number, earlier) {
			t.Errorf("%s: the earlier code: got invalid; want valid", f.kind)
		}
		if n := servertest.FreshNumber(); len(inbox.Failures()) != 0 {
			t.Errorf("%s: failures after one send: got %v; want none", f.kind, inbox.Failures())
		} else {
			r.MustSend(t, n)
		}
	}
}

func TestFailures_OfANumberComeFirst(t *testing.T) {
	r, inbox := startDev(t)
	mustReturn := func(number string, want codes.Code) {
		t.Helper()
		if _, err := r.SendSMS(t.Context(), servertest.SendRequest(number)); status.Code(err) != want {
			t.Errorf("%s: got %v; want %v", number, err, want)
		}
	}
	put := func(body string) {
		t.Helper()
		if status, got := r.Ask(t, "PUT", "/failures.json", body); status != 200 {
			t.Fatalf("%s: got %d %s; want 200", body, status, got)
		}
	}
	put(`{"kind":"no_balance","phone_number":"186-0000-0001","times":2}`)
	mustReturn("18600000002", codes.OK)
	mustReturn("18600000001", codes.FailedPrecondition)
	put(`{"kind":"limit_hour"}`)
	mustReturn("18600000001", codes.FailedPrecondition)
	mustReturn("18600000001", codes.ResourceExhausted)
	for range 3 {
		mustReturn("18600000002", codes.ResourceExhausted)
	}
	put(`{"kind":"illegal_number","phone_number":"18600000002"}`)
	want := []Failure{{Kind: "limit_hour"}, {PhoneNumber: "+8618600000002", Kind: "illegal_number"}}
	if got := inbox.Failures(); !slices.Equal(got, want) {
		t.Errorf("failures: got %v; want %v", got, want)
	}
	if status, _ := r.Ask(t, "DELETE", "/failures.json?phone_number=18600000002", ""); status != 204 {
		t.Errorf("DELETE of one: got %d; want 204", status)
	}
	mustReturn("18600000002", codes.ResourceExhausted)
	put(`{"kind":"none","phone_number":"18600000002","times":1}`)
	mustReturn("18600000002", codes.OK)
	mustReturn("18600000002", codes.ResourceExhausted)
	put(`{"kind":"none"}`)
	mustReturn("18600000001", codes.OK)
	put(`{"kind":"illegal_number","phone_number":"18600000002"}`)
	mustReturn("18600000002", codes.InvalidArgument)
	if status, _ := r.Ask(t, "DELETE", "/failures.json", ""); status != 204 {
		t.Errorf("DELETE of all: got %d; want 204", status)
	}
	mustReturn("18600000002", codes.OK)
	mustReturn("18600000001", codes.OK)
}

func TestDev_InvalidRequestsAreExplained(t *testing.T) {
	r, inbox := startDev(t)
	kinds := "none, limit_minute, limit_hour, limit_day, illegal_number, no_balance, timeout, timeout_delivered"
	for _, c := range []struct{ method, path, body, want string }{
		{"GET", "/inbox.json?phone_number=10086", "", "phone_number must be one mobile number"},
		{"GET", "/inbox.json?wait=61s", "", "wait must be a duration from 0s to 1m0s, such as 5s"},
		{"GET", "/inbox.json?wait=5", "", "wait must be a duration"},
		{"GET", "/inbox.json?wait=-1s", "", "wait must be a duration"},
		{"GET", "/inbox.json?number=1", "", "the only parameters are phone_number, wait"},
		{"GET", "/inbox.json?one=1", "", "the only parameters are phone_number, wait"},
		{"GET", "/inbox.json?phone_number=18600000001&phone_number=18600000002", "", "phone_number is given more than once"},
		{"DELETE", "/inbox.json?phone_number=10086", "", "phone_number must be one mobile number"},
		{"DELETE", "/inbox.json?wait=1s", "", "the only parameters are phone_number"},
		{"GET", "/inbox/events?phone_number=18600000001", "", "this request has no parameters"},
		{"GET", "/failures.json?x=1", "", "this request has no parameters"},
		{"DELETE", "/failures.json?x=1", "", "the only parameters are phone_number"},
		{"PUT", "/failures.json?x=1", `{"kind":"timeout"}`, "this request has no parameters"},
		{"PUT", "/failures.json", ``, "the body must be one JSON object with kind (one of " + kinds},
		{"PUT", "/failures.json", `{"kind":"timeout","time":1}`, "the body must be one JSON object"},
		{"PUT", "/failures.json", `{"kind":"timeout","times":"1"}`, "the body must be one JSON object"},
		{"PUT", "/failures.json", `{"kind":"timeout"` + strings.Repeat(" ", 5000) + `}`, "the body must be one JSON object"},
		{"PUT", "/failures.json", `{"kind":"timeout"}{}`, "the body must be one JSON object"},
		{"PUT", "/failures.json", `{"kind":"timeout","times":0}`, "times must be a whole number from 1 to 1000"},
		{"DELETE", "/inbox.json?phone_number=%zz", "", "the query cannot be parsed"},
		{"DELETE", "/inbox.json?phone_number=18600000001;x=1", "", "the query cannot be parsed"},
		{"DELETE", "/inbox.json?phone_number=", "", "phone_number is empty"},
		{"DELETE", "/failures.json?phone_number=", "", "phone_number is empty"},
		{"GET", "/inbox.json?wait=", "", "wait is empty"},
		{"PUT", "/failures.json", `{}`, "kind must be one of " + kinds},
		{"PUT", "/failures.json", `{"kind":"timeout","times":-1}`, "times must be a whole number from 1 to 1000"},
		{"PUT", "/failures.json", `{"kind":"timeout","times":1001}`, "times must be a whole number from 1 to 1000"},
		{"PUT", "/failures.json", `{"kind":"timeout","phone_number":"10086"}`, "phone_number must be one mobile number"},
		{"PUT", "/failures.json", `{"kind":"timeout","phone_number":""}`, "phone_number is required"},
		{"GET", "/number.json", "", "phone_number, is required"},
		{"GET", "/number.json?phone_number=1&x=1", "", "phone_number, is required"},
	} {
		if code, body := r.Ask(t, c.method, c.path, c.body); code != 400 || !strings.Contains(body, c.want) {
			t.Errorf("%s %s %.60s: got %d %s; want 400 and %s", c.method, c.path, c.body, code, body, c.want)
		}
	}
	if f := inbox.Failures(); len(f) != 0 {
		t.Errorf("failures: got %v; want none", f)
	}
	for path, want := range map[string]string{
		"/number.json?phone_number=+852 9123 4567": `400`,
		"/number.json?phone_number=+85291234567":   `{"phone_number":"+85291234567"}`,
		"/number.json?phone_number=186-0000-0001":  `{"phone_number":"+8618600000001"}`,
		"/number.json?phone_number=":               `{"fault":"is required: one mobile number`,
		"/number.json?phone_number=10086":          `{"fault":"must be one mobile number`,
	} {
		if _, body := r.Ask(t, "GET", path, ""); !strings.Contains(body, want) {
			t.Errorf("%s: got %s; want %s", path, body, want)
		}
	}
}

// A request promises a body and never sends it. The response ends, and the connection closes.
func TestDev_MissingBodyHoldsNoConnection(t *testing.T) {
	t.Parallel()
	r, _ := startDev(t)
	var connections sync.WaitGroup
	for _, path := range []string{"/inbox.json?wait=1s", "/inbox/events"} {
		connections.Go(func() {
			c, err := net.Dial("tcp", r.Addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000\r\n\r\n")
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: the connection: got open; want closed", path)
			}
		})
	}
	connections.Wait()
}

func TestPage_HasSecurityHeadersAndIsSmall(t *testing.T) {
	r, _ := startDev(t)
	total := 0
	for path, contentType := range map[string]string{
		"/": "text/html; charset=utf-8", "/page.css": "text/css; charset=utf-8", "/page.js": "text/javascript; charset=utf-8",
		"/snippets.js": "text/javascript; charset=utf-8", "/words.js": "text/javascript; charset=utf-8", "/openapi.json": "application/json",
		"/inbox.json": "application/json", "/failures.json": "application/json",
	} {
		res, err := http.Get("http://" + r.Addr + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		h := res.Header
		if res.StatusCode != 200 || h.Get("Content-Type") != contentType {
			t.Errorf("%s: got %d %s; want 200 %s", path, res.StatusCode, h.Get("Content-Type"), contentType)
		}
		for name, want := range map[string]string{
			"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
				"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
			"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer",
			"Cache-Control": "no-store",
		} {
			if got := h.Get(name); got != want {
				t.Errorf("%s: %s: got %q; want %q", path, name, got, want)
			}
		}
	}
	err := fs.WalkDir(os.DirFS("page"), ".", func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			info, _ := d.Info()
			total += int(info.Size())
		}
		return err
	})
	if err != nil || total > 68_000 {
		t.Errorf("files of the page: got %d bytes, %v; want at most 68,000", total, err)
	}
}
