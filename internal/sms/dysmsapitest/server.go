// Package dysmsapitest is a fake of Aliyun's gateways for SMS for tests: of the product SMS
// (dysmsapi) and of PNVS (dypnsapi). It checks every request as Aliyun does, has Aliyun's limits,
// fails as real networks fail, and records the messages that it accepted.
package dysmsapitest

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// Accepted is one SMS that was sent.
type Accepted struct {
	PhoneNumber  string // as on the wire
	SignName     string
	TemplateCode string
	Code         string
	Minutes      string // lifetime of the code; only of PNVS
	BizID        string
	At           time.Time
	receipt      Receipt
}

// Issued are credentials that the gateways accept until they expire.
type Issued struct {
	AccessKeySecret string
	SecurityToken   string    // "" for an access key
	Expires         time.Time // zero for never
}

// A Server listens on a loopback address for each product until its test ends. Its client may be
// another process. It is also an http.Handler of the product SMS, for another listener.
type Server struct {
	URL             string
	PNVSURL         string
	AccessKeyID     string
	AccessKeySecret string

	mu          sync.Mutex
	now         func() time.Time
	skew        time.Duration // of the gateways' clock
	limited     bool
	issuer      func(accessKeyID string) (Issued, bool)
	variable    string   // of the code in a template of the product SMS
	signNames   []string // nil: any
	templates   []string // nil: any
	next        []Fault
	always      Fault
	signed      map[string]Fault
	arrived     func(Accepted)
	receiptOf   func(Accepted) Receipt
	queryFault  Fault
	unsent      func(phoneNumber, signName, code string)
	nonces      map[string]bool
	accepted    []Accepted
	requestIDs  []string
	requests    int
	queries     int
	connections int
	sent        int64
}

// New starts a Server that accepts any well-formed message and has no limits.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{
		AccessKeyID:     "LTAI5tTestAccessKeyID",
		AccessKeySecret: "TestAccessKeySecret0123456789",
		now:             time.Now,
		variable:        "code",
		nonces:          map[string]bool{},
		always:          healthy(),
		signed:          map[string]Fault{},
		arrived:         func(Accepted) {},
		receiptOf:       func(Accepted) Receipt { return Receipt{} },
		queryFault:      healthy(),
		unsent:          func(_, _, _ string) {},
	}
	s.issuer = func(accessKeyID string) (Issued, bool) {
		return Issued{AccessKeySecret: s.AccessKeySecret}, accessKeyID == s.AccessKeyID
	}
	s.URL = s.listen(t, s)
	s.PNVSURL = s.listen(t, s.PNVS())
	return s
}

// listen serves handler on a loopback address until the test ends, and returns its URL.
func (s *Server) listen(t testing.TB, handler http.Handler) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go server.Serve(countingListener{listener, s})
	t.Cleanup(func() { server.Close() })
	return "http://" + listener.Addr().String()
}

// PNVS returns the handler of the product PNVS, for another listener.
func (s *Server) PNVS() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.serve(w, r, pnvs) })
}

// SetIssuer makes the gateways accept the credentials that issuer returns, in place of the access
// key.
func (s *Server) SetIssuer(issuer func(accessKeyID string) (Issued, bool)) {
	s.set(func() { s.issuer = issuer })
}

// AllowSign makes the server reject every other sign name.
func (s *Server) AllowSign(names ...string) { s.set(func() { s.signNames = names }) }

// AllowTemplate makes the server reject every other template code.
func (s *Server) AllowTemplate(codes ...string) { s.set(func() { s.templates = codes }) }

// SetVariable sets the name of the variable in the templates of the product SMS.
func (s *Server) SetVariable(name string) { s.set(func() { s.variable = name }) }

// Limits turns on the limits of mainland numbers: for each sign name and number one SMS a minute,
// five an hour, ten a day, rolling. PNVS has the first and the last, in its own words.
func (s *Server) Limits(on bool) { s.set(func() { s.limited = on }) }

// SetClock sets the clock of the limits and of Accepted.At. The date of a request is not compared
// with it.
func (s *Server) SetClock(now func() time.Time) { s.set(func() { s.now = now }) }

// SetSkew sets the clock of the gateways ahead of this machine's. They compare the date of a request
// with it, and reply with its time.
func (s *Server) SetSkew(d time.Duration) { s.set(func() { s.skew = d }) }

