package sms

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var message = verify.Message{Number: "+8618612345678", SignName: "测试 签名", TemplateCode: "SMS_1", Code: "493817"}

// sender returns a sender to fake. If endpoint is not empty, it sends there instead.
func sender(t *testing.T, fake *dysmsapitest.Server, endpoint string) *Aliyun {
	t.Helper()
	if endpoint == "" {
		endpoint = fake.URL
	}
	a, err := NewAliyun(AliyunConfig{fake.AccessKeyID, fake.AccessKeySecret, endpoint})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.transport.CloseIdleConnections)
	return a
}

func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// failure sends message, and returns the *SendError, which must contain no secret.
func failure(ctx context.Context, t *testing.T, a *Aliyun) *verify.SendError {
	t.Helper()
	receipt, err := a.Send(ctx, message)
	var e *verify.SendError
	if !errors.As(err, &e) {
		t.Fatalf("got receipt %+v and error %v; want a *verify.SendError", receipt, err)
	}
	if receipt != (verify.Receipt{}) {
		t.Errorf("got receipt %+v beside an error; want none", receipt)
	}
	for _, secret := range []string{"18612345678", message.Code, message.SignName, a.key.Load().id, a.key.Load().secret, "x-acs", a.endpoint.Host} {
		if text := fmt.Sprintf("%s %+v", err, *e); strings.Contains(text, secret) {
			t.Errorf("got %q in the error %s; want no secret", secret, text)
		}
	}
	return e
}

// matches compares all fields of two errors but RequestID and Detail. Detail must not be empty.
func matches(t *testing.T, got *verify.SendError, want verify.SendError) {
	t.Helper()
	if got.Kind != want.Kind || got.ProviderCode != want.ProviderCode || got.RetryAfter != want.RetryAfter ||
		got.HTTPStatus != want.HTTPStatus {
		t.Errorf("got kind %d, code %q, retry after %v, HTTP %d (%s); want kind %d, code %q, retry after %v, HTTP %d",
			got.Kind, got.ProviderCode, got.RetryAfter, got.HTTPStatus, got.Detail, want.Kind, want.ProviderCode, want.RetryAfter, want.HTTPStatus)
	}
	if got.Detail == "" {
		t.Error("got an empty Detail; want one for the log")
	}
}

// checkSent compares the numbers of sent messages and of requests.
func checkSent(t *testing.T, fake *dysmsapitest.Server, messages, requests int) {
	t.Helper()
	if got := len(fake.Accepted()); got != messages {
		t.Errorf("got %d sent messages; want %d", got, messages)
	}
	if got := fake.Requests(); got != requests {
		t.Errorf("got %d requests; want %d", got, requests)
	}
}

