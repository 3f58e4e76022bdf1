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

// route is an endpoint for automated tests or for the page. page/openapi.json describes it.
type route struct {
	method, path string
	parameters   []string // names of the query parameters
	parse        func(_ *service, rawQuery string, parameters []string) (query, error)
	handler      handler
}

type handler func(*service, http.ResponseWriter, *http.Request, query)

var routes = []route{
	{"GET", "/inbox.json", []string{"phone_number", "wait"}, (*service).parseQuery, (*service).getInbox},
	{"DELETE", "/inbox.json", []string{"phone_number"}, (*service).parseQuery, forNumber((*Inbox).delete)},
	{"GET", "/inbox/events", nil, (*service).parseQuery, (*service).getEvents},
	{"GET", "/failures.json", nil, (*service).parseQuery, (*service).getFailures},
	{"PUT", "/failures.json", nil, (*service).parseQuery, (*service).putFailure},
	{"DELETE", "/failures.json", []string{"phone_number"}, (*service).parseQuery, forNumber((*Inbox).clearFailure)},
	{"GET", "/number.json", []string{"phone_number"}, parseTypedNumber, (*service).getNumber},
}

// registerRoutes adds the routes to mux. When stopping is done, requests that wait return.
func (s *service) registerRoutes(stopping context.Context, mux *http.ServeMux) {
	for _, e := range routes {
		mux.HandleFunc(e.method+" "+e.path, func(w http.ResponseWriter, r *http.Request) {
			if server.IsCrossOrigin(r) { // it could embed or time the response
				http.Error(w, "rejected the request, because a web page of another origin sent it", http.StatusForbidden)
				return
			}
			q, err := e.parse(s, r.URL.RawQuery, e.parameters)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			ctx, cancel := context.WithCancel(r.Context())
			defer cancel()
			defer context.AfterFunc(stopping, cancel)()
			e.handler(s, w, r.WithContext(ctx), q)
		})
	}
}

// pageFiles contains the page of dev, and the OpenAPI description of all HTTP endpoints.
//
//go:embed page
var pageFiles embed.FS

// pagePolicy is the Content-Security-Policy. The page can load only its own files, and cannot run
// inline scripts. Other pages cannot embed it.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// registerPage adds the page's files to mux, with fixed content types. The MIME table of the machine
// can have other types, and browsers run a module only if its content type is JavaScript.
func registerPage(mux *http.ServeMux) {
	for path, f := range map[string]struct{ name, contentType string }{
		"/{$}":          {"index.html", "text/html; charset=utf-8"},
		"/page.css":     {"page.css", "text/css; charset=utf-8"},
		"/page.js":      {"page.js", "text/javascript; charset=utf-8"},
		"/snippets.js":  {"snippets.js", "text/javascript; charset=utf-8"},
		"/words.js":     {"words.js", "text/javascript; charset=utf-8"},
		"/openapi.json": {"openapi.json", "application/json"},
	} {
		content, err := pageFiles.ReadFile("page/" + f.name)
		if err != nil {
			panic(err) // the file is not in pageFiles
		}
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			setHeaders(w, f.contentType)
			w.Write(content)
		})
	}
}

// setHeaders sets the content type, and the headers for security and against caching that each
// response of the page and the endpoints has.
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

// query contains the parsed query parameters of a request.
type query struct {
	number verify.Number // "" for all numbers
	typed  string        // the number as typed; only parseTypedNumber sets it
	wait   time.Duration
}

const (
	maxWait      = time.Minute
	maxBodyBytes = 4 << 10
)