// Next gives each of the next requests one fault. The requests after them get that of Always.
func (s *Server) Next(faults ...Fault) { s.set(func() { s.next = append(s.next, faults...) }) }

// Always gives every request this fault.
func (s *Server) Always(f Fault) { s.set(func() { s.always = f }) }

// For gives the next well-formed request with this sign name a fault. It takes precedence over
// Next and Always. A fault that applies before the request is read cannot depend on its name.
func (s *Server) For(signName string, f Fault) { s.set(func() { s.signed[signName] = f }) }

// OnAccepted calls f with every sent message, before the reply is written: an SMS may arrive
// before the sender gets the reply.
func (s *Server) OnAccepted(f func(Accepted)) { s.set(func() { s.arrived = f }) }

// OnUnsent calls f with every message that was requested and not sent, before the reply is
// written.
func (s *Server) OnUnsent(f func(phoneNumber, signName, code string)) {
	s.set(func() { s.unsent = f })
}

// Accepted returns the sent messages, oldest first.
func (s *Server) Accepted() (all []Accepted) {
	s.set(func() { all = slices.Clone(s.accepted) })
	return all
}

// LastCode returns the code of the last SMS that was sent to number.
func (s *Server) LastCode(t testing.TB, number string) string {
	t.Helper()
	for _, m := range slices.Backward(s.Accepted()) {
		if m.PhoneNumber == number {
			return m.Code
		}
	}
	t.Fatalf("SMS to %s: got none; want at least one", number)
	return ""
}

// RequestIDs returns the request ids of all replies, oldest first.
func (s *Server) RequestIDs() (all []string) {
	s.set(func() { all = slices.Clone(s.requestIDs) })
	return all
}

// Requests counts the requests that arrived, with all their outcomes.
func (s *Server) Requests() (n int) { s.set(func() { n = s.requests }); return n }

// Connections counts the accepted connections.
func (s *Server) Connections() (n int) { s.set(func() { n = s.connections }); return n }

// BytesSent counts the bytes written to all connections.
func (s *Server) BytesSent() (n int64) { s.set(func() { n = s.sent }); return n }

func (s *Server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// due returns the fault of the next request.
func (s *Server) due() Fault {
	if len(s.next) > 0 {
		return s.next[0]
	}
	return s.always
}

// take counts a request, and removes and returns its fault.
func (s *Server) take() Fault {
	fault := s.due()
	s.next = s.next[min(1, len(s.next)):]
	s.requests++
	return fault
}

// ServeHTTP checks every request as the gateway does, with any fault, so that no test passes
// with a request that Aliyun would reject.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.serve(w, r, sms)
}

// A product is the value of the header X-Acs-Action for its sends.
type product string

const (
	sms  product = "SendSms"
	pnvs product = "SendSmsVerifyCode"
)

func productOf(m Accepted) product {
	if pnvsTemplate.MatchString(m.TemplateCode) {
		return pnvs
	}
	return sms
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, p product) {
	s.set(func() { w.Header().Set("Date", time.Now().Add(s.skew).UTC().Format(http.TimeFormat)) })
	if r.Header.Get("X-Acs-Action") == queryAction {
		s.query(w, r, p)
		return
	}
	submit := map[product]func(url.Values) reply{sms: s.submit, pnvs: s.submitPNVS}[p]
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20)) // a truncated body fails the hash check
	s.mu.Lock()
	fault := s.take()
	params, a := s.checkGateway(r, body, string(p))
	rejected := a.Code != ""
	if f, ok := s.signed[params.Get("SignName")]; ok && !rejected {
		fault = f
		delete(s.signed, params.Get("SignName"))
	}
	accepted := len(s.accepted)
	switch {
	case rejected:
	case fault.accepts:
		a = submit(params)
	default:
		a = reply{Status: 500, Code: "isp.SYSTEM_ERROR"}
	}
	a.RequestID = newRequestID()
	s.requestIDs = append(s.requestIDs, a.RequestID)
	arrived, unsent, messages := s.arrived, s.unsent, s.accepted[accepted:]
	s.mu.Unlock()
	for _, m := range messages {
		arrived(m)
	}
	if len(messages) == 0 {
		var variables struct{ Code string }
		json.Unmarshal([]byte(params.Get("TemplateParam")), &variables)
		unsent(params.Get(map[product]string{sms: "PhoneNumbers", pnvs: "PhoneNumber"}[p]), params.Get("SignName"), variables.Code)
	}
	if rejected {
		a.write(w)
		return
	}
	fault.act(w, r, a)
}

