package sms

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

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
	a, err := NewAliyun(AliyunConfig{
		Credentials: Credentials{AccessKeyID: fake.AccessKeyID, AccessKeySecret: fake.AccessKeySecret},
		Endpoint:    endpoint, PNVSEndpoint: fake.PNVSURL, CodeTTL: 10*time.Minute + 59*time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.endpoints[SMS].transport.CloseIdleConnections)
	t.Cleanup(a.endpoints[PNVS].transport.CloseIdleConnections)
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
	return failureOf(ctx, t, a, message)
}

func failureOf(ctx context.Context, t *testing.T, a *Aliyun, m verify.Message) *verify.SendError {
	t.Helper()
	receipt, err := a.Send(ctx, m)
	var e *verify.SendError
	if !errors.As(err, &e) {
		t.Fatalf("got receipt %+v and error %v; want a *verify.SendError", receipt, err)
	}
	if receipt != (verify.Receipt{}) {
		t.Errorf("got receipt %+v beside an error; want none", receipt)
	}
	for _, secret := range []string{"18612345678", message.Code, message.SignName, a.credentials.Load().AccessKeyID, a.credentials.Load().AccessKeySecret, "x-acs", a.endpoints[SMS].url.Host} {
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
	if got := authorization(r, Credentials{AccessKeyID: "YourAccessKeyId", AccessKeySecret: "YourAccessKeySecret"}); got != want {
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

func TestParseEndpoint_RequiresHTTPSUnlessLoopback(t *testing.T) {
	for in, want := range map[string]string{
		DefaultEndpoint:                        "https://dysmsapi.aliyuncs.com/",
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
		u, err := ParseEndpoint(in)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q: got %v; want an error", in, u)
		case want != "" && (err != nil || u.String() != want):
			t.Errorf("%q: got %v, %v; want %s", in, u, err, want)
		case err != nil && (!strings.Contains(err.Error(), "https://HOST:PORT") || strings.Contains(err.Error(), "password") ||
			strings.Contains(err.Error(), "secret")):
			t.Errorf("%q: got %q; want the valid form and no part of the input", in, err)
		}
	}
}

func TestNewAliyun_ReportsAllConfigErrors(t *testing.T) {
	_, err := NewAliyun(AliyunConfig{Credentials: Credentials{AccessKeySecret: "secret\n"}, Endpoint: "http://example.com"})
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
	a, err := NewAliyun(AliyunConfig{})
	if err != nil || a.endpoints[SMS].url.String() != DefaultEndpoint+"/" || a.endpoints[PNVS].url.String() != DefaultPNVSEndpoint+"/" {
		t.Errorf("without an endpoint: got %v, %v; want the default", a, err)
	}
}