func TestSend_AcceptedMessageArrivesUnchanged(t *testing.T) {
	for _, name := range []string{"测试签名", "two words", `*~+%/&=?#"\`, "a"} {
		fake := dysmsapitest.New(t)
		m := message
		m.SignName = name
		receipt, err := sender(t, fake, "").Send(t.Context(), m)
		if err != nil {
			t.Fatalf("sign name %q: %v", name, err)
		}
		checkSent(t, fake, 1, 1)
		got := fake.Accepted()[0]
		want := dysmsapitest.Accepted{
			PhoneNumber: "18612345678", SignName: name, TemplateCode: "SMS_1", Code: "493817",
			BizID: got.BizID, At: got.At,
		}
		if got != want {
			t.Errorf("got %+v; want %+v", got, want)
		}
		if receipt.BizID != got.BizID || receipt.RequestID != fake.RequestIDs()[0] {
			t.Errorf("got receipt %+v; want business id %s and request id %s", receipt, got.BizID, fake.RequestIDs()[0])
		}
	}
}

func TestSend_ForeignNumberNeverBecomesAMainlandNumber(t *testing.T) {
	fake := dysmsapitest.New(t)
	a := sender(t, fake, "")
	for _, c := range []struct {
		number verify.Number
		want   string
	}{
		{"+8618612345678", "18612345678"},
		{"+8619912345678", "19912345678"},
		{"+85261234567", "85261234567"},
		{"+886912345678", "886912345678"},
		{"+447400123456", "447400123456"},
		{"+12025550123", "12025550123"},     // no mainland mobile number begins with 12
		{"+13012345678", "0013012345678"},   // 13012345678 is a number in Beijing
		{"+19175550123", "0019175550123"},   // also a mainland number
		{"+139061234567", "139061234567"},   // too long for a mainland number
		{"+8613012345678", "13012345678"},   // the number in Beijing
		{"+66812345678", "66812345678"},     // eleven digits, but no mainland number
		{"+7910123456789", "7910123456789"}, // thirteen
	} {
		m := message
		m.Number = c.number
		if _, err := a.Send(t.Context(), m); err != nil {
			t.Fatalf("%s: %v", c.number, err)
		}
		accepted := fake.Accepted()
		if got := accepted[len(accepted)-1].PhoneNumber; got != c.want {
			t.Errorf("%s: got %q on the wire; want %q", c.number, got, c.want)
		}
	}
}

// The connection breaks below HTTP, or the reply is not Aliyun's. Each case runs twice: the
// message was sent or not, and the sender cannot know which.
func TestSend_BrokenConnectionOrReplyIsUnknown(t *testing.T) {
	const biz = `"BizId":"900619746936498440^0"`
	js := func(status int, body string) dysmsapitest.Fault {
		return dysmsapitest.Body(status, "application/json", body)
	}
	for _, c := range []struct {
		name   string
		fault  dysmsapitest.Fault
		status int
		code   string
	}{
		{"closed after reading", dysmsapitest.CloseAfterReading(), 0, ""},
		{"truncated", dysmsapitest.Truncated(), 0, ""}, // its status is set below
		{"HTML 502", dysmsapitest.BadGateway(), 502, ""},
		{"HTML 200", dysmsapitest.Body(200, "text/html", "<html>OK</html>"), 200, ""},
		{"empty 200", js(200, ""), 200, ""},
		{"empty 204", js(204, ""), 204, ""},
		{"empty 500", js(500, ""), 500, ""},
		{"302 without a Location", js(302, ""), 302, ""},
		{"304", js(304, ""), 304, ""},
		{"malformed", js(200, `{"Code":"OK",`+biz), 200, ""},
		{"more than one value", js(200, `{"Code":"OK",`+biz+`}{}`), 200, ""},
		{"null", js(200, `null`), 200, ""},
		{"array", js(200, `[{"Code":"OK",`+biz+`}]`), 200, ""},
		{"no code", js(200, `{`+biz+`}`), 200, ""},
		{"field name in lower case", js(200, `{"code":"OK",`+biz+`}`), 200, ""},
		{"code that is no string", js(200, `{"Code":["OK"],`+biz+`}`), 200, ""},
		{"code in lower case", js(200, `{"Code":"ok",`+biz+`}`), 200, "ok"},
		{"code that is a sentence", js(400, `{"Code":"isv.X means call 10086"}`), 400, ""},
		{"code that is too long", js(400, `{"Code":"isv.`+strings.Repeat("X", 64)+`"}`), 400, ""},
		{"code with a line break", js(400, `{"Code":"isv.X\n"}`), 400, ""},
		{"code that quotes the number", js(400, `{"Code":"isv.18612345678"}`), 400, ""},
		{"code that quotes the code", js(400, `{"Code":"isv.493817"}`), 400, ""},
		{"OK without a business id", dysmsapitest.OKWithoutBizID(), 200, ""},
		{"OK with an empty business id", js(200, `{"Code":"OK","BizId":""}`), 200, ""},
		{"OK with a business id that is no string", js(200, `{"Code":"OK","BizId":1}`), 200, ""},
		{"OK with HTTP 202", js(202, `{"Code":"OK",`+biz+`}`), 202, ""},
		{"OK with HTTP 500", js(500, `{"Code":"OK",`+biz+`}`), 500, ""},
		{"unlisted code", dysmsapitest.Reply(200, "Surprise", ""), 200, "Surprise"},
		{"unlisted 4xx", dysmsapitest.Reply(403, "Surprise", ""), 403, "Surprise"},
	} {
		for _, accepted := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, accepted %t", c.name, accepted), func(t *testing.T) {
				fake := dysmsapitest.New(t)
				fault, messages := c.fault, 0
				if accepted {
					fault, messages = fault.ButAccepted(), 1
				}
				fake.Next(fault)
				got := failure(deadline(t, 10*time.Second), t, sender(t, fake, ""))
				want := verify.SendError{Kind: verify.SendUnknown, ProviderCode: c.code, HTTPStatus: c.status}
				if c.name == "truncated" {
					want.HTTPStatus = map[bool]int{false: 500, true: 200}[accepted]
				}
				matches(t, got, want)
				checkSent(t, fake, messages, 1)
			})
		}
	}
}

func TestSend_DropsAnIDThatCouldHideText(t *testing.T) {
	for field, id := range map[string]string{
		"a sentence":      "your code is below",
		"a number":        "ID-18612345678",
		"a code":          "493817",
		"too long":        strings.Repeat("A", 65),
		"a terminal code": "\x1b[31m",
	} {
		fake := dysmsapitest.New(t)
		a := sender(t, fake, "")
		reply, _ := json.Marshal(map[string]string{"Code": "OK", "BizId": id, "RequestId": id})
		fake.Next(dysmsapitest.Body(200, "application/json", string(reply)))
		if receipt, err := a.Send(t.Context(), message); err != nil || receipt != (verify.Receipt{}) {
			t.Errorf("%s: got %+v, %v; want an empty receipt", field, receipt, err)
		}
		reply, _ = json.Marshal(map[string]string{"Code": "isv.X", "RequestId": id})
		fake.Next(dysmsapitest.Body(200, "application/json", string(reply)))
		if e := failure(t.Context(), t, a); e.RequestID != "" || e.ProviderCode != "isv.X" {
			t.Errorf("%s: got code %q and request id %q; want isv.X and none", field, e.ProviderCode, e.RequestID)
		}
	}
}

// The fake gateway rejects these requests by its own rules, without a fault of the test.
func TestSend_RejectionHidesTheGatewaysText(t *testing.T) {
	minute := verify.SendError{Kind: verify.SendLimited, ProviderCode: "isv.BUSINESS_LIMIT_CONTROL", HTTPStatus: 200, RetryAfter: time.Minute}
	for _, c := range []struct {
		name     string
		setUp    func(*dysmsapitest.Server, *Aliyun)
		messages int
		want     verify.SendError
	}{
		{
			"wrong secret", func(_ *dysmsapitest.Server, a *Aliyun) { a.key.Load().secret = "wrong" }, 0,
			verify.SendError{Kind: verify.SendRejected, ProviderCode: "SignatureDoesNotMatch", HTTPStatus: 400},
		},
		{
			"wrong key id", func(_ *dysmsapitest.Server, a *Aliyun) { a.key.Load().id = "wrong" }, 0,
			verify.SendError{Kind: verify.SendRejected, ProviderCode: "InvalidAccessKeyId.NotFound", HTTPStatus: 404},
		},
		{
			"sign name", func(s *dysmsapitest.Server, _ *Aliyun) { s.AllowSign("another") }, 0,
			verify.SendError{Kind: verify.SendRejected, ProviderCode: "isv.SMS_SIGNATURE_ILLEGAL", HTTPStatus: 200},
		},
		{
			"template", func(s *dysmsapitest.Server, _ *Aliyun) { s.AllowTemplate("SMS_2") }, 0,
			verify.SendError{Kind: verify.SendRejected, ProviderCode: "isv.SMS_TEMPLATE_ILLEGAL", HTTPStatus: 200},
		},
		{"minute limit", func(s *dysmsapitest.Server, a *Aliyun) {
			s.Limits(true)
			a.Send(context.Background(), message)
		}, 1, minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			fake := dysmsapitest.New(t)
			a := sender(t, fake, "")
			c.setUp(fake, a)
			got := failure(t.Context(), t, a)
			matches(t, got, c.want)
			if ids := fake.RequestIDs(); got.RequestID != ids[len(ids)-1] {
				t.Errorf("got request id %q; want %q", got.RequestID, ids[len(ids)-1])
			}
			checkSent(t, fake, c.messages, c.messages+1)
		})
	}
}

func TestSend_FollowsNoRedirect(t *testing.T) {
	elsewhere := dysmsapitest.New(t)
	for _, status := range []int{301, 302, 303, 307, 308} {
		fake := dysmsapitest.New(t)
		fake.Next(dysmsapitest.Redirect(status, elsewhere.URL+"/"))
		matches(t, failure(t.Context(), t, sender(t, fake, "")), verify.SendError{Kind: verify.SendUnknown, HTTPStatus: status})
		checkSent(t, fake, 0, 1)
	}
	if got := elsewhere.Connections(); got != 0 {
		t.Errorf("got %d connections to the redirect's target; want none", got)
	}
}

func TestSend_ReadsAtMost64KiBOfAReply(t *testing.T) {
	const size = 64 << 20
	fake := dysmsapitest.New(t)
	fake.Next(dysmsapitest.Huge(size), dysmsapitest.Huge(maxReplyBytes+1))
	a := sender(t, fake, "")
	matches(t, failure(t.Context(), t, a), verify.SendError{Kind: verify.SendUnknown, HTTPStatus: 200})
	if got := fake.BytesSent(); got > size/2 {
		t.Errorf("got %d bytes sent by the server; want %d at most", got, size/2)
	}
	matches(t, failure(t.Context(), t, a), verify.SendError{Kind: verify.SendUnknown, HTTPStatus: 200})

	fake.Next(dysmsapitest.Redirect(302, strings.Repeat("x", 1<<20))) // a huge header
	matches(t, failure(t.Context(), t, a), verify.SendError{Kind: verify.SendUnknown})

	fake.Next(dysmsapitest.Huge(maxReplyBytes))
	if _, err := a.Send(t.Context(), message); err != nil {
		t.Errorf("a success of exactly 64 KiB: got %v; want nil", err)
	}
}

func TestSend_HangEndsAtTheDeadline(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Next(dysmsapitest.Hang().ButAccepted())
	const timeout = 150 * time.Millisecond
	start := time.Now()
	matches(t, failure(deadline(t, timeout), t, sender(t, fake, "")), verify.SendError{Kind: verify.SendTimedOut})
	if took := time.Since(start); took < timeout || took > timeout+3*time.Second {
		t.Errorf("got the error after %v; want it after %v", took, timeout)
	}
	checkSent(t, fake, 1, 1)
}

func TestSend_StalledReplyEndsAtTheDeadline(t *testing.T) {
	stalls := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"Code":"OK",`)
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(stalls.Close)
	a := sender(t, dysmsapitest.New(t), stalls.URL)
	matches(t, failure(deadline(t, 150*time.Millisecond), t, a), verify.SendError{Kind: verify.SendTimedOut, HTTPStatus: 200})
}

// A canceled call reports if its request was written: SendNotAttempted if not, otherwise
// SendTimedOut.
func TestSend_CancelBeforeTheRequestIsNotAttempted(t *testing.T) {
	fake := dysmsapitest.New(t)
	a := sender(t, fake, "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	matches(t, failure(ctx, t, a), verify.SendError{Kind: verify.SendNotAttempted})
	checkSent(t, fake, 0, 0)

	fake.Next(dysmsapitest.Hang())
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		for fake.Requests() == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	matches(t, failure(ctx, t, a), verify.SendError{Kind: verify.SendTimedOut})
	checkSent(t, fake, 0, 1)
}

// unresolved fails to dial, as if no name server knew the host.
func unresolved(_ context.Context, _, address string) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: address, IsNotFound: true}}
}

