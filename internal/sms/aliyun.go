// Package sms implements verify.Sender with Aliyun's two products for SMS: requests, signatures,
// proxies, and the meaning of Aliyun's codes. It is a package because only this code knows
// Aliyun's APIs.
package sms

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
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

// AliyunConfig configures NewAliyun.
type AliyunConfig struct {
	Credentials  Credentials   // until ReplaceCredentials; the zero value if none are known yet
	Endpoint     string        // of the product SMS, see ParseEndpoint; "" is DefaultEndpoint
	PNVSEndpoint string        // of the product PNVS; "" is DefaultPNVSEndpoint
	Variable     string        // of the code in a template of the product SMS; "" is DefaultVariable
	CodeTTL      time.Duration // an SMS of PNVS contains it
}

// The defaults of AliyunConfig.
const (
	DefaultEndpoint     = "https://dysmsapi.aliyuncs.com"
	DefaultPNVSEndpoint = "https://dypnsapi.aliyuncs.com"
	DefaultVariable     = "code"
)

// Aliyun sends SMS with Aliyun's APIs SendSms and SendSmsVerifyCode. The URLs of its requests
// contain the phone number and the code, and Aliyun's error texts quote them. So its errors contain
// only fixed texts and validated tokens, never the text of another error.
type Aliyun struct {
	// OnExpired is called if Aliyun rejects a send or a query because these credentials have expired.
	// It must not block.
	OnExpired func(Credentials)
	// OnAccepted is called if Aliyun accepts an SMS. It must not block.
	OnAccepted  func(context.Context, verify.Message, verify.Receipt)
	credentials atomic.Pointer[Credentials]
	endpoints   map[Product]*endpoint
	variable    string
	codeTTL     time.Duration
	rejections  recentIDs // a repeated rejection belongs to another send
}

// An endpoint is the gateway of a product, with its own connection pool.
type endpoint struct {
	url         *url.URL
	transport   *http.Transport
	certificate *prometheus.GaugeVec // without a value until a certificate was seen
}

// Credentials sign requests to Aliyun.
type Credentials struct {
	AccessKeyID, AccessKeySecret string
	SecurityToken                string // of temporary credentials; "" for an access key
	Provider                     string // the name that Aliyun's SDK has for their origin; "" for an access key
}

// CertificateHelp is the help text of the metric, which the port's certificate shares.
const CertificateHelp = "When the certificate ends, as last seen."

const maxReplyBytes = 64 << 10

// keyShape rejects spaces and line breaks, which would end up in a header.
var keyShape = regexp.MustCompile(`^[!-~]+$`)

// NewAliyun returns a Sender with its own connection pools. It reports all configuration errors
// at once, and quotes no values.
func NewAliyun(c AliyunConfig) (*Aliyun, error) {
	a := &Aliyun{
		OnExpired:  func(Credentials) {},
		OnAccepted: func(context.Context, verify.Message, verify.Receipt) {},
		endpoints:  map[Product]*endpoint{},
		variable:   cmp.Or(c.Variable, DefaultVariable),
		codeTTL:    c.CodeTTL,
	}
	var errs []error
	if c.Credentials != (Credentials{}) {
		errs = append(errs, a.ReplaceCredentials(c.Credentials))
	}
	add := func(p Product, address, certificate string) {
		u, err := ParseEndpoint(address)
		var transport *http.Transport
		if err == nil {
			transport, err = NewTransport(u)
		}
		if err != nil {
			if !slices.ContainsFunc(errs, func(other error) bool { return other != nil && other.Error() == err.Error() }) {
				errs = append(errs, err)
			}
			return
		}
		dial := transport.DialContext
		transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			return &gatewayConn{Conn: conn}, nil
		}
		expiry := prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "phonenumber_certificate_expiry_timestamp_seconds", Help: CertificateHelp,
			ConstLabels: prometheus.Labels{"certificate": certificate},
		}, nil)
		transport.TLSClientConfig.VerifyConnection = func(c tls.ConnectionState) error {
			if len(c.PeerCertificates) > 0 {
				expiry.WithLabelValues().Set(float64(c.PeerCertificates[0].NotAfter.Unix()))
			}
			return nil
		}
		a.endpoints[p] = &endpoint{u, transport, expiry}
	}
	add(SMS, cmp.Or(c.Endpoint, DefaultEndpoint), "aliyun")
	add(PNVS, cmp.Or(c.PNVSEndpoint, DefaultPNVSEndpoint), "aliyun-pnvs")
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return a, nil
}

// NewTransport returns a transport to one of Aliyun's endpoints, through the proxy that the
// environment sets for it. Its error names the variable of the proxy.
func NewTransport(endpoint *url.URL) (*http.Transport, error) {
	proxy, err := proxyFor(endpoint)
	if err != nil {
		return nil, err
	}
	// Over HTTP/2, net/http retries a request after REFUSED_STREAM or GOAWAY. Over HTTP/1.1,
	// it retries a POST only if no byte of it was written.
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		TLSHandshakeTimeout: 3 * time.Second,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12},
		Protocols:           protocols,
		MaxIdleConns:        256,
		MaxIdleConnsPerHost: 256,
		// A request on a connection that the gateway has just closed has an unknown outcome.
		// So dial again instead of reusing an old connection.
		IdleConnTimeout:        15 * time.Second,
		MaxResponseHeaderBytes: maxReplyBytes,
	}
	if proxy != nil {
		transport.Proxy = http.ProxyURL(proxy)
		transport.OnProxyConnectResponse = refusedByProxy
	}
	return transport, nil
}

