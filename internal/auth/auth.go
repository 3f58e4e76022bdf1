// Package auth implements authentication and authorization of API clients: the callers
// file, the credentials of a caller, and its permissions.
package auth

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

// Caller is an API client: one of the callers file, or one with a certificate (AnyCertificate). A nil
// permission list allows all values. A nil *Caller, which is every caller without authentication, may
// do everything.
type Caller struct {
	Name string // for logs and metrics

	tokens    [][sha256.Size]byte // SHA-256 of its bearer tokens
	spiffeIDs []string
	dnsSANs   []string // lower case

	calls         []string // names of methods
	signNames     []string
	templateCodes []string
	countries     []string // as returned by numberplan.Country

	sends *rate.Limiter // nil for no limit
}

// Names that metrics and logs use for calls without a caller name of their own.
const (
	Unknown = "unknown" // not authenticated
	Other   = "other"   // callers beyond the limit of label values; only in metrics
)

// NameOf returns the name of a caller, "" if it is nil.
func NameOf(c *Caller) string {
	if c == nil {
		return ""
	}
	return c.Name
}

// NotAllowedError reports that an authenticated caller lacks a permission.
type NotAllowedError struct {
	Caller string
	Denied string // call, signature, template_code or country
}

func (e *NotAllowedError) Error() string {
	return "caller " + e.Caller + " may not use this " + e.Denied
}

// RateError reports that a caller has used up its own rate.
type RateError struct {
	Caller     string
	RetryAfter time.Duration
}

func (e *RateError) Error() string { return "caller " + e.Caller + " has used up its rate" }

// AuthorizeCall returns an error if the caller may not call a method.
func (c *Caller) AuthorizeCall(method string) error {
	if c == nil || allows(c.calls, method) {
		return nil
	}
	return &NotAllowedError{c.Name, "call"}
}

// AuthorizeSend returns an error if the caller may not send with this sign name and template,
// or to this country.
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

// AllowSend takes one send from the caller's rate. If none is left, it returns a *RateError
// with the time until the next.
func (c *Caller) AllowSend() error {
	if c == nil || c.sends == nil {
		return nil
	}
	// Do not use Reserve and Cancel: concurrent cancels can return the same token twice.
	if c.sends.Allow() {
		return nil
	}
	wait := time.Duration((1 - c.sends.Tokens()) / float64(c.sends.Limit()) * float64(time.Second))
	return &RateError{c.Name, max(wait, time.Millisecond)}
}

// Registry holds all callers. They can be replaced at any time.
type Registry struct{ list atomic.Pointer[[]*Caller] }

// Changes are the differences between two lists of callers, by name.
type Changes struct {
	Removed, Added []string
	Widened        []string // "name field": the field allows more values
}

// Replace replaces all callers by list, and returns the changes. A caller that is in both
// lists with the same rate keeps its limiter, so a reload does not refill it. The first list
// has no changes.
func (r *Registry) Replace(list []*Caller) (changes Changes) {
	if before := r.list.Load(); before != nil {
		removed := map[string]*Caller{}
		for _, old := range *before {
			removed[old.Name] = old
		}
		for _, c := range list {
			old := removed[c.Name]
			if old == nil {
				changes.Added = append(changes.Added, c.Name)
				continue
			}
			delete(removed, c.Name)
			for _, field := range c.widened(old) {
				changes.Widened = append(changes.Widened, c.Name+" "+field)
			}
			if old.sends != nil && c.sends != nil && old.sends.Limit() == c.sends.Limit() && old.sends.Burst() == c.sends.Burst() {
				c.sends = old.sends
			}
		}
		changes.Removed = slices.Sorted(maps.Keys(removed))
	}
	r.list.Store(&list)
	return changes
}

// Names returns the names of all callers.
func (r *Registry) Names() (names []string) {
	for _, c := range *r.list.Load() {
		names = append(names, c.Name)
	}
	return names
}

// widened returns the fields that allow more than they did in old.
func (c *Caller) widened(old *Caller) (fields []string) {
	add := func(field string, wider bool) {
		if wider {
			fields = append(fields, field)
		}
	}
	add("token_sha256", gains(old.tokens, c.tokens))
	add("spiffe_id", gains(old.spiffeIDs, c.spiffeIDs))
	add("dns_san", gains(old.dnsSANs, c.dnsSANs))
	add("calls", allowsMore(old.calls, c.calls))
	add("sign_names", allowsMore(old.signNames, c.signNames))
	add("template_codes", allowsMore(old.templateCodes, c.templateCodes))
	add("countries", allowsMore(old.countries, c.countries))
	add("sends_per_minute", old.sends != nil && (c.sends == nil || c.sends.Limit() > old.sends.Limit()))
	add("burst", old.sends != nil && c.sends != nil && c.sends.Burst() > old.sends.Burst())
	return fields
}

// allowsMore reports whether the permission now allows a value that old does not allow.
func allowsMore(old, now []string) bool { return old != nil && (now == nil || gains(old, now)) }

// gains reports whether now contains a value that old does not contain.
func gains[T comparable](old, now []T) bool {
	return slices.ContainsFunc(now, func(v T) bool { return !slices.Contains(old, v) })
}

// ErrUnknown means that the credentials of a call belong to no caller.
var ErrUnknown = errors.New("unknown caller")

// Authenticate returns the caller that has the credential: the token in the values of the header
// authorization, or the verified client certificate, which is nil if there is none. If the header is
// present, it ignores the certificate.
func (r *Registry) Authenticate(authorization []string, certificate *x509.Certificate) (*Caller, error) {
	var found *Caller
	list := *r.list.Load()
	switch len(authorization) {
	case 0:
		for _, c := range list {
			if certificate != nil && c.matchesCertificate(certificate) {
				return c, nil
			}
		}
	case 1:
		if scheme, token, _ := strings.Cut(authorization[0], " "); strings.EqualFold(scheme, "bearer") {
			found = byToken(list, strings.TrimSpace(token))
		}
	}
	if found == nil {
		return nil, ErrUnknown
	}
	return found, nil
}

// byToken returns the caller with a token, or nil. It compares the hash with those of all callers, in
// constant time, so that timing reveals nothing.
func byToken(list []*Caller, token string) (found *Caller) {
	hash := sha256.Sum256([]byte(token))
	for _, c := range list {
		for i := range c.tokens {
			if subtle.ConstantTimeCompare(hash[:], c.tokens[i][:]) == 1 {
				found = c
			}
		}
	}
	return found
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

// AnyCertificate authenticates calls without a callers file: every verified client certificate
// may do everything.
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

// NewToken returns a bearer token of 256 random bits, and its hash for the callers file.
func NewToken() (token, hash string) {
	var b [32]byte
	rand.Read(b[:]) // never fails
	token = base64.RawURLEncoding.EncodeToString(b[:])
	return token, hashOf(token)
}

func hashOf(token string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(token))) }