// If the connection fails before the request, nothing was sent.
func TestSend_WithoutAConnectionIsNotAttempted(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts connections, sends nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	fake := dysmsapitest.New(t)
	overTLS := func(config *tls.Config) string {
		server := httptest.NewUnstartedServer(fake)
		server.TLS = config
		server.Config.ErrorLog = quietLog
		server.StartTLS()
		t.Cleanup(server.Close)
		return server.URL
	}
	old := overTLS(&tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10})
	for _, c := range []struct {
		name, endpoint, detail string
		prepare                func(*Aliyun)
	}{
		{"refused", "http://" + closed.Addr().String(), "connection refused", nil},
		{"untrusted certificate", overTLS(&tls.Config{}), "server certificate not trusted", nil},
		{"TLS 1.1", old, "no connection", func(a *Aliyun) { a.transport.TLSClientConfig.InsecureSkipVerify = true }},
		{
			"stalled handshake", "https://" + silent.Addr().String(), "connecting took too long",
			func(a *Aliyun) { a.transport.TLSHandshakeTimeout = 50 * time.Millisecond },
		},
		{"deadline in the handshake", "https://" + silent.Addr().String(), "time was up before the request was written", nil},
		{"unknown host", "https://aliyun.invalid", "host name not resolved", func(a *Aliyun) { a.transport.DialContext = unresolved }},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := sender(t, fake, c.endpoint)
			if c.prepare != nil {
				c.prepare(a)
			}
			timeout := 10 * time.Second
			if strings.HasPrefix(c.name, "deadline") {
				timeout = 100 * time.Millisecond
			}
			got := failure(deadline(t, timeout), t, a)
			matches(t, got, verify.SendError{Kind: verify.SendNotAttempted})
			if got.Detail != c.detail {
				t.Errorf("got detail %q; want %q", got.Detail, c.detail)
			}
			if n := len(fake.Accepted()); n != 0 {
				t.Errorf("got %d sent messages; want none", n)
			}
		})
	}
}

