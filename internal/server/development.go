package server

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// The development page, and the OpenAPI description of all HTTP endpoints.
//
//go:embed page
var pageFiles embed.FS

// devService is the service that the dev command runs. It updates the states of codes in the
// inbox, and serves the page and the endpoints for automated tests.
type devService struct {
	*service
	inbox    *sms.Inbox
	version  string
	started  time.Time
	shutdown context.Context // its end ends waiting requests

	// syncMu is held from reading the store to updating the inbox, so that updates are in order.
	syncMu sync.Mutex
}

func (d *devService) SendSMS(ctx context.Context, r *pb.SendSMSRequest) (*pb.Empty, error) {
	defer d.syncInbox(ctx, r.GetPhoneNumber(), "")
	return d.service.SendSMS(ctx, r)
}

func (d *devService) Valid(ctx context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
	res, err := d.service.Valid(ctx, r)
	used := ""
	if res.GetValid() {
		used = r.GetCode()
	}
	d.syncInbox(ctx, r.GetPhoneNumber(), used)
	return res, err
}

// syncInbox reads the state of a number from the store into the inbox. It continues after
// the caller disconnects. used is the code that Valid has just accepted, or "".
func (d *devService) syncInbox(ctx context.Context, phoneNumber, used string) {
	n, invalid := d.numbers.Parse(phoneNumber)
	if invalid != nil {
		return
	}
	d.syncMu.Lock()
	defer d.syncMu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	seen, err := d.verifier.Inspect(ctx, n)
	if err != nil {
		d.verifier.Log.Warn("the page may show an old state", "number", n.Masked(), "error", err)
		return
	}
	d.inbox.UpdateStates(n, used, seen)
}

// register adds the endpoints of development; page/openapi.json describes them.
func (d *devService) register(mux *http.ServeMux) {
	registerPage(mux)
	data := func(pattern string, handler http.HandlerFunc) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if isCrossSite(r) { // it could frame or time the response
				http.Error(w, "web pages of other origins are refused", http.StatusForbidden)
				return
			}
			handler(w, r)
		})
	}
	data("GET /inbox.json", d.getInbox)
	data("DELETE /inbox.json", d.forNumber(d.inbox.Delete))
	data("GET /inbox/events", d.events)
	data("GET /failures.json", func(w http.ResponseWriter, r *http.Request) {
		if _, ok := d.query(w, r); ok {
			writeJSON(w, d.inbox.Failures())
		}
	})
	data("PUT /failures.json", d.putFailure)
	data("DELETE /failures.json", d.forNumber(d.inbox.ClearFailure))
	data("GET /number.json", d.getNumber)
}

// Suffixes of names that cannot be registered in public DNS.
var nonPublicSuffix = regexp.MustCompile(`\.(internal|local|localhost|test)$`)

// guardDNSRebinding rejects Host names that can be registered in public DNS. Otherwise an
// attacker's page could rebind its own name to this address and read the inbox as
// same-origin.
func guardDNSRebinding(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = strings.ToLower(strings.TrimSuffix(host, ".")) // a final dot is optional
		public := host == "" || strings.Contains(host, ".") && !nonPublicSuffix.MatchString(host)
		if public && net.ParseIP(host) == nil {
			http.Error(w, "development answers to IP addresses, names without a dot, and names in .internal, .local, .localhost and .test", http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// pagePolicy lets the page load only its own files and run no inline script, and forbids
// other pages to embed it.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// registerPage adds the page's files. It sets fixed content types: the MIME table of the
// machine may differ, and browsers run a module only with a JavaScript type.
func registerPage(mux *http.ServeMux) {
	const (
		html     = "text/html; charset=utf-8"
		css      = "text/css; charset=utf-8"
		script   = "text/javascript; charset=utf-8"
		jsonType = "application/json"
	)
	for path, f := range map[string]struct{ name, contentType string }{
		"/{$}": {"index.html", html}, "/page.css": {"page.css", css}, "/page.js": {"page.js", script},
		"/words.js": {"words.js", script}, "/openapi.json": {"openapi.json", jsonType},
	} {
		content, err := pageFiles.ReadFile("page/" + f.name)
		if err != nil {
			panic(err) // the file is missing in the source
		}
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			setHeaders(w, f.contentType)
			w.Write(content)
		})
	}
}

// setHeaders sets the content type and the security and no-cache headers of every dev
// response.
func setHeaders(w http.ResponseWriter, contentType string) {
	h := w.Header()
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cache-Control", "no-store")
}

func writeJSON(w http.ResponseWriter, v any) {
	setHeaders(w, "application/json")
	json.NewEncoder(w).Encode(v)
}

// parameters are the query parameters of the development endpoints.
type parameters struct {
	number verify.Number // "" for all numbers
	wait   time.Duration
}

const (
	maxWait      = time.Minute
	maxBodyBytes = 4 << 10
)

// query reads the parameters that an endpoint takes. If they are invalid it writes the error
// and returns false.
func (d *devService) query(w http.ResponseWriter, r *http.Request, takes ...string) (parameters, bool) {
	var p parameters
	badRequest := func(format string, args ...any) (parameters, bool) {
		http.Error(w, fmt.Sprintf(format, args...), http.StatusBadRequest)
		return parameters{}, false
	}
	given, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil { // or a malformed phone_number would mean all
		return badRequest("the query cannot be read: escape what is in it")
	}
	for name, values := range given {
		value := values[0]
		switch {
		case !slices.Contains(takes, name):
			if len(takes) == 0 {
				return badRequest("there are no parameters")
			}
			return badRequest("the only parameters are %s", strings.Join(takes, ", "))
		case len(values) > 1:
			return badRequest("%s is given twice", name)
		case value == "":
			return badRequest("%s is empty: give one, or leave it out", name)
		case name == "phone_number":
			n, invalid := d.numbers.Parse(withPlus(value))
			if invalid != nil {
				return badRequest("%v", invalid)
			}
			p.number = n
		case name == "wait":
			if p.wait, err = time.ParseDuration(value); err != nil || p.wait < 0 || p.wait > maxWait {
				return badRequest("wait must be a duration from 0s to %v, such as 5s", maxWait)
			}
		}
	}
	return p, true
}

// withPlus restores a leading +, which an unescaped query decodes as a space.
func withPlus(number string) string {
	if rest, ok := strings.CutPrefix(number, " "); ok {
		return "+" + rest
	}
	return number
}

func (d *devService) forNumber(f func(verify.Number)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if q, ok := d.query(w, r, "phone_number"); ok {
			f(q.number)
			w.WriteHeader(http.StatusNoContent)
		}
	}
}

