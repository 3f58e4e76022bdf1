// Package callers knows who may call: the callers file, how a caller proves who it
// is, and what it may do.
package callers

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// A Caller is one of the callers file. Where a list is nil, all are allowed; a nil
// *Caller may do everything.
type Caller struct {
	Name string // for logs and metrics

	tokens    [][sha256.Size]byte // SHA-256 of its bearer tokens
	spiffeIDs []string
	dnsSANs   []string // lower case

	calls         []string // names of methods
	signNames     []string
	templateCodes []string
	countries     []string // as numberplan.Country has them

	sends *rate.Limiter // nil for no limit of its own
}

// NotAllowedError says what a known caller may not do.
type NotAllowedError struct {
	Caller string
	Denied string // call, signature, template_code or country
}

func (e *NotAllowedError) Error() string {
	return "caller " + e.Caller + " may not use this " + e.Denied
}

// RateError says that a caller's own rate is used up.
type RateError struct {
	Caller     string
	RetryAfter time.Duration
}

func (e *RateError) Error() string { return "caller " + e.Caller + " has used up its rate" }

// AuthorizeCall reports whether the caller may make a call, by its method's name.
func (c *Caller) AuthorizeCall(method string) error {
	if c == nil || allows(c.calls, method) {
		return nil
	}
	return &NotAllowedError{c.Name, "call"}
}

// AuthorizeSend reports whether the caller may send so, and to a country.
func (c *Caller) AuthorizeSend(signName, templateCode, country string) error {
	switch {
	case c == nil:
		return nil
	case !allows(c.signNames, signName):
		return &NotAllowedError{c.Name, "signature"}
	case !allows(c.templateCodes, templateCode):
		return &NotAllowedError{c.Name, "template_code"}
	case !allows(c.countries, country):
		return &NotAllowedError{c.Name, "country"}
	}
	return nil
}

func allows(list []string, value string) bool { return list == nil || slices.Contains(list, value) }

// AllowSend takes one send of the caller's rate, or says when there will be one.
func (c *Caller) AllowSend() error {
	if c == nil || c.sends == nil {
		return nil
	}
	if c.sends.Allow() { // Reserve and Cancel by many at once lend and give twice
		return nil
	}
	wait := time.Duration((1 - c.sends.Tokens()) / float64(c.sends.Limit()) * float64(time.Second))
	return &RateError{c.Name, max(wait, time.Millisecond)}
}

// A Registry is all that may call, and can be replaced at any time.
type Registry struct{ list atomic.Pointer[[]*Caller] }

// Changes are what a new list takes from callers or gives them, by their names.
type Changes struct {
	Removed, Added []string
	Widened        []string // "name field": the field allows what it did not allow before
}

// Replace takes the callers of a file that Parse read. Who is in both, with an equal
// rate, keeps what is used of it. The first list changes nothing.
func (s *Registry) Replace(list []*Caller) (changes Changes) {
	if before := s.list.Load(); before != nil {
		gone := map[string]*Caller{}
		for _, old := range *before {
			gone[old.Name] = old
		}
		for _, c := range list {
			old := gone[c.Name]
			if old == nil {
				changes.Added = append(changes.Added, c.Name)
				continue
			}
			delete(gone, c.Name)
			for _, field := range c.widened(old) {
				changes.Widened = append(changes.Widened, c.Name+" "+field)
			}
			if old.sends != nil && c.sends != nil && old.sends.Limit() == c.sends.Limit() && old.sends.Burst() == c.sends.Burst() {
				c.sends = old.sends
			}
		}
		changes.Removed = slices.Sorted(maps.Keys(gone))
	}
	s.list.Store(&list)
	return changes
}

// Names are those of all callers.
func (s *Registry) Names() (names []string) {
	for _, c := range *s.list.Load() {
		names = append(names, c.Name)
	}
	return names
}

