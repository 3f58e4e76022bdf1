package dysmsapitest

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// The example is from Aliyun's documentation of signature version 3.
func TestSignature_MatchesAliyunsPublishedExample(t *testing.T) {
	params := url.Values{"RegionId": {"cn-shanghai"}, "ImageId": {"win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd"}}
	canonical := canonicalRequest("POST", params, map[string]string{
		"host":                  "ecs.cn-shanghai.aliyuncs.com",
		"x-acs-action":          "RunInstances",
		"x-acs-content-sha256":  "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		"x-acs-date":            "2023-10-26T10:22:32Z",
		"x-acs-signature-nonce": "3156853299f313e23d1673dc12e1703d",
		"x-acs-version":         "2014-05-26",
	}, fmt.Sprintf("%x", sha256.Sum256(nil)))
	if got, want := fmt.Sprintf("%x", sha256.Sum256([]byte(canonical))), "7ea06492da5221eba5297e897ce16e55f964061054b7695beedaac1145b1e259"; got != want {
		t.Errorf("canonical request: got hash %s of\n%s\nwant %s", got, canonical, want)
	}
	if got, want := signature("YourAccessKeySecret", canonical), "06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"; got != want {
		t.Errorf("signature: got %s; want %s", got, want)
	}
}

// A call is one request to the fake. It is valid, unless a test changes it before or after it is
// signed.
type call struct {
	url, method, path, rawQuery, body, keyID, secret string
	header                                           http.Header
}

func validCall(s *Server) *call {
	return &call{
		url: s.URL, method: "POST", path: "/", keyID: s.AccessKeyID, secret: s.AccessKeySecret,
		rawQuery: query("18612345678", "测试 签名", "SMS_1", `{"code":"493817"}`),
		header: http.Header{
			"X-Acs-Action":          {"SendSms"},
			"X-Acs-Version":         {"2017-05-25"},
			"X-Acs-Date":            {time.Now().UTC().Format("2006-01-02T15:04:05Z")},
			"X-Acs-Signature-Nonce": {fmt.Sprint(time.Now().UnixNano())},
			"X-Acs-Content-Sha256":  {fmt.Sprintf("%x", sha256.Sum256(nil))},
		},
	}
}

func query(number, signName, template, param string) string {
	return url.Values{"PhoneNumbers": {number}, "SignName": {signName}, "TemplateCode": {template}, "TemplateParam": {param}}.Encode()
}

func (c *call) sign() {
	r := &http.Request{Host: strings.TrimPrefix(c.url, "http://"), Header: c.header}
	params, _ := url.ParseQuery(c.rawQuery)
	signed := headersToSign(r)
	canonical := canonicalRequest(c.method, params, signed, fmt.Sprintf("%x", sha256.Sum256([]byte(c.body))))
	names := strings.Split(canonical, "\n")
	c.header.Set("Authorization", fmt.Sprintf("ACS3-HMAC-SHA256 Credential=%s,SignedHeaders=%s,Signature=%s", c.keyID, names[len(names)-2], signature(c.secret, canonical)))
}

