package sms

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// NewRequest returns the signed request for one SMS as sent at now. The nonce must be unique. It is
// for test/aliyunsdk, which compares it with the official SDK.
func (a *Aliyun) NewRequest(ctx context.Context, m verify.Message, now time.Time, nonce string) *http.Request {
	return a.newRequest(ctx, m, *a.credentials.Load(), now, nonce)
}

func (a *Aliyun) newRequest(ctx context.Context, m verify.Message, c Credentials, now time.Time, nonce string) *http.Request {
	product := ProductOf(m.TemplateCode)
	return signed(ctx, a.endpoints[product].url, actions[product], a.parameters(m), c, now, nonce)
}

// signed returns a signed request of an action.
func signed(ctx context.Context, endpoint *url.URL, action, query string, c Credentials, now time.Time, nonce string) *http.Request {
	u := *endpoint
	u.RawQuery = query
	r := (&http.Request{Method: http.MethodPost, URL: &u, Host: u.Host, Header: http.Header{
		"Accept":                     {"application/json"},
		"User-Agent":                 {"phone-number-service"},
		"X-Acs-Action":               {action},
		"X-Acs-Version":              {"2017-05-25"},
		"X-Acs-Credentials-Provider": {cmp.Or(c.Provider, "static_ak")},
		"X-Acs-Content-Sha256":       {emptyBodySHA256},
		"X-Acs-Date":                 {now.UTC().Format("2006-01-02T15:04:05Z")},
		"X-Acs-Signature-Nonce":      {nonce},
	}}).WithContext(ctx)
	if c.SecurityToken != "" { // then the SDK sends both
		r.Header["X-Acs-Accesskey-Id"] = []string{c.AccessKeyID}
		r.Header["X-Acs-Security-Token"] = []string{c.SecurityToken}
	}
	r.Header["Authorization"] = []string{authorization(r, c)}
	return r
}

const emptyBodySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// authorization signs r with Aliyun's signature version 3. It covers the path "/", the host, all
// X-Acs headers, and the query as escaped by url.QueryEscape.
func authorization(r *http.Request, c Credentials) string {
	const algorithm = "ACS3-HMAC-SHA256"
	var names []string
	for name := range r.Header {
		if strings.HasPrefix(name, "X-Acs-") {
			names = append(names, name)
		}
	}
	slices.Sort(names) // the order in lower case is the same
	headers, signedNames := "host:"+r.Host+"\n", "host"
	for _, name := range names {
		lower := strings.ToLower(name)
		headers += lower + ":" + r.Header[name][0] + "\n"
		signedNames += ";" + lower
	}
	canonical := sha256.Sum256([]byte(r.Method + "\n/\n" +
		strings.ReplaceAll(r.URL.RawQuery, "+", "%20") + "\n" + // a space; a plus is %2B
		headers + "\n" + signedNames + "\n" + r.Header.Get("X-Acs-Content-Sha256")))
	mac := hmac.New(sha256.New, []byte(c.AccessKeySecret))
	mac.Write([]byte(algorithm + "\n" + hex.EncodeToString(canonical[:])))
	return algorithm + " Credential=" + c.AccessKeyID + ",SignedHeaders=" + signedNames + ",Signature=" + hex.EncodeToString(mac.Sum(nil))
}