func (d *devService) getInbox(w http.ResponseWriter, r *http.Request) {
	q, ok := d.query(w, r, "phone_number", "wait")
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), q.wait)
	defer cancel()
	defer context.AfterFunc(d.shutdown, cancel)()
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(q.wait + eventWriteTimeout))
	writeJSON(w, d.inbox.AwaitMessages(ctx, q.number))
}

func (d *devService) putFailure(w http.ResponseWriter, r *http.Request) {
	if _, ok := d.query(w, r); !ok {
		return
	}
	var body struct {
		PhoneNumber *string `json:"phone_number"`
		Kind        string  `json:"kind"`
		Times       *int    `json:"times"`
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	decoder.DisallowUnknownFields()
	if decoder.Decode(&body) != nil || decoder.Decode(&struct{}{}) != io.EOF {
		kinds := strings.Join(sms.FailureKinds(), ", ")
		http.Error(w, "the body must be one JSON object with kind (one of "+kinds+"), and, if wanted, times (a whole number) and phone_number",
			http.StatusBadRequest)
		return
	}
	failure := sms.Failure{Kind: body.Kind}
	if body.Times != nil {
		failure.Times = cmp.Or(*body.Times, -1) // 0 sends is invalid
	}
	if body.PhoneNumber != nil {
		n, invalid := d.numbers.Parse(*body.PhoneNumber)
		if invalid != nil {
			http.Error(w, invalid.Error(), http.StatusBadRequest)
			return
		}
		failure.PhoneNumber = n
	}
	if err := d.inbox.SetFailure(failure); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	writeJSON(w, d.inbox.Failures())
}

// getNumber writes how the service parses a number, for the page while a person types it.
func (d *devService) getNumber(w http.ResponseWriter, r *http.Request) {
	given := r.URL.Query()
	raw := given["phone_number"]
	if len(raw) != 1 || len(given) != 1 {
		http.Error(w, "the only parameter, phone_number, is required", http.StatusBadRequest)
		return
	}
	n, invalid := d.numbers.Parse(withPlus(raw[0]))
	if invalid != nil {
		writeJSON(w, map[string]string{"fault": invalid.Want})
		return
	}
	writeJSON(w, map[string]verify.Number{"phone_number": n})
}

const (
	minEventInterval  = 20 * time.Millisecond // combines changes into one event
	keepAliveInterval = 15 * time.Second
	eventWriteTimeout = 10 * time.Second
)

// events streams the inbox to the page as server-sent events: first everything, then the
// changes. A slow browser gets fewer and larger events.
func (d *devService) events(w http.ResponseWriter, r *http.Request) {
	if _, ok := d.query(w, r); !ok {
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(d.shutdown, cancel)()
	setHeaders(w, "text/event-stream")
	c := http.NewResponseController(w)
	write := func(text string) bool {
		c.SetWriteDeadline(time.Now().Add(eventWriteTimeout))
		io.WriteString(w, text)
		return c.Flush() == nil
	}
	send := func(event string, data any) bool {
		text, err := json.Marshal(data)
		return err == nil && write(fmt.Sprintf("event: %s\ndata: %s\n\n", event, text))
	}
	rules := d.verifier.Rules
	io.WriteString(w, "retry: 1000\n")
	if !send("settings", map[string]any{
		"version": d.version, "started": d.started, "now": d.verifier.Now(),
		"attempt_limit": rules.AttemptLimit, "code_ttl_seconds": rules.CodeTTL.Seconds(),
	}) {
		return
	}
	for revision := int64(-1); ; {
		update, changed := d.inbox.Since(revision)
		if update.Revision > revision {
			if !send("inbox", update) {
				return
			}
			revision = update.Revision
		}
		select {
		case <-changed:
			time.Sleep(minEventInterval)
		case <-time.After(keepAliveInterval):
			if !write(": alive\n\n") {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}