func (c *call) send(t *testing.T) (int, reply) {
	t.Helper()
	r, err := http.NewRequest(c.method, c.url+c.path+"?"+c.rawQuery, strings.NewReader(c.body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = c.header
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	var a reply
	if err := json.Unmarshal(body, &a); err != nil {
		t.Fatalf("got %q: %v", body, err)
	}
	return response.StatusCode, a
}

func TestServer_AcceptsOnlyValidRequests(t *testing.T) {
	none := func(*call) {}
	const mismatch, incomplete = "SignatureDoesNotMatch", "IncompleteSignature"
	at := func(d time.Duration) func(*call) {
		return func(c *call) { c.header.Set("X-Acs-Date", time.Now().UTC().Add(d).Format("2006-01-02T15:04:05Z")) }
	}
	for _, x := range []struct {
		name          string
		before, after func(*call)
		status        int
		code          string
	}{
		{"valid", none, none, 200, "OK"},
		{"signed content type", func(c *call) { c.header.Set("Content-Type", "text/plain") }, none, 200, "OK"},
		{"a date 14 minutes old", at(-14 * time.Minute), none, 200, "OK"},
		{"a date 16 minutes old", at(-16 * time.Minute), none, 400, "InvalidTimeStamp.Expired"},
		{"a date 16 minutes ahead", at(16 * time.Minute), none, 400, "InvalidTimeStamp.Expired"},
		{"no date", func(c *call) { c.header.Del("X-Acs-Date") }, none, 400, "InvalidTimeStamp.Expired"},
		{"an invalid date", func(c *call) { c.header.Set("X-Acs-Date", "today") }, none, 400, "InvalidTimeStamp.Expired"},
		{"no nonce", func(c *call) { c.header.Del("X-Acs-Signature-Nonce") }, none, 400, incomplete},
		{"GET", func(c *call) { c.method = "GET" }, none, 405, "UnsupportedHTTPMethod"},
		{"a path", func(c *call) { c.path = "/sms" }, none, 405, "UnsupportedHTTPMethod"},
		{"another action", func(c *call) { c.header.Set("X-Acs-Action", "SendBatchSms") }, none, 404, "InvalidAction.NotFound"},
		{"another version", func(c *call) { c.header.Set("X-Acs-Version", "2018-05-01") }, none, 400, "InvalidVersion"},
		{"another key", func(c *call) { c.keyID = "other" }, none, 404, "InvalidAccessKeyId.NotFound"},
		{"another secret", func(c *call) { c.secret = "other" }, none, 400, mismatch},
		{"no authorization", none, func(c *call) { c.header.Del("Authorization") }, 400, incomplete},
		{"an unsigned header", none, func(c *call) { c.header.Set("X-Acs-Extra", "1") }, 400, incomplete},
		{"an unsigned content type", none, func(c *call) { c.header.Set("Content-Type", "text/plain") }, 400, incomplete},
		{"a missing signed header", none, func(c *call) { c.header.Del("X-Acs-Content-Sha256") }, 400, incomplete},
		{"signed headers out of order", none, func(c *call) {
			c.header.Set("Authorization", strings.Replace(c.header.Get("Authorization"), "host;x-acs-action", "x-acs-action;host", 1))
		}, 400, incomplete},
		{"a repeated header", none, func(c *call) { c.header.Add("X-Acs-Action", "SendSms") }, 404, "InvalidAction.NotFound"},
		{"a changed nonce", none, func(c *call) { c.header.Set("X-Acs-Signature-Nonce", "another") }, 400, mismatch},
		{"a changed number", none, func(c *call) { c.rawQuery = strings.Replace(c.rawQuery, "18612345678", "18612345679", 1) }, 400, mismatch},
		{"an added parameter", none, func(c *call) { c.rawQuery += "&OutId=1" }, 400, mismatch},
		{"a body that was not signed", none, func(c *call) { c.body = "x" }, 400, mismatch},
		{"a body with another hash", func(c *call) { c.body = "x" }, none, 400, mismatch},
		{"a broken query", none, func(c *call) { c.rawQuery += "&a=%zz" }, 400, mismatch},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := New(t)
			c := validCall(s)
			x.before(c)
			c.sign()
			x.after(c)
			status, a := c.send(t)
			if status != x.status || a.Code != x.code {
				t.Errorf("got HTTP %d %s; want %d %s", status, a.Code, x.status, x.code)
			}
			if want := map[bool]int{true: 1}[x.code == "OK"]; len(s.Accepted()) != want {
				t.Errorf("got %d sent messages; want %d", len(s.Accepted()), want)
			}
			if quoted := strings.Contains(a.Message, "493817"); quoted != (x.code == mismatch) {
				t.Errorf("got message %q; want the request quoted only for %s", a.Message, mismatch)
			}
		})
	}
}

func TestServer_AcceptsANonceOnce(t *testing.T) {
	s := New(t)
	c := validCall(s)
	c.sign()
	c.send(t)
	if status, a := c.send(t); status != 400 || a.Code != "SignatureNonceUsed" || len(s.Accepted()) != 1 {
		t.Errorf("the same request again: got HTTP %d %s and %d messages; want 400 SignatureNonceUsed and 1", status, a.Code, len(s.Accepted()))
	}
}

