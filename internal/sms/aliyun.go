// Package sms implements verify.Sender with Aliyun SMS: requests, signatures, proxies, and the
// meaning of Aliyun's codes. It is a package because only this code knows Aliyun's API.
package sms

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// DefaultAliyunEndpoint is Aliyun's public SMS gateway.
const DefaultAliyunEndpoint = "https://dysmsapi.aliyuncs.com"

// AliyunConfig configures NewAliyun.
type AliyunConfig struct {
	AccessKeyID     string
	AccessKeySecret string
	Endpoint        string // see ParseAliyunEndpoint; "" is DefaultAliyunEndpoint
}

// Aliyun sends SMS with Aliyun's API SendSms. The URLs of its requests contain the phone number
// and the code, and Aliyun's error texts quote them. So its errors contain only fixed texts and
// validated tokens, never the text of another error.
type Aliyun struct {
	key         atomic.Pointer[accessKey]
	endpoint    *url.URL
	transport   *http.Transport
	rejections  recentIDs // a repeated rejection belongs to another send
	certificate *prometheus.GaugeVec
}

type accessKey struct{ id, secret string }

// CertificateHelp is the help text of the metric, which the port's certificate shares.
const CertificateHelp = "When the certificate ends, as last seen."

const maxReplyBytes = 64 << 10

// keyShape rejects spaces and line breaks, which would end up in a header.
var keyShape = regexp.MustCompile(`^[!-~]+$`)

// NewAliyun returns a Sender with its own connection pool. It reports all configuration errors
// at once, and quotes no values.
func NewAliyun(c AliyunConfig) (*Aliyun, error) {
	a := &Aliyun{certificate: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "phonenumber_certificate_expiry_timestamp_seconds", Help: CertificateHelp,
		ConstLabels: prometheus.Labels{"certificate": "aliyun"},
	}, nil)}
	keyErr := a.ReplaceAccessKey(c.AccessKeyID, c.AccessKeySecret)
	endpoint, err := ParseAliyunEndpoint(cmp.Or(c.Endpoint, DefaultAliyunEndpoint))
	var proxy *url.URL
	if err == nil {
		proxy, err = proxyFor(endpoint)
	}
	if err := errors.Join(keyErr, err); err != nil {
		return nil, err
	}
	// Over HTTP/2, net/http retries a request after REFUSED_STREAM or GOAWAY. Over HTTP/1.1,
	// it retries a POST only if no byte of it was written.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	a.endpoint = endpoint
	a.transport = &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &gatewayConn{Conn: conn}, nil
		},
		TLSHandshakeTimeout: 3 * time.Second,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, VerifyConnection: a.recordCertificate},
		Protocols:           protocols,
		MaxIdleConns:        256,
		MaxIdleConnsPerHost: 256,
		// A request on a connection that the gateway has just closed has an unknown outcome.
		// So dial again instead of reusing an old connection.
		IdleConnTimeout:        15 * time.Second,
		MaxResponseHeaderBytes: maxReplyBytes,
	}
	if proxy != nil {
		a.transport.Proxy = http.ProxyURL(proxy)
		a.transport.OnProxyConnectResponse = refusedByProxy
	}
	return a, nil
}

// ReplaceAccessKey sets the access key that signs later requests. It reports all errors at
// once, and quotes no values.
func (a *Aliyun) ReplaceAccessKey(keyID, keySecret string) error {
	err := CheckAccessKey(keyID, keySecret)
	if err == nil {
		a.key.Store(&accessKey{keyID, keySecret})
	}
	return err
}

// CheckAccessKey validates the form of an access key. It reports all errors at once, and quotes
// no values.
func CheckAccessKey(keyID, keySecret string) error {
	check := func(name, value string) error {
		if keyShape.MatchString(value) {
			return nil
		}
		return errors.New("the Aliyun access key " + name + " must be printable ASCII without spaces")
	}
	return errors.Join(check("ID", keyID), check("secret", keySecret))
}

// Collectors returns the sender's metrics.
func (a *Aliyun) Collectors() []prometheus.Collector { return []prometheus.Collector{a.certificate} }

func (a *Aliyun) recordCertificate(c tls.ConnectionState) error {
	if len(c.PeerCertificates) > 0 {
		a.certificate.WithLabelValues().Set(float64(c.PeerCertificates[0].NotAfter.Unix()))
	}
	return nil
}

// ParseAliyunEndpoint parses the address of the SMS gateway. It accepts http only for a loopback
// address, because it would send codes unencrypted.
func ParseAliyunEndpoint(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || strings.HasSuffix(u.Host, ":") || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" ||
		u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
		return nil, errors.New("the Aliyun endpoint must be https://HOST or https://HOST:PORT with no user, path or query, for example " +
			DefaultAliyunEndpoint + " (http:// only for a loopback address, for example http://127.0.0.1:8080)")
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host, Path: "/"}, nil
}

func isLoopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// Send sends one request to Aliyun and never retries. Only ctx limits its time. Its errors are
// *verify.SendError.
func (a *Aliyun) Send(ctx context.Context, m verify.Message) (verify.Receipt, error) {
	var x exchange
	ctx = httptrace.WithClientTrace(ctx, x.hooks())
	// Use RoundTrip, not Client.Do: it does not follow redirects, which would send number and
	// code to another host and could be a second send.
	response, err := a.transport.RoundTrip(a.NewRequest(ctx, m, time.Now(), rand.Text()))
	if err != nil && !x.written.Load() {
		return verify.Receipt{}, &verify.SendError{Kind: verify.SendNotAttempted, Detail: a.dialErrorDetail(ctx, err)}
	}
	if err != nil {
		return verify.Receipt{}, LostReply(ctx, 0)
	}
	defer response.Body.Close()
	unknown := &verify.SendError{Kind: verify.SendUnknown, HTTPStatus: response.StatusCode}
	if response.StatusCode == http.StatusSwitchingProtocols {
		// The body is then the raw connection, and reading it has no deadline.
		unknown.Detail = "protocol switched instead of a reply"
		return verify.Receipt{}, unknown
	}
	if x.early.Load() {
		x.conn.Load().Close()
		unknown.Detail = "reply was there before its request was written"
		return verify.Receipt{}, unknown
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxReplyBytes+1))
	if err != nil {
		return verify.Receipt{}, LostReply(ctx, response.StatusCode)
	}
	receipt, err := ReadReply(m, response.StatusCode, body)
	var rejection *verify.SendError
	if errors.As(err, &rejection) && rejection.Kind.NotSent() && a.rejections.again(rejection.RequestID) {
		x.conn.Load().Close()
		unknown.RequestID, unknown.Detail = rejection.RequestID, "rejection of an earlier request, by its RequestId"
		return verify.Receipt{}, unknown
	}
	return receipt, err
}

// LostReply returns the *verify.SendError for a request that was written and got no whole reply.
func LostReply(ctx context.Context, status int) error {
	if ctx.Err() != nil {
		return &verify.SendError{Kind: verify.SendTimedOut, HTTPStatus: status, Detail: "time was up before the whole reply was there"}
	}
	return &verify.SendError{Kind: verify.SendUnknown, HTTPStatus: status, Detail: "connection lost after the request was written"}
}

// dialErrorDetail returns a fixed text for why no byte of a request was written, and whether
// the proxy failed.
func (a *Aliyun) dialErrorDetail(ctx context.Context, err error) string {
	cause := connectFailure(ctx, err)
	var (
		step    *net.OpError
		refused *proxyRefusal
	)
	switch {
	case errors.As(err, &refused) || errors.As(err, &step) && (step.Op == "proxyconnect" || strings.HasPrefix(step.Op, "socks")):
		return "proxy: " + cause
	case a.transport.Proxy != nil:
		return cause + ", through the proxy"
	}
	return cause
}

func connectFailure(ctx context.Context, err error) string {
	var (
		timeout     net.Error
		resolution  *net.DNSError
		certificate *tls.CertificateVerificationError
		refused     *proxyRefusal
	)
	switch {
	case ctx.Err() != nil:
		return "time was up before the request was written"
	case errors.As(err, &refused):
		return refused.Error()
	case errors.As(err, &resolution):
		return "host name not resolved"
	case errors.As(err, &certificate):
		return "server certificate not trusted"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "connecting took too long"
	}
	return "no connection"
}

// NewRequest returns the signed request for one SMS as sent at now. The nonce must be unique.
// Only Send uses it in production; it is exported so that test/aliyunsdk can compare it with
// the official SDK.
func (a *Aliyun) NewRequest(ctx context.Context, m verify.Message, now time.Time, nonce string) *http.Request {
	u := *a.endpoint
	u.RawQuery = "PhoneNumbers=" + aliyunNumber(m.Number) +
		"&SignName=" + url.QueryEscape(m.SignName) +
		"&TemplateCode=" + url.QueryEscape(m.TemplateCode) +
		"&TemplateParam=" + url.QueryEscape(`{"code":"`+m.Code+`"}`)
	r := (&http.Request{Method: http.MethodPost, URL: &u, Host: u.Host, Header: http.Header{
		"Accept":                     {"application/json"},
		"User-Agent":                 {"phone-number-service"},
		"X-Acs-Action":               {"SendSms"},
		"X-Acs-Version":              {"2017-05-25"},
		"X-Acs-Credentials-Provider": {"static_ak"},
		"X-Acs-Content-Sha256":       {emptyBodySHA256},
		"X-Acs-Date":                 {now.UTC().Format("2006-01-02T15:04:05Z")},
		"X-Acs-Signature-Nonce":      {nonce},
	}}).WithContext(ctx)
	key := a.key.Load()
	r.Header["Authorization"] = []string{authorization(r, key.id, key.secret)}
	return r
}

const emptyBodySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// authorization signs r with Aliyun's signature version 3. It covers the path "/", the host, all
// X-Acs headers, and the query as escaped by url.QueryEscape.
func authorization(r *http.Request, keyID, keySecret string) string {
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
	mac := hmac.New(sha256.New, []byte(keySecret))
	mac.Write([]byte(algorithm + "\n" + hex.EncodeToString(canonical[:])))
	return algorithm + " Credential=" + keyID + ",SignedHeaders=" + signedNames + ",Signature=" + hex.EncodeToString(mac.Sum(nil))
}

// aliyunNumber returns n in Aliyun's form: eleven digits in mainland China, country code and
// number elsewhere.
func aliyunNumber(n verify.Number) string {
	if n.Mainland() {
		return strings.TrimPrefix(string(n), "+86")
	}
	digits := strings.TrimPrefix(string(n), "+")
	if verify.IsMainlandMobile(digits) {
		// Without a prefix, +1 301 234 5678 would be read as a number in mainland China. The
		// older of Aliyun's two forms, with 00 before the country code, is unambiguous.
		return "00" + digits
	}
	return digits
}