func TestSend_UsesHTTP1AndExportsTheCertificatesEnd(t *testing.T) {
	fake := dysmsapitest.New(t)
	var protocol atomic.Value
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protocol.Store(fmt.Sprintf("%s %t", r.Proto, r.TLS.Version >= tls.VersionTLS12))
		fake.ServeHTTP(w, r)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	a := sender(t, fake, server.URL)
	a.transport.TLSClientConfig.RootCAs = server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	if _, err := a.Send(t.Context(), message); err != nil {
		t.Fatal(err)
	}
	if got, want := protocol.Load(), "HTTP/1.1 true"; got != want {
		t.Errorf("got %v; want %s", got, want)
	}
	var m dto.Metric
	if err := a.certificate.WithLabelValues().Write(&m); err != nil {
		t.Fatal(err)
	}
	if got, want := m.GetGauge().GetValue(), float64(server.Certificate().NotAfter.Unix()); got != want {
		t.Errorf("the metric of the certificate's end: got %v; want %v", got, want)
	}
	checkSent(t, fake, 1, 1)
}

// net/http repeats some requests by itself if a kept connection is dead. It must not repeat a
// send.
func TestSend_IsNotReplayedOnADeadConnection(t *testing.T) {
	for name, fault := range map[string]dysmsapitest.Fault{
		"ended":            dysmsapitest.CloseAfterReading(),
		"ended, delivered": dysmsapitest.CloseAfterReading().ButAccepted(),
		"reset":            dysmsapitest.CloseBeforeReading(),
	} {
		t.Run(name, func(t *testing.T) {
			fake := dysmsapitest.New(t)
			a := sender(t, fake, "")
			if _, err := a.Send(t.Context(), message); err != nil {
				t.Fatal(err)
			}
			fake.Next(fault)
			matches(t, failure(t.Context(), t, a), verify.SendError{Kind: verify.SendUnknown})
			if got := fake.Connections(); got != 1 {
				t.Errorf("got %d connections; want 1, for both sends", got)
			}
			messages := 1
			if strings.HasSuffix(name, "delivered") {
				messages = 2
			}
			checkSent(t, fake, messages, 2)
			if _, err := a.Send(t.Context(), message); err != nil {
				t.Errorf("the next send: got %v; want nil", err)
			}
		})
	}
}

