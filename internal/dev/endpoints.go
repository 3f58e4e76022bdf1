package dev

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// route is an endpoint for tests and for the page. page/openapi.json describes it.
type route struct {
	method, path string
	parameters   []string // of the query
	handler      handler
}

type handler func(*service, http.ResponseWriter, *http.Request, query)

var routes = []route{
	{"GET", "/inbox.json", []string{"phone_number", "wait"}, (*service).getInbox},
	{"DELETE", "/inbox.json", []string{"phone_number"}, forNumber((*Inbox).delete)},
	{"GET", "/inbox/events", nil, (*service).getEvents},
	{"GET", "/failures.json", nil, (*service).getFailures},
	{"PUT", "/failures.json", nil, (*service).putFailure},
	{"DELETE", "/failures.json", []string{"phone_number"}, forNumber((*Inbox).clearFailure)},
	{"GET", numberPath, []string{"phone_number"}, (*service).getNumber},
}

const numberPath = "/number.json"

// registerRoutes adds the routes to mux. Requests that wait end when draining is done.
func (d *service) registerRoutes(draining context.Context, mux *http.ServeMux) {
	for _, e := range routes {
		mux.HandleFunc(e.method+" "+e.path, func(w http.ResponseWriter, r *http.Request) {
			if server.IsCrossSite(r) { // it could frame or time the response
				http.Error(w, "web pages of other origins are refused", http.StatusForbidden)
				return
			}
			q, err := d.parseQuery(r.URL.RawQuery, e.parameters)
			if err != nil && e.path != numberPath { // getNumber reads the query itself
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			ctx, cancel := context.WithCancel(r.Context())
			defer cancel()
			defer context.AfterFunc(draining, cancel)()
			e.handler(d, w, r.WithContext(ctx), q)
		})
	}
}

// The development page, and the OpenAPI description of all HTTP endpoints.
//
//go:embed page
var pageFiles embed.FS

// pagePolicy lets the page load only its own files and run no inline script, and forbids
// other pages to embed it.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// registerPage adds the page's files. It sets fixed content types: the MIME table of the
// machine may differ, and browsers run a module only with a JavaScript type.
func registerPage(mux *http.ServeMux) {
	for path, f := range map[string]struct{ name, contentType string }{
		"/{$}":          {"index.html", "text/html; charset=utf-8"},
		"/page.css":     {"page.css", "text/css; charset=utf-8"},
		"/page.js":      {"page.js", "text/javascript; charset=utf-8"},
		"/words.js":     {"words.js", "text/javascript; charset=utf-8"},
		"/openapi.json": {"openapi.json", "application/json"},
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

// query is the parsed query of a request.
type query struct {
	number verify.Number // "" for all numbers
	wait   time.Duration
}

const (
	maxWait      = time.Minute
	maxBodyBytes = 4 << 10
)

// parseQuery parses the query of a request to a route with these parameters.
func (d *service) parseQuery(raw string, parameters []string) (q query, err error) {
	given, err := url.ParseQuery(raw)
	if err != nil { // or a malformed phone_number would mean all
		return q, errors.New("the query cannot be read: escape what is in it")
	}
	for name, values := range given {
		value := values[0]
		switch {
		case len(parameters) == 0:
			return q, errors.New("there are no parameters")
		case !slices.Contains(parameters, name):
			return q, fmt.Errorf("the only parameters are %s", strings.Join(parameters, ", "))
		case len(values) > 1:
			return q, fmt.Errorf("%s is given twice", name)
		case value == "":
			return q, fmt.Errorf("%s is empty: give one, or leave it out", name)
		case name == "phone_number":
			n, invalid := d.config.Numbers.Parse(withPlus(value))
			if invalid != nil {
				return q, invalid
			}
			q.number = n
		case name == "wait":
			if q.wait, err = time.ParseDuration(value); err != nil || q.wait < 0 || q.wait > maxWait {
				return q, fmt.Errorf("wait must be a duration from 0s to %v, such as 5s", maxWait)
			}
		}
	}
	return q, nil
}

// withPlus restores a leading +, which an unescaped query decodes as a space.
func withPlus(number string) string {
	if rest, ok := strings.CutPrefix(number, " "); ok {
		return "+" + rest
	}
	return number
}

// forNumber returns a handler that calls f with the number of the query, "" for all numbers.
func forNumber(f func(*Inbox, verify.Number)) handler {
	return func(d *service, w http.ResponseWriter, _ *http.Request, q query) {
		f(d.inbox, q.number)
		w.WriteHeader(http.StatusNoContent)
	}
}

func (d *service) getInbox(w http.ResponseWriter, r *http.Request, q query) {
	ctx, cancel := context.WithTimeout(r.Context(), q.wait)
	defer cancel()
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(q.wait + eventWriteTimeout))
	writeJSON(w, d.inbox.awaitMessages(ctx, q.number))
}

func (d *service) getFailures(w http.ResponseWriter, _ *http.Request, _ query) {
	writeJSON(w, d.inbox.Failures())
}

func (d *service) putFailure(w http.ResponseWriter, r *http.Request, _ query) {
	var body struct {
		PhoneNumber *string `json:"phone_number"`
		Kind        string  `json:"kind"`
		Times       *int    `json:"times"`
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	decoder.DisallowUnknownFields()
	if decoder.Decode(&body) != nil || decoder.Decode(&struct{}{}) != io.EOF {
		kinds := strings.Join(FailureKinds(), ", ")
		http.Error(w, "the body must be one JSON object with kind (one of "+kinds+"), and, if wanted, times (a whole number) and phone_number",
			http.StatusBadRequest)
		return
	}
	failure := Failure{Kind: body.Kind}
	if body.Times != nil {
		failure.Times = cmp.Or(*body.Times, -1) // 0 sends is invalid
	}
	if body.PhoneNumber != nil {
		n, invalid := d.config.Numbers.Parse(*body.PhoneNumber)
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
func (d *service) getNumber(w http.ResponseWriter, r *http.Request, _ query) {
	given := r.URL.Query()
	raw := given["phone_number"]
	if len(raw) != 1 || len(given) != 1 {
		http.Error(w, "the only parameter, phone_number, is required", http.StatusBadRequest)
		return
	}
	n, invalid := d.config.Numbers.Parse(withPlus(raw[0]))
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

// getEvents streams the inbox to the page as server-sent events: first everything, then the
// changes. A slow browser gets fewer and larger events.
func (d *service) getEvents(w http.ResponseWriter, r *http.Request, _ query) {
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
	rules := d.config.Verifier.Rules
	io.WriteString(w, "retry: 1000\n")
	if !send("settings", map[string]any{
		"version": d.config.Version, "started": d.started, "now": d.config.Verifier.Now(),
		"attempt_limit": rules.AttemptLimit, "code_ttl_seconds": rules.CodeTTL.Seconds(),
	}) {
		return
	}
	for revision := int64(-1); ; {
		update, changed := d.inbox.since(revision)
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
		case <-r.Context().Done():
			return
		}
	}
}