// parseQuery parses raw, the query of a request. It returns an error if raw has a name that is not
// in parameters.
func (s *service) parseQuery(raw string, parameters []string) (q query, err error) {
	given, err := url.ParseQuery(raw)
	if err != nil { // without phone_number, all would match
		return q, errors.New("the query cannot be parsed: percent-encode its values")
	}
	for name, values := range given {
		value := values[0]
		switch {
		case len(parameters) == 0:
			return q, errors.New("this request has no parameters")
		case !slices.Contains(parameters, name):
			return q, fmt.Errorf("the only parameters are %s", strings.Join(parameters, ", "))
		case len(values) > 1:
			return q, fmt.Errorf("%s is given more than once", name)
		case value == "":
			return q, fmt.Errorf("%s is empty: give a value, or omit the parameter", name)
		case name == "phone_number":
			n, invalid := s.config.Numbers.Parse(withPlus(value))
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

// parseTypedNumber parses a query whose phone_number can be invalid, because a person still types it.
func parseTypedNumber(_ *service, raw string, _ []string) (query, error) {
	given, _ := url.ParseQuery(raw)
	if typed := given["phone_number"]; len(typed) == 1 && len(given) == 1 {
		return query{typed: withPlus(typed[0])}, nil
	}
	return query{}, errors.New("the only parameter, phone_number, is required")
}

// withPlus replaces a leading space by +. If a client does not escape the + in a query, it is decoded
// as a space.
func withPlus(number string) string {
	if rest, ok := strings.CutPrefix(number, " "); ok {
		return "+" + rest
	}
	return number
}

// forNumber returns a handler that calls f with the phone_number of the query, or with "", which
// means all numbers.
func forNumber(f func(*Inbox, verify.Number)) handler {
	return func(s *service, w http.ResponseWriter, _ *http.Request, q query) {
		f(s.inbox, q.number)
		w.WriteHeader(http.StatusNoContent)
	}
}

func (s *service) getInbox(w http.ResponseWriter, r *http.Request, q query) {
	ctx, cancel := context.WithTimeout(r.Context(), q.wait)
	defer cancel()
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(q.wait + eventWriteTimeout))
	writeJSON(w, s.inbox.awaitMessages(ctx, q.number))
}

func (s *service) getFailures(w http.ResponseWriter, _ *http.Request, _ query) {
	writeJSON(w, s.inbox.Failures())
}

func (s *service) putFailure(w http.ResponseWriter, r *http.Request, _ query) {
	var body struct {
		PhoneNumber *string `json:"phone_number"`
		Kind        string  `json:"kind"`
		Times       *int    `json:"times"`
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	decoder.DisallowUnknownFields()
	if decoder.Decode(&body) != nil || decoder.Decode(&struct{}{}) != io.EOF {
		kinds := strings.Join(FailureKinds(), ", ")
		http.Error(w, "the body must be one JSON object with kind (one of "+kinds+"), and optionally times (a whole number) and phone_number",
			http.StatusBadRequest)
		return
	}
	failure := Failure{Kind: body.Kind}
	if body.Times != nil {
		failure.Times = cmp.Or(*body.Times, -1) // SetFailure rejects -1; 0 means no limit
	}
	if body.PhoneNumber != nil {
		n, invalid := s.config.Numbers.Parse(*body.PhoneNumber)
		if invalid != nil {
			http.Error(w, invalid.Error(), http.StatusBadRequest)
			return
		}
		failure.PhoneNumber = n
	}
	if err := s.inbox.SetFailure(failure); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	writeJSON(w, s.inbox.Failures())
}

// getNumber responds with the parsed phone number, or with the reason why it is invalid. The page
// calls it while a person types a number.
func (s *service) getNumber(w http.ResponseWriter, _ *http.Request, q query) {
	n, invalid := s.config.Numbers.Parse(q.typed)
	if invalid != nil {
		writeJSON(w, map[string]string{"fault": invalid.Want})
		return
	}
	writeJSON(w, map[string]verify.Number{"phone_number": n})
}

const (
	minEventInterval  = 20 * time.Millisecond // joins frequent changes
	keepAliveInterval = 15 * time.Second
	eventWriteTimeout = 10 * time.Second
)

// getEvents sends the inbox to the page as server-sent events: first all messages, then the changes.
// A slow browser gets fewer and larger events.
func (s *service) getEvents(w http.ResponseWriter, r *http.Request, _ query) {
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
	rules := s.config.Verifier.Rules
	io.WriteString(w, "retry: 1000\n")
	if !send("settings", map[string]any{
		"version": s.config.Version, "started": s.started, "now": s.config.Verifier.Now(),
		"attempt_limit": rules.AttemptLimit, "code_ttl_seconds": rules.CodeTTL.Seconds(),
	}) {
		return
	}
	for revision := int64(-1); ; {
		update, changed := s.inbox.since("", revision)
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