// widened are the fields that allow what they did not allow in old.
func (c *Caller) widened(old *Caller) (fields []string) {
	add := func(field string, wider bool) {
		if wider {
			fields = append(fields, field)
		}
	}
	add("token_sha256", gains(old.tokens, c.tokens))
	add("spiffe_id", gains(old.spiffeIDs, c.spiffeIDs))
	add("dns_san", gains(old.dnsSANs, c.dnsSANs))
	add("calls", old.calls != nil && (c.calls == nil || gains(old.calls, c.calls)))
	add("sign_names", old.signNames != nil && (c.signNames == nil || gains(old.signNames, c.signNames)))
	add("template_codes", old.templateCodes != nil && (c.templateCodes == nil || gains(old.templateCodes, c.templateCodes)))
	add("countries", old.countries != nil && (c.countries == nil || gains(old.countries, c.countries)))
	add("sends_per_minute", old.sends != nil && (c.sends == nil || c.sends.Limit() > old.sends.Limit()))
	add("burst", old.sends != nil && c.sends != nil && c.sends.Burst() > old.sends.Burst())
	return fields
}

// gains reports whether now holds a value that old does not hold.
func gains[T comparable](old, now []T) bool {
	return slices.ContainsFunc(now, func(v T) bool { return !slices.Contains(old, v) })
}

// ErrUnknown is what Identify returns for whoever proves to be no caller.
var ErrUnknown = errors.New("unknown caller")

// Authenticate returns who makes a call with these values of the header authorization,
// over a connection with this client certificate, nil for none that was verified. A
// token that is sent counts alone.
func (s *Registry) Authenticate(authorization []string, certificate *x509.Certificate) (*Caller, error) {
	list := *s.list.Load()
	if len(authorization) > 0 {
		if scheme, token, _ := strings.Cut(authorization[0], " "); len(authorization) == 1 && strings.EqualFold(scheme, "bearer") {
			return withToken(list, strings.TrimSpace(token))
		}
		return nil, ErrUnknown
	}
	if certificate != nil {
		for _, c := range list {
			if c.matchesCertificate(certificate) {
				return c, nil
			}
		}
	}
	return nil, ErrUnknown
}

// withToken compares with all, in constant time.
func withToken(list []*Caller, token string) (found *Caller, err error) {
	hash := sha256.Sum256([]byte(token))
	for _, c := range list {
		for i := range c.tokens {
			if subtle.ConstantTimeCompare(hash[:], c.tokens[i][:]) == 1 {
				found = c
			}
		}
	}
	if found == nil {
		return nil, ErrUnknown
	}
	return found, nil
}

func (c *Caller) matchesCertificate(certificate *x509.Certificate) bool {
	for _, id := range certificate.URIs {
		if slices.Contains(c.spiffeIDs, id.String()) {
			return true
		}
	}
	return slices.ContainsFunc(certificate.DNSNames, func(name string) bool {
		return slices.Contains(c.dnsSANs, strings.ToLower(name))
	})
}

// AnyCertificate is Identify where there is no callers file and every client certificate
// that was verified may do everything.
func AnyCertificate(_ []string, certificate *x509.Certificate) (*Caller, error) {
	if certificate == nil {
		return nil, ErrUnknown
	}
	name := certificate.Subject.CommonName
	switch {
	case len(certificate.URIs) > 0:
		name = certificate.URIs[0].String()
	case len(certificate.DNSNames) > 0:
		name = certificate.DNSNames[0]
	}
	switch name {
	case "", Unknown, Other:
		name = fmt.Sprintf("sha256:%x", sha256.Sum256(certificate.Raw))
	}
	return &Caller{Name: name}, nil
}

// NewToken returns a bearer token of 256 random bits, and what the callers file has
// of it.
func NewToken() (token, hash string) {
	var b [32]byte
	rand.Read(b[:]) // never fails
	token = base64.RawURLEncoding.EncodeToString(b[:])
	return token, hashOf(token)
}
