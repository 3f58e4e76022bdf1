// Package aliyunsdk compares the requests of this repository's Aliyun sender with those of
// Aliyun's official SDK, byte for byte.
package aliyunsdk

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	openapi "github.com/alibabacloud-go/darabonba-openapi/v2/client"
	openapiutil "github.com/alibabacloud-go/darabonba-openapi/v2/utils"
	"github.com/alibabacloud-go/tea/dara"

	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const keyID, keySecret = "LTAI5tTestAccessKeyID", "TestAccessKeySecret0123456789"

// captured is a request as the server received it.
type captured struct {
	*http.Request
	body        string
	headerNames string // those on the wire, in lower case, sorted
}

// capture starts a server that replies to every request with a success, and returns its address
// and the requests.
func capture(t *testing.T) (string, <-chan captured) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	seen := make(chan captured, 1)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			var raw bytes.Buffer
			r, err := http.ReadRequest(bufio.NewReader(io.TeeReader(conn, &raw)))
			if err != nil {
				t.Error(err)
				return
			}
			body, _ := io.ReadAll(r.Body)
			const reply = `{"Code":"OK","Message":"OK","RequestId":"R-1","BizId":"1^0","Model":{"BizId":"1^0"}}`
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(reply), reply)
			conn.Close()
			head, _, _ := strings.Cut(raw.String(), "\r\n\r\n")
			var names []string
			for _, line := range strings.Split(head, "\r\n")[1:] {
				name, _, _ := strings.Cut(line, ":")
				names = append(names, strings.ToLower(name))
			}
			slices.Sort(names)
			seen <- captured{r, string(body), strings.Join(names, " ")}
		}
	}()
	return listener.Addr().String(), seen
}

// sdkSend makes a request with the SDK, as its typed clients for SendSms and SendSmsVerifyCode do.
// The Go modules of these clients cannot be had; the parameters are theirs.
func sdkSend(ctx context.Context, address, token, action string, query map[string]any) (map[string]any, error) {
	config := &openapiutil.Config{
		AccessKeyId: dara.String(keyID), AccessKeySecret: dara.String(keySecret),
		Endpoint: dara.String(address), Protocol: dara.String("http"),
	}
	if token != "" {
		config.SetSecurityToken(token)
	}
	client, err := openapi.NewClient(config)
	if err != nil {
		return nil, err
	}
	return client.CallApiWithCtx(ctx, &openapiutil.Params{
		Action: dara.String(action), Version: dara.String("2017-05-25"), Protocol: dara.String("HTTPS"), Pathname: dara.String("/"),
		Method: dara.String("POST"), AuthType: dara.String("AK"), Style: dara.String("RPC"),
		ReqBodyType: dara.String("formData"), BodyType: dara.String("json"),
	}, &openapiutil.OpenApiRequest{Query: openapiutil.Query(query)}, &dara.RuntimeOptions{})
}

// A product is one of Aliyun's two products, with the parameters of its request.
type product struct {
	action, template string
	query            func(number, signName string) map[string]any
}

var products = []product{
	{"SendSms", "SMS_123456789", func(number, signName string) map[string]any {
		return map[string]any{
			"PhoneNumbers": number, "SignName": signName, "TemplateCode": "SMS_123456789", "TemplateParam": `{"code":"012345"}`,
		}
	}},
	{"SendSmsVerifyCode", "100001", func(number, signName string) map[string]any {
		return map[string]any{
			"AutoRetry": int64(0), "PhoneNumber": number, "SignName": signName, "TemplateCode": "100001",
			"TemplateParam": `{"code":"012345","min":"10"}`,
		}
	}},
}