// ReplaceCredentials sets the credentials that sign later requests. It reports all errors at once,
// and quotes no values.
func (a *Aliyun) ReplaceCredentials(c Credentials) error {
	err := c.Check()
	if err == nil {
		a.credentials.Store(&c)
	}
	return err
}

// Check validates the form of credentials. It reports all errors at once, and quotes no values.
func (c Credentials) Check() error {
	check := func(name, value string) error {
		if keyShape.MatchString(value) {
			return nil
		}
		return errors.New("the Aliyun " + name + " must be printable ASCII without spaces")
	}
	errs := []error{check("access key ID", c.AccessKeyID), check("access key secret", c.AccessKeySecret)}
	if c.SecurityToken != "" {
		errs = append(errs, check("security token", c.SecurityToken))
	}
	return errors.Join(errs...)
}

// Ready returns an error until there are credentials.
func (a *Aliyun) Ready() error {
	if a.credentials.Load() == nil {
		return errNoCredentials
	}
	return nil
}

var errNoCredentials = errors.New("no Aliyun credentials yet")

// Collectors returns the sender's metrics.
func (a *Aliyun) Collectors() []prometheus.Collector {
	return []prometheus.Collector{a.endpoints[SMS].certificate, a.endpoints[PNVS].certificate}
}

// ParseEndpoint parses the address of one of Aliyun's APIs. It accepts http only for a loopback
// address, because it would send codes unencrypted.
func ParseEndpoint(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || strings.HasSuffix(u.Host, ":") || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" ||
		u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
		return nil, errors.New("the Aliyun endpoint must be https://HOST or https://HOST:PORT with no user, path or query " +
			"(http:// only for a loopback address, for example http://127.0.0.1:8080)")
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host, Path: "/"}, nil
}

func isLoopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// Send sends one request to Aliyun and never retries. Only ctx limits its time. Its errors are
// *verify.SendError.
func (a *Aliyun) Send(ctx context.Context, m verify.Message) (verify.Receipt, error) {
	credentials := a.credentials.Load()
	if credentials == nil {
		return verify.Receipt{}, &verify.SendError{Kind: verify.SendNotAttempted, Detail: errNoCredentials.Error()}
	}
	endpoint := a.endpoints[ProductOf(m.TemplateCode)]
	got, err := endpoint.roundTrip(a.newRequest(ctx, m, *credentials, time.Now(), rand.Text()), maxReplyBytes)
	if err != nil {
		return verify.Receipt{}, err
	}
	receipt, err := ReadReply(m, got.status, got.body)
	var rejection *verify.SendError
	if errors.As(err, &rejection) && rejection.Kind.NotSent() && a.rejections.again(rejection.RequestID) {
		got.conn.Close()
		return verify.Receipt{}, &verify.SendError{
			Kind: verify.SendUnknown, HTTPStatus: got.status, RequestID: rejection.RequestID,
			Detail: "rejection of an earlier request, by its RequestId",
		}
	}
	if rejection != nil {
		a.reportIfExpired(rejection.ProviderCode, *credentials)
	}
	if err == nil {
		a.OnAccepted(ctx, m, receipt)
	}
	return receipt, err
}

// reportIfExpired calls OnExpired if code, of a reply to a request with c, says that c has expired.
func (a *Aliyun) reportIfExpired(code string, c Credentials) {
	if strings.HasPrefix(code, "InvalidSecurityToken.Expired") {
		a.OnExpired(c)
	}
}

// reply is the reply to a request.
type reply struct {
	status int
	header http.Header
	body   []byte
	conn   *gatewayConn
}

// roundTrip makes one request, and reads at most maxBytes+1 bytes of the reply's body. Its errors are
// *verify.SendError. It uses RoundTrip and not Client.Do, which follows redirects: these would send
// number and code to another host, and could be a second send.
func (e *endpoint) roundTrip(r *http.Request, maxBytes int64) (reply, error) {
	var x exchange
	ctx := httptrace.WithClientTrace(r.Context(), x.hooks())
	response, err := e.transport.RoundTrip(r.WithContext(ctx))
	if err != nil && !x.written.Load() {
		return reply{}, &verify.SendError{Kind: verify.SendNotAttempted, Detail: e.dialErrorDetail(ctx, err)}
	}
	if err != nil {
		return reply{}, LostReply(ctx, 0)
	}
	defer response.Body.Close()
	got := reply{response.StatusCode, response.Header, nil, x.conn.Load()}
	if got.status == http.StatusSwitchingProtocols {
		// The body is then the raw connection, and reading it has no deadline.
		return reply{}, &verify.SendError{Kind: verify.SendUnknown, HTTPStatus: got.status, Detail: "protocol switched instead of a reply"}
	}
	if x.early.Load() {
		got.conn.Close()
		return reply{}, &verify.SendError{
			Kind: verify.SendUnknown, HTTPStatus: got.status, Detail: "reply was there before its request was written",
		}
	}
	got.body, err = io.ReadAll(io.LimitReader(response.Body, maxBytes+1))
	if err != nil {
		return reply{}, LostReply(ctx, got.status)
	}
	return got, nil
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
func (e *endpoint) dialErrorDetail(ctx context.Context, err error) string {
	cause := ConnectFailure(ctx, err)
	var (
		step    *net.OpError
		refused *proxyRefusal
	)
	switch {
	case errors.As(err, &refused) || errors.As(err, &step) && (step.Op == "proxyconnect" || strings.HasPrefix(step.Op, "socks")):
		return "proxy: " + cause
	case e.transport.Proxy != nil:
		return cause + ", through the proxy"
	}
	return cause
}

// ConnectFailure returns a fixed text for an error of a transport that NewTransport returned. The text
// of err itself could contain the URL.
func ConnectFailure(ctx context.Context, err error) string {
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
