// Package dysmsapitest is a stand-in for Aliyun's SMS gateway, for tests: it
// checks every request as the real one does, keeps the real limits, fails in the
// ways that real networks fail, and remembers exactly what it accepted.
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
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"
)

// Accepted is one SMS that went out.
type Accepted struct {
	PhoneNumber  string // as on the wire
	SignName     string
	TemplateCode string
	Code         string
	BizID        string
	At           time.Time
}

// A Server listens on a loopback address until its test ends; its client may be
// another process. It is an http.Handler too, to be put behind another listener.
type Server struct {
	URL             string
	AccessKeyID     string
	AccessKeySecret string

	mu          sync.Mutex
	now         func() time.Time
	limited     bool
	signNames   []string // nil: any
	templates   []string // nil: any
	next        []Fault
	always      Fault
	signed      map[string]Fault
	arrived     func(Accepted)
	nonces      map[string]bool
	accepted    []Accepted
	requestIDs  []string
	requests    int
	connections int
	sent        int64
}

// New starts a Server that accepts any well-formed message and has no limits.
func New(t testing.TB) *Server {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		URL:             "http://" + listener.Addr().String(),
		AccessKeyID:     "LTAI5tTestAccessKeyID",
		AccessKeySecret: "TestAccessKeySecret0123456789",
		now:             time.Now,
		nonces:          map[string]bool{},
		always:          healthy(),
		signed:          map[string]Fault{},
		arrived:         func(Accepted) {},
	}
	server := &http.Server{Handler: s}
	go server.Serve(countingListener{listener, s})
	t.Cleanup(func() { server.Close() })
	return s
}

// AllowSign refuses every other sign name from now on.
func (s *Server) AllowSign(names ...string) { s.set(func() { s.signNames = names }) }

// AllowTemplate refuses every other template code from now on.
func (s *Server) AllowTemplate(codes ...string) { s.set(func() { s.templates = codes }) }

// Limits turns on the limits of mainland numbers: for each sign name and number
// one SMS a minute, five an hour, ten a day, rolling.
func (s *Server) Limits(on bool) { s.set(func() { s.limited = on }) }

// SetClock sets the clock of the limits and of Accepted.At. The date of a request
// is always compared with the real time.
func (s *Server) SetClock(now func() time.Time) { s.set(func() { s.now = now }) }

// Next gives the coming requests one fault each; after them Always counts again.
func (s *Server) Next(faults ...Fault) { s.set(func() { s.next = append(s.next, faults...) }) }

// Always gives every request this fault.
func (s *Server) Always(f Fault) { s.set(func() { s.always = f }) }

// For gives the next well-formed request with this sign name a fault, whatever
// Next and Always say. A fault that strikes before the request is read cannot wait
// for a name.
func (s *Server) For(signName string, f Fault) { s.set(func() { s.signed[signName] = f }) }

// OnAccepted calls f with every message that goes out, before the answer to it is
// written: as a phone may ring before the sender hears of it.
func (s *Server) OnAccepted(f func(Accepted)) { s.set(func() { s.arrived = f }) }

// Accepted returns the messages that went out, oldest first.
func (s *Server) Accepted() (all []Accepted) {
	s.set(func() { all = slices.Clone(s.accepted) })
	return all
}

// RequestIDs returns the ids of the answers that were made, oldest first.
func (s *Server) RequestIDs() (all []string) {
	s.set(func() { all = slices.Clone(s.requestIDs) })
	return all
}

// Requests counts the requests that arrived, whatever became of them.
func (s *Server) Requests() (n int) { s.set(func() { n = s.requests }); return n }

// Connections counts the connections that were opened.
func (s *Server) Connections() (n int) { s.set(func() { n = s.connections }); return n }

// BytesSent counts what was written to all connections.
func (s *Server) BytesSent() (n int64) { s.set(func() { n = s.sent }); return n }

