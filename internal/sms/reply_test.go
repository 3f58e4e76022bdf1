package sms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

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
		for run := range 4 {
			m, accepted := []verify.Message{message, pnvsMessage}[run/2], run%2 == 1
			t.Run(fmt.Sprintf("%s, %s, accepted %t", c.name, ProductOf(m.TemplateCode), accepted), func(t *testing.T) {
				fake := dysmsapitest.New(t)
				fault, messages := c.fault, 0
				if accepted {
					fault, messages = fault.ButAccepted(), 1
				}
				fake.Next(fault)
				got := failureOf(deadline(t, 10*time.Second), t, sender(t, fake, ""), m)
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
			"wrong secret", func(_ *dysmsapitest.Server, a *Aliyun) { a.credentials.Load().AccessKeySecret = "wrong" }, 0,
			verify.SendError{Kind: verify.SendRejected, ProviderCode: "SignatureDoesNotMatch", HTTPStatus: 400},
		},
		{
			"wrong key id", func(_ *dysmsapitest.Server, a *Aliyun) { a.credentials.Load().AccessKeyID = "wrong" }, 0,
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