func TestSend_BurstKeepsItsConnections(t *testing.T) {
	const burst, rounds = 200, 3
	fake := dysmsapitest.New(t)
	fake.Always(dysmsapitest.Delay(20 * time.Millisecond)) // so that a round's sends overlap
	a := sender(t, fake, "")
	for range rounds {
		var wg sync.WaitGroup
		for range burst {
			wg.Go(func() {
				if _, err := a.Send(t.Context(), message); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	checkSent(t, fake, burst*rounds, burst*rounds)
	if got := fake.Connections(); got > burst*3/2 {
		t.Errorf("got %d connections for %d rounds of %d sends; want %d at most", got, rounds, burst, burst*3/2)
	}
}

// The example is from Aliyun's documentation of signature version 3.
func TestSignature_MatchesAliyunsPublishedExample(t *testing.T) {
	r, err := http.NewRequest("POST", "https://ecs.cn-shanghai.aliyuncs.com/?ImageId=win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd&RegionId=cn-shanghai", nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"x-acs-action":          "RunInstances",
		"x-acs-content-sha256":  "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		"x-acs-date":            "2023-10-26T10:22:32Z",
		"x-acs-signature-nonce": "3156853299f313e23d1673dc12e1703d",
		"x-acs-version":         "2014-05-26",
		"User-Agent":            "not signed",
	} {
		r.Header.Set(name, value)
	}
	const want = "ACS3-HMAC-SHA256 Credential=YourAccessKeyId," +
		"SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-date;x-acs-signature-nonce;x-acs-version," +
		"Signature=06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"
	if got := authorization(r, "YourAccessKeyId", "YourAccessKeySecret"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestSend_NoncesAreUnique(t *testing.T) {
	fake := dysmsapitest.New(t) // rejects a nonce that it saw before
	a := sender(t, fake, "")
	for range 50 {
		if _, err := a.Send(t.Context(), message); err != nil {
			t.Fatal(err)
		}
	}
}

func TestParseAliyunEndpoint_RequiresHTTPSUnlessLoopback(t *testing.T) {
	for in, want := range map[string]string{
		DefaultAliyunEndpoint:                  "https://dysmsapi.aliyuncs.com/",
		"https://dysmsapi.aliyuncs.com/":       "https://dysmsapi.aliyuncs.com/",
		"https://gateway.example:8443":         "https://gateway.example:8443/",
		"http://127.0.0.1:8080":                "http://127.0.0.1:8080/",
		"http://[::1]:8080":                    "http://[::1]:8080/",
		"http://localhost:8080":                "http://localhost:8080/",
		"http://dysmsapi.aliyuncs.com":         "",
		"http://192.168.1.1":                   "",
		"http://127.0.0.1.example":             "",
		"https://user:password@127.0.0.1":      "",
		"https://dysmsapi.aliyuncs.com/path":   "",
		"https://dysmsapi.aliyuncs.com?":       "",
		"https://dysmsapi.aliyuncs.com?a=b":    "",
		"https://dysmsapi.aliyuncs.com#a":      "",
		"https://:443":                         "",
		"https://dysmsapi.aliyuncs.com:":       "",
		"https://dysmsapi.aliyuncs.com:secret": "",
		"dysmsapi.aliyuncs.com":                "",
		"127.0.0.1:8080":                       "",
		"ftp://127.0.0.1":                      "",
		"":                                     "",
	} {
		u, err := ParseAliyunEndpoint(in)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q: got %v; want an error", in, u)
		case want != "" && (err != nil || u.String() != want):
			t.Errorf("%q: got %v, %v; want %s", in, u, err, want)
		case err != nil && (!strings.Contains(err.Error(), DefaultAliyunEndpoint) || strings.Contains(err.Error(), "password") ||
			strings.Contains(err.Error(), "secret")):
			t.Errorf("%q: got %q; want the valid form and no part of the input", in, err)
		}
	}
}

func TestNewAliyun_ReportsAllConfigErrors(t *testing.T) {
	_, err := NewAliyun(AliyunConfig{"", "secret\n", "http://example.com"})
	if err == nil {
		t.Fatal("got nil; want three errors")
	}
	for _, want := range []string{"access key ID", "access key secret must", "endpoint"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %q; want an error about the %s", err, want)
		}
	}
	if strings.Contains(err.Error(), "secret\n") {
		t.Errorf("got %q; want no part of the secret", err)
	}
	a, err := NewAliyun(AliyunConfig{AccessKeyID: "id", AccessKeySecret: "secret"})
	if err != nil || a.endpoint.String() != DefaultAliyunEndpoint+"/" {
		t.Errorf("without an endpoint: got %v, %v; want the default", a, err)
	}
}

func FuzzReadReply(f *testing.F) {
	for _, seed := range []string{
		`{"Code":"OK","BizId":"900619746936498440^0","RequestId":"AA-1","Message":"OK"}`,
		`{"Code":"isv.BUSINESS_LIMIT_CONTROL","Message":"触发小时级流控Permits:5"}`,
		`{"Code":"OK"}`, `{"Code":"OK","BizId":""}`, `{"code":"OK","bizId":"1"}`, `null`, `[]`, ``, `<html>`, `{"Code":1e999}`,
		`{"Code":"OK","BizId":"18612345678"}`, `{"Code":"OK","Code":"X","BizId":"1"}`, "{\"Code\":\"\xff\"}",
	} {
		f.Add(200, []byte(seed))
		f.Add(502, []byte(seed))
	}
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		receipt, err := ReadReply(message, status, body)
		var reply map[string]json.RawMessage
		var code, bizID string
		plain := json.Unmarshal(body, &reply) == nil && json.Unmarshal(reply["Code"], &code) == nil &&
			json.Unmarshal(reply["BizId"], &bizID) == nil
		if err == nil && (status != 200 || !plain || code != "OK" || bizID == "") {
			t.Errorf("HTTP %d %q: got nil; want nil only for OK with a business id", status, body)
		}
		var e *verify.SendError
		if err != nil && (!errors.As(err, &e) || e.ProviderCode != "" && !tokenShape.MatchString(e.ProviderCode)) {
			t.Errorf("HTTP %d %q: got %v; want a *verify.SendError with a valid code", status, body, err)
		}
		for _, text := range []string{receipt.BizID, receipt.RequestID, fmt.Sprint(err)} {
			if strings.Contains(text, "18612345678") || strings.Contains(text, message.Code) || strings.ContainsAny(text, "\x1b\n/=") {
				t.Errorf("HTTP %d %q: got %q; want no number, code or control character", status, body, text)
			}
		}
	})
}