func TestServer_AcceptsOneCodeToOneNumber(t *testing.T) {
	const number, name, template, param = "18612345678", "签名", "SMS_1", `{"code":"493817"}`
	for _, x := range []struct {
		rawQuery string
		status   int
		code     string
	}{
		{query(number, name, template, param), 200, "OK"},
		{query("+8618612345678", name, template, param), 200, "OK"},
		{query("008618612345678", name, template, param), 200, "OK"},
		{query("85261234567", name, template, param), 200, "OK"},
		{query("0013012345678", name, template, `{"code":"A1b2"}`), 200, "OK"},
		{query("", name, template, param), 400, "MissingPhoneNumbers"},
		{query(number, "", template, param), 400, "MissingSignName"},
		{query(number, name, "", param), 400, "MissingTemplateCode"},
		{query(number, name, template, ""), 400, "MissingTemplateParam"},
		{query(number, name, template, param) + "&OutId=1", 200, "isv.INVALID_PARAMETERS"},
		{query(number, name, template, param) + "&PhoneNumbers=18612345679", 200, "isv.INVALID_PARAMETERS"},
		{query(number+",18612345679", name, template, param), 200, "isv.MOBILE_COUNT_OVER_LIMIT"},
		{query("+85261234567", name, template, param), 200, "isv.MOBILE_NUMBER_ILLEGAL"},
		{query("10086x", name, template, param), 200, "isv.MOBILE_NUMBER_ILLEGAL"},
		{query(number, "\xff", template, param), 200, "isv.SMS_SIGNATURE_ILLEGAL"},
		{query(number, "unknown", template, param), 200, "isv.SMS_SIGNATURE_ILLEGAL"},
		{query(number, name, "SMS-1", param), 200, "isv.SMS_TEMPLATE_ILLEGAL"},
		{query(number, name, "SMS_2", param), 200, "isv.SMS_TEMPLATE_ILLEGAL"},
		{query(number, name, template, "493817"), 200, "isv.INVALID_JSON_PARAM"},
		{query(number, name, template, `{}`), 200, "isv.TEMPLATE_MISSING_PARAMETERS"},
		{query(number, name, template, `{"code":493817}`), 200, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		{query(number, name, template, `{"code":"493"}`), 200, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		{query(number, name, template, `{"code":"4938170"}`), 200, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		{query(number, name, template, `{"code":"493817","more":"x"}`), 200, "isv.TEMPLATE_PARAMS_ILLEGAL"},
	} {
		s := New(t)
		s.AllowSign("签名", "\xff")
		s.AllowTemplate("SMS_1", "SMS-1")
		c := validCall(s)
		c.rawQuery = x.rawQuery
		c.sign()
		if status, a := c.send(t); status != x.status || a.Code != x.code {
			t.Errorf("%s: got HTTP %d %s; want %d %s", x.rawQuery, status, a.Code, x.status, x.code)
		}
		if want := map[bool]int{true: 1}[x.code == "OK"]; len(s.Accepted()) != want {
			t.Errorf("%s: got %d sent messages; want %d", x.rawQuery, len(s.Accepted()), want)
		}
	}
}

func TestServer_LimitsUseRollingWindows(t *testing.T) {
	s := New(t)
	s.Limits(true)
	now := time.Now()
	s.SetClock(func() time.Time { return now })
	send := func(number, name, want string) {
		t.Helper()
		c := validCall(s)
		c.rawQuery = query(number, name, "SMS_1", `{"code":"493817"}`)
		c.sign()
		if _, a := c.send(t); a.Message != want {
			t.Errorf("%s, %s at %v: got %q; want %q", number, name, now, a.Message, want)
		}
	}
	const number, minute, hour, day = "18612345678", "触发分钟级流控Permits:1", "触发小时级流控Permits:5", "触发天级流控Permits:10"
	pass := func(d time.Duration) { now = now.Add(d) }

	send(number, "A", "OK")
	send(number, "A", minute)
	send("+86"+number, "A", minute) // the same person, other spelling
	send(number, "B", "OK")         // each sign name has its own limits
	send("13812345678", "A", "OK")
	send("85261234567", "A", "OK") // numbers abroad have no limits
	send("85261234567", "A", "OK")
	pass(59 * time.Second)
	send(number, "A", minute)
	pass(time.Second)
	for range 4 {
		send(number, "A", "OK") // the second to the fifth
		pass(time.Minute)
	}
	send(number, "A", hour)
	pass(55 * time.Minute) // an hour after the first: rejections do not count
	for range 5 {
		send(number, "A", "OK") // the sixth to the tenth
		pass(time.Hour)
	}
	send(number, "A", day)
	s.Limits(false)
	send(number, "A", "OK")
}