func newRequestID() string {
	return fmt.Sprintf("%08X-%04X-4%03X-8%03X-%012X", rand.Uint32(), rand.N(1<<16), rand.N(1<<12), rand.N(1<<12), rand.Uint64()>>16)
}

// A reply is the reply of the gateway (4xx, 5xx) or of a product.
type reply struct {
	Status    int `json:"-"`
	Code      string
	Message   string
	RequestID string `json:"RequestId"`
	BizID     string `json:"BizId,omitempty"` // of the product SMS
	Model     any    `json:",omitempty"`      // of PNVS
	Success   *bool  `json:",omitempty"`
	// Of a query.
	Details    *details `json:"SmsSendDetailDTOs,omitempty"` // of the product SMS
	TotalCount any      `json:",omitempty"`                  // a string of the product SMS, a number of PNVS
}

type model struct {
	BizID string `json:"BizId"`
}

func (a reply) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json;charset=utf-8")
	w.WriteHeader(a.Status)
	w.Write(a.body())
}

func (a reply) body() []byte {
	b, _ := json.Marshal(a)
	return b
}

// isv returns a rejection by the SMS service, which has HTTP status 200.
func isv(code, message string) reply {
	return reply{Status: http.StatusOK, Code: "isv." + code, Message: message}
}

var (
	mainland     = regexp.MustCompile(`^(?:\+|\+?86|0086)?(1[3-9][0-9]{9})$`)
	abroad       = regexp.MustCompile(`^(?:00)?[1-9][0-9]{6,14}$`)
	mainlandOnly = regexp.MustCompile(`^1[3-9][0-9]{9}$`)
	templateCode = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)
	pnvsTemplate = regexp.MustCompile(`^[0-9]{6}$`)
	verification = regexp.MustCompile(`^[0-9A-Za-z]{4,6}$`)
)

// submit is the product SMS behind the gateway. Aliyun accepts up to 1,000 numbers, separated by
// commas. The fake accepts one: a verification code has one recipient.
func (s *Server) submit(params url.Values) reply {
	names := []string{"PhoneNumbers", "SignName", "TemplateCode", "TemplateParam"}
	for _, name := range names {
		if params.Get(name) == "" {
			return reply{Status: 400, Code: "Missing" + name, Message: name + " is mandatory for this action."}
		}
	}
	var variables map[string]any
	err := json.Unmarshal([]byte(params.Get("TemplateParam")), &variables)
	code, isString := variables[s.variable].(string)
	m := s.message(params, "PhoneNumbers", code)
	switch {
	case len(params) > len(names) || len(slices.Concat(slices.Collect(maps.Values(params))...)) > len(names):
		return isv("INVALID_PARAMETERS", "参数异常")
	case strings.Contains(m.PhoneNumber, ","):
		return isv("MOBILE_COUNT_OVER_LIMIT", "手机号码数量超过限制")
	case !mainland.MatchString(m.PhoneNumber) && !abroad.MatchString(m.PhoneNumber):
		return isv("MOBILE_NUMBER_ILLEGAL", "非法手机号")
	case !utf8.ValidString(m.SignName) || s.signNames != nil && !slices.Contains(s.signNames, m.SignName):
		return isv("SMS_SIGNATURE_ILLEGAL", "短信签名不合法")
	case !templateCode.MatchString(m.TemplateCode) || s.templates != nil && !slices.Contains(s.templates, m.TemplateCode):
		return isv("SMS_TEMPLATE_ILLEGAL", "短信模板不合法")
	case err != nil:
		return isv("INVALID_JSON_PARAM", "JSON参数不合法，只接受字符串值")
	case variables[s.variable] == nil:
		return isv("TEMPLATE_MISSING_PARAMETERS", "模板缺少变量")
	case len(variables) != 1 || !isString || !verification.MatchString(code):
		return isv("TEMPLATE_PARAMS_ILLEGAL", "模板变量里包含非法关键字")
	}
	if s.limited {
		if text := s.overLimit(m); text != "" {
			return isv("BUSINESS_LIMIT_CONTROL", text)
		}
	}
	s.accepted = append(s.accepted, m)
	return reply{Status: http.StatusOK, Code: "OK", Message: "OK", BizID: m.BizID}
}