func sender(t *testing.T, address, token string) *sms.Aliyun {
	t.Helper()
	credentials := sms.Credentials{AccessKeyID: keyID, AccessKeySecret: keySecret, SecurityToken: token}
	if token != "" {
		credentials.Provider = "static_sts"
	}
	a, err := sms.NewAliyun(sms.AliyunConfig{
		Credentials: credentials, Endpoint: "http://" + address, PNVSEndpoint: "http://" + address, CodeTTL: 10 * time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestSend_EqualsTheSDKsRequest(t *testing.T) {
	for _, p := range products {
		for _, signName := range []string{
			"Acme", "阿里云", "测试 签名", "two  words", " edges ", "*", "~", "+", "%", "/", "%20", "a+b c*d~e/f%g", "&=?#;:@!$'()[]",
			`"quoted" \ <b>`, "-_.", "é", "𠮷野家", "👍",
		} {
			for _, n := range []struct{ number, wire string }{
				{"+8618612345678", "18612345678"},
				{"+85261234567", "85261234567"},
				{"+13012345678", "0013012345678"},
			} {
				if p.action == "SendSmsVerifyCode" && !strings.HasPrefix(n.number, "+86") {
					continue
				}
				for _, token := range []string{"", "CAIS+/token=="} {
					t.Run(fmt.Sprintf("%s %s to %s, token %q", p.action, signName, n.number, token), func(t *testing.T) {
						compare(t, p, verify.Number(n.number), n.wire, signName, token)
					})
				}
			}
		}
	}
}

// compare sends the same SMS with the SDK and with the sender.
func compare(t *testing.T, p product, number verify.Number, wire, signName, token string) {
	address, seen := capture(t)
	a := sender(t, address, token)
	if _, err := sdkSend(t.Context(), address, token, p.action, p.query(wire, signName)); err != nil {
		t.Fatal(err)
	}
	theirs := <-seen

	m := verify.Message{Number: number, SignName: signName, TemplateCode: p.template, Code: "012345"}
	date, err := time.Parse("2006-01-02T15:04:05Z", theirs.Header.Get("X-Acs-Date"))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultTransport.RoundTrip(a.NewRequest(t.Context(), m, date, theirs.Header.Get("X-Acs-Signature-Nonce")))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	ours := <-seen
	same(t, ours, theirs, nil)

	// Send sends the same request.
	if _, err := a.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	same(t, <-seen, theirs, []string{"Authorization", "X-Acs-Date", "X-Acs-Signature-Nonce"})
}

// same compares two requests. User-Agent may differ, and the values of the headers in
// differs.
func same(t *testing.T, ours, theirs captured, differs []string) {
	t.Helper()
	for _, c := range []struct {
		name      string
		got, want any
	}{
		{"method", ours.Method, theirs.Method},
		{"request URI", ours.RequestURI, theirs.RequestURI},
		{"host", ours.Host, theirs.Host},
		{"protocol", ours.Proto, theirs.Proto},
		{"body", ours.body, theirs.body},
		{"content length", ours.ContentLength, theirs.ContentLength},
		{"header names", ours.headerNames, theirs.headerNames},
		{"signed headers", signedHeaders(ours), signedHeaders(theirs)},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %v; want %v as from the SDK", c.name, c.got, c.want)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(theirs.Header)) {
		if name == "User-Agent" || slices.Contains(differs, name) {
			continue
		}
		if got, want := ours.Header.Get(name), theirs.Header.Get(name); got != want {
			t.Errorf("header %s: got %q; want %q as from the SDK", name, got, want)
		}
	}
}

func signedHeaders(c captured) string {
	_, rest, _ := strings.Cut(c.Header.Get("Authorization"), "SignedHeaders=")
	names, _, _ := strings.Cut(rest, ",")
	return names
}

// The fake gateway, which all other tests use, must accept the real client.
func TestServer_AcceptsTheSDK(t *testing.T) {
	for _, p := range products {
		for _, signName := range []string{"阿里云", "a+b c*d~e/f%g"} {
			for _, token := range []string{"", "CAIS+/token=="} {
				fake := dysmsapitest.New(t)
				fake.SetIssuer(func(id string) (dysmsapitest.Issued, bool) {
					return dysmsapitest.Issued{AccessKeySecret: keySecret, SecurityToken: token}, id == keyID
				})
				url := map[string]string{"SendSms": fake.URL, "SendSmsVerifyCode": fake.PNVSURL}[p.action]
				query := p.query("18612345678", signName)
				if _, err := sdkSend(t.Context(), strings.TrimPrefix(url, "http://"), token, p.action, query); err != nil {
					t.Fatal(err)
				}
				got := fake.Accepted()
				if len(got) != 1 || got[0].SignName != signName || got[0].Code != "012345" {
					t.Errorf("%s: got %+v; want one message signed %q", p.action, got, signName)
				}
			}
		}
	}
}