func (s *Server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// due is the fault of the request that comes next.
func (s *Server) due() Fault {
	if len(s.next) > 0 {
		return s.next[0]
	}
	return s.always
}

// take counts a request and uses up the fault that is due.
func (s *Server) take() Fault {
	fault := s.due()
	s.next = s.next[min(1, len(s.next)):]
	s.requests++
	return fault
}

// ServeHTTP checks the request as the gateway does, whatever fault is due, so
// that no test passes with a request that the real one would refuse.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20)) // one cut short fails its hash
	s.mu.Lock()
	fault := s.take()
	params, a := s.checkGateway(r, body)
	refused := a.Code != ""
	if f, ok := s.signed[params.Get("SignName")]; ok && !refused {
		fault = f
		delete(s.signed, params.Get("SignName"))
	}
	accepted := len(s.accepted)
	switch {
	case refused:
	case fault.accepts:
		a = s.submit(params)
	default:
		a = answer{Status: 500, Code: "isp.SYSTEM_ERROR"}
	}
	a.RequestID = fmt.Sprintf("%08X-%04X-4%03X-8%03X-%012X", rand.Uint32(), rand.N(1<<16), rand.N(1<<12), rand.N(1<<12), rand.Uint64()>>16)
	s.requestIDs = append(s.requestIDs, a.RequestID)
	arrived, messages := s.arrived, s.accepted[accepted:]
	s.mu.Unlock()
	for _, m := range messages {
		arrived(m)
	}
	if refused {
		a.write(w)
		return
	}
	fault.act(w, r, a)
}

// An answer is what the gateway (4xx, 5xx) or the SMS service (200) says.
type answer struct {
	Status    int `json:"-"`
	Code      string
	Message   string
	RequestID string `json:"RequestId"`
	BizID     string `json:"BizId,omitempty"`
}

func (a answer) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json;charset=utf-8")
	w.WriteHeader(a.Status)
	w.Write(a.body())
}

func (a answer) body() []byte {
	b, _ := json.Marshal(a)
	return b
}

// isv is a refusal by the SMS service, which comes with HTTP 200.
func isv(code, message string) answer {
	return answer{Status: http.StatusOK, Code: "isv." + code, Message: message}
}

var (
	mainland     = regexp.MustCompile(`^(?:\+|\+?86|0086)?(1[3-9][0-9]{9})$`)
	abroad       = regexp.MustCompile(`^(?:00)?[1-9][0-9]{6,14}$`)
	templateCode = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)
	verification = regexp.MustCompile(`^[0-9A-Za-z]{4,6}$`)
)

// submit is the SMS service behind the gateway. The real one takes up to 1,000
// numbers with commas between them; a verification code never has two readers.
func (s *Server) submit(params url.Values) answer {
	names := []string{"PhoneNumbers", "SignName", "TemplateCode", "TemplateParam"}
	for _, name := range names {
		if params.Get(name) == "" {
			return answer{Status: 400, Code: "Missing" + name, Message: name + " is mandatory for this action."}
		}
	}
	var variables map[string]any
	err := json.Unmarshal([]byte(params.Get("TemplateParam")), &variables)
	code, isString := variables["code"].(string)
	m := Accepted{
		params.Get("PhoneNumbers"), params.Get("SignName"), params.Get("TemplateCode"), code,
		fmt.Sprintf("%018d^0", rand.N(int64(1e18))), s.now(),
	}
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
	case variables["code"] == nil:
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
	return answer{Status: http.StatusOK, Code: "OK", Message: "OK", BizID: m.BizID}
}

// overLimit returns the text of the first limit that m would go over.
func (s *Server) overLimit(m Accepted) string {
	number := mainland.FindStringSubmatch(m.PhoneNumber)
	if number == nil {
		return "" // abroad nothing limits
	}
	for _, tier := range []struct {
		window time.Duration
		name   string
		most   int
	}{{time.Minute, "分钟级", 1}, {time.Hour, "小时级", 5}, {24 * time.Hour, "天级", 10}} {
		count := 0
		for _, earlier := range s.accepted {
			same := mainland.FindStringSubmatch(earlier.PhoneNumber)
			if same != nil && same[1] == number[1] && earlier.SignName == m.SignName && m.At.Sub(earlier.At) < tier.window {
				count++
			}
		}
		if count >= tier.most {
			return fmt.Sprintf("触发%s流控Permits:%d", tier.name, tier.most)
		}
	}
	return ""
}