// message returns the message of a request.
func (s *Server) message(params url.Values, number, code string) Accepted {
	m := Accepted{
		PhoneNumber: params.Get(number), SignName: params.Get("SignName"), TemplateCode: params.Get("TemplateCode"), Code: code,
		BizID: fmt.Sprintf("%018d^0", rand.N(int64(1e18))), At: s.now(),
	}
	m.receipt = s.receiptOf(m)
	return m
}

// submitPNVS is the product PNVS behind the gateway. It accepts only a code of the client, with its
// lifetime in whole minutes: with ##code## Aliyun would make the code itself. It accepts only AutoRetry=0:
// by default Aliyun may send an SMS twice.
func (s *Server) submitPNVS(params url.Values) reply {
	names := []string{"PhoneNumber", "SignName", "TemplateCode", "TemplateParam", "AutoRetry"}
	for _, name := range names[:4] {
		if params.Get(name) == "" {
			return reply{Status: 400, Code: "Missing" + name, Message: name + " is mandatory for this action."}
		}
	}
	bad := func(code, message string) reply {
		return reply{Status: 400, Code: code, Message: message, Success: new(bool)}
	}
	var variables map[string]any
	err := json.Unmarshal([]byte(params.Get("TemplateParam")), &variables)
	code, _ := variables["code"].(string)
	m := s.message(params, "PhoneNumber", code)
	m.Minutes, _ = variables["min"].(string)
	minutes, notANumber := strconv.Atoi(m.Minutes)
	switch {
	case len(params) > len(names) || len(slices.Concat(slices.Collect(maps.Values(params))...)) > len(names) ||
		params.Get("AutoRetry") != "0":
		return bad("isv.INVALID_PARAMETERS", "参数异常")
	case !mainlandOnly.MatchString(m.PhoneNumber):
		return bad("isv.MOBILE_NUMBER_ILLEGAL", "非法手机号")
	case !utf8.ValidString(m.SignName) || s.signNames != nil && !slices.Contains(s.signNames, m.SignName):
		return bad("isv.SMS_SIGNATURE_ILLEGAL", "短信签名不合法")
	case !pnvsTemplate.MatchString(m.TemplateCode) || s.templates != nil && !slices.Contains(s.templates, m.TemplateCode):
		return bad("DataNotFound", "The template does not exist.")
	case err != nil || len(variables) != 2 || !verification.MatchString(code) ||
		notANumber != nil || minutes < 1 || strconv.Itoa(minutes) != m.Minutes:
		return bad("isv.TEMPLATE_PARAMS_ILLEGAL", "模板变量里包含非法关键字")
	}
	if s.limited {
		switch text := s.overLimit(m); {
		case strings.Contains(text, "分钟级"):
			return bad("FREQUENCY_FAIL", "Check frequency fail.")
		case strings.Contains(text, "天级"):
			return bad("BUSINESS_LIMIT_CONTROL", "The number has exceeded the limit for the day.")
		}
	}
	s.accepted = append(s.accepted, m)
	success := true
	return reply{Status: http.StatusOK, Code: "OK", Message: "成功", Success: &success, Model: model{BizID: m.BizID}}
}

// overLimit returns the text of the first limit that m exceeds, or "".
func (s *Server) overLimit(m Accepted) string {
	number := mainland.FindStringSubmatch(m.PhoneNumber)
	if number == nil {
		return "" // no limits abroad
	}
	for _, tier := range []struct {
		window time.Duration
		name   string
		max    int
	}{{time.Minute, "分钟级", 1}, {time.Hour, "小时级", 5}, {24 * time.Hour, "天级", 10}} {
		count := 0
		for _, earlier := range s.accepted {
			same := mainland.FindStringSubmatch(earlier.PhoneNumber)
			if same != nil && same[1] == number[1] && earlier.SignName == m.SignName && m.At.Sub(earlier.At) < tier.window {
				count++
			}
		}
		if count >= tier.max {
			return fmt.Sprintf("触发%s流控Permits:%d", tier.name, tier.max)
		}
	}
	return ""
}
