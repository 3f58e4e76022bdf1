package auth

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var known = ParseOptions{
	Calls: []string{"SendSMS", "Valid"}, Countries: map[string]bool{"CN": true, "US": true}, Certificates: true,
}

func parse(t *testing.T, text string) *Registry {
	t.Helper()
	list, err := Parse("callers.yaml", []byte(text), known)
	if err != nil {
		t.Fatal(err)
	}
	s := &Registry{}
	s.Replace(list)
	return s
}

func TestAuthenticate_KnowsTokensAndCertificates(t *testing.T) {
	s := parse(t, `
callers:
  - name: login
    token_sha256: [`+hashOf("first")+`, `+hashOf("second")+`]
  - name: shop
    spiffe_id: spiffe://example.org/ns/shop
  - name: batch
    dns_san: [batch.example.org, other.example.org]
`)
	id, err := url.Parse("spiffe://example.org/ns/shop")
	if err != nil {
		t.Fatal(err)
	}
	shop := &x509.Certificate{URIs: []*url.URL{id}}
	batch := &x509.Certificate{DNSNames: []string{"x", "Batch.Example.org"}}
	for _, c := range []struct {
		authorization []string
		certificate   *x509.Certificate
		want          string // the caller; "" for an unknown one
	}{
		{[]string{"Bearer first"}, nil, "login"},
		{[]string{"bearer second"}, nil, "login"},
		{nil, shop, "shop"},
		{nil, batch, "batch"},
		{[]string{"Bearer first"}, batch, "login"},
		{[]string{"Bearer wrong"}, batch, ""}, // a certificate does not replace a wrong token
		{[]string{"Bearer first", "Bearer first"}, nil, ""},
		{[]string{"Bearer"}, nil, ""},
		{[]string{"Bearer " + hashOf("first")}, nil, ""},
		{[]string{"Basic first"}, nil, ""},
		{[]string{""}, batch, ""},
		{nil, &x509.Certificate{DNSNames: []string{"evil.example.org"}}, ""},
		{nil, nil, ""},
	} {
		got, err := s.Authenticate(c.authorization, c.certificate)
		if c.want == "" {
			if !errors.Is(err, ErrUnknown) || got != nil {
				t.Errorf("%q with a certificate %v: got %v, %v; want ErrUnknown", c.authorization, c.certificate != nil, got, err)
			}
		} else if err != nil || got.Name != c.want {
			t.Errorf("%q with a certificate %v: got %v, %v; want %s", c.authorization, c.certificate != nil, got, err, c.want)
		}
	}
}

func TestAuthorize_AllowsListedValuesOrAllWithoutAList(t *testing.T) {
	s := parse(t, `
callers:
  - {name: all, token_sha256: `+hashOf("all")+`}
  - name: few
    token_sha256: `+hashOf("few")+`
    calls: SendSMS
    sign_names: [阿里云, Acme]
    template_codes: [SMS_1]
    countries: [CN]
`)
	all, _ := s.Authenticate([]string{"Bearer all"}, nil)
	few, _ := s.Authenticate([]string{"Bearer few"}, nil)
	for _, c := range []struct {
		name   string
		err    error
		denied string
	}{
		{"all, Valid", all.AuthorizeCall("Valid"), ""},
		{"all, send", all.AuthorizeSend("x", "y", "US"), ""},
		{"few, SendSMS", few.AuthorizeCall("SendSMS"), ""},
		{"few, Valid", few.AuthorizeCall("Valid"), "call"},
		{"few, send", few.AuthorizeSend("Acme", "SMS_1", "CN"), ""},
		{"few, another sign name", few.AuthorizeSend("acme", "SMS_1", "CN"), "signature"},
		{"few, another template", few.AuthorizeSend("Acme", "SMS_2", "CN"), "template_code"},
		{"few, another country", few.AuthorizeSend("Acme", "SMS_1", "US"), "country"},
		{"no caller", (*Caller)(nil).AuthorizeSend("x", "y", "US"), ""},
	} {
		var e *NotAllowedError
		if c.denied == "" {
			if c.err != nil {
				t.Errorf("%s: got %v; want nil", c.name, c.err)
			}
		} else if !errors.As(c.err, &e) || e.Denied != c.denied || e.Caller != "few" {
			t.Errorf("%s: got %v; want the %s denied", c.name, c.err, c.denied)
		}
	}
}

func TestAllowSend_BucketOutlivesAReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const file = "callers: [{name: a, token_sha256: HASH, sends_per_minute: 60, burst: 3}]"
		text := strings.Replace(file, "HASH", hashOf("a"), 1)
		s := parse(t, text)
		take := func() error {
			c, err := s.Authenticate([]string{"Bearer a"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			return c.AllowSend()
		}
		reload := func(text string) {
			list, err := Parse("callers.yaml", []byte(text), known)
			if err != nil {
				t.Fatal(err)
			}
			s.Replace(list)
		}
		for i := range 3 {
			if err := take(); err != nil {
				t.Fatalf("send %d of the burst: got %v; want nil", i, err)
			}
		}
		var e *RateError
		for range 3 { // a rejected send uses nothing
			if err := take(); !errors.As(err, &e) || e.RetryAfter != time.Second {
				t.Fatalf("after the burst: got %v; want a RateError with a retry after one second", err)
			}
		}
		reload(text + " # touched")
		if take() == nil {
			t.Error("a send after a reload: got nil; want an error, since the burst is used up")
		}
		time.Sleep(time.Second)
		if err := take(); err != nil {
			t.Errorf("a second later: got %v; want nil", err)
		}
		if take() == nil {
			t.Error("a second send within a second at 60 a minute: got nil; want an error")
		}
		reload(strings.Replace(text, "60", "600", 1))
		if err := take(); err != nil {
			t.Errorf("with another rate: got %v; want nil", err)
		}
	})
}

func TestAllowSend_RateHoldsUnderConcurrency(t *testing.T) {
	c := parse(t, "callers: [{name: a, token_sha256: "+hashOf("a")+", sends_per_minute: 600, burst: 1}]")
	caller, err := c.Authenticate([]string{"Bearer a"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	var taken atomic.Int64
	var taking sync.WaitGroup
	for range 64 {
		taking.Go(func() {
			for time.Since(start) < time.Second {
				if caller.AllowSend() == nil {
					taken.Add(1)
				}
			}
		})
	}
	taking.Wait()
	if due := 1 + 10*time.Since(start).Seconds(); float64(taken.Load()) > due || taken.Load() < 5 {
		t.Errorf("got %d sends in %v; want 5 at least, and %.1f at most", taken.Load(), time.Since(start), due)
	}
}

// In the metrics, these labels have another meaning.
func TestAnyCertificate_TakesNoReservedName(t *testing.T) {
	for _, name := range []string{"", Unknown, Other} {
		for kind, c := range map[string]*x509.Certificate{
			"common name": {Subject: pkix.Name{CommonName: name}},
			"DNS name":    {DNSNames: []string{name}},
			"URI":         {URIs: []*url.URL{{Path: name}}},
		} {
			caller, err := AnyCertificate(nil, c)
			if err != nil || !strings.HasPrefix(caller.Name, "sha256:") {
				t.Errorf("%s %q: got %v, %v; want the certificate's hash", kind, name, caller, err)
			}
		}
	}
	if _, err := AnyCertificate(nil, nil); !errors.Is(err, ErrUnknown) {
		t.Errorf("no certificate: got %v; want ErrUnknown", err)
	}
	if caller, err := AnyCertificate(nil, &x509.Certificate{DNSNames: []string{"other.example.org"}}); err != nil ||
		caller.Name != "other.example.org" {
		t.Errorf("got %v, %v; want other.example.org", caller, err)
	}
}

func TestParse_ErrorsHaveLinesAndNoValues(t *testing.T) {
	good := hashOf("x")
	for name, c := range map[string]struct {
		text  string
		wants []string
	}{
		"empty":              {"", []string{`line 1: must begin with "callers:"`}},
		"a comment":          {"# callers", []string{`line 1: must begin with "callers:"`}},
		"no YAML":            {"callers:\n  - name: [\n", []string{"is not YAML"}},
		"a list":             {"- name: a", []string{`line 1: the file must hold "callers:"`}},
		"no callers":         {"callers: []", []string{"line 1: callers must be a list"}},
		"an empty mapping":   {"{}", []string{"line 1: callers is missing"}},
		"two documents":      {"callers: [{name: a, token_sha256: " + good + "}]\n---\ncallers: []", []string{"one YAML document"}},
		"garbage at the end": {"callers: [{name: a, token_sha256: " + good + "}]\n...\n}{ hunter2", []string{"one YAML document"}},
		"unknown fields": {"caller: []\ncallers:\n  - name: a\n    token: hunter2\n    token_sha256: " + good, []string{
			"line 1: is no field here; there are callers", "line 4: is no field here; there are burst, calls, countries, dns_san, name, sends_per_minute, sign_names, spiffe_id, template_codes, token_sha256",
		}},
		"a token in clear": {
			"callers:\n  - name: a\n    token_sha256: hunter2",
			[]string{"line 3: token_sha256 must be the SHA-256 of a token", "if this is the token itself, make a new one"},
		},
		"a hash in capitals":   {"callers:\n  - name: a\n    token_sha256: " + strings.ToUpper(good), []string{"line 3: token_sha256 must be"}},
		"no credential":        {"callers:\n  - name: a", []string{"line 2: a caller must have token_sha256, spiffe_id or dns_san"}},
		"a field name as name": {"callers:\n  - name: dns_san", []string{"line 2: a caller must have token_sha256"}},
		"no name":              {"callers:\n  - token_sha256: " + good, []string{"line 2: name is missing"}},
		"a reserved name":      {"callers:\n  - name: unknown\n    token_sha256: " + good, []string{`line 2: name must be`}},
		"a bad name":           {"callers:\n  - name: a b\n    token_sha256: " + good, []string{`line 2: name must be`}},
		"the same twice": {"callers:\n  - name: a\n    token_sha256: " + good + "\n  - name: a\n    name: a\n    token_sha256: " + good, []string{
			"line 4: name must not be that of another caller", "line 5: name is there twice", "line 6: proves a caller already",
		}},
		"empty lists": {
			"callers:\n  - name: a\n    token_sha256: " + good + "\n    calls: []\n    countries: []",
			[]string{"line 4: calls is an empty list: leave it out to allow all", "line 5: countries is an empty list"},
		},
		"nothing": {
			"callers:\n  - name: a\n    token_sha256:\n    sign_names:",
			[]string{"line 3: token_sha256 must be", "line 4: sign_names must be"},
		},
		"an unknown call": {
			"callers:\n  - name: a\n    token_sha256: " + good + "\n    calls: [SendSMS, hunter2]",
			[]string{"line 4: calls must be of SendSMS, Valid"},
		},
		"not a main country": {
			"callers:\n  - name: a\n    token_sha256: " + good + "\n    countries: [CA]",
			[]string{"line 4: countries must be ISO 3166 codes", "US is all of +1"},
		},
		"a bad template": {
			"callers:\n  - name: a\n    token_sha256: " + good + "\n    template_codes: SMS-1",
			[]string{"line 4: template_codes must be"},
		},
		"rates": {
			"callers:\n  - name: a\n    token_sha256: " + good + "\n    sends_per_minute: 0\n    burst: many",
			[]string{"line 4: sends_per_minute must be a whole number", "line 5: burst must be"},
		},
		"a burst without rate": {
			"callers:\n  - name: a\n    token_sha256: " + good + "\n    burst: 3",
			[]string{"line 4: burst needs sends_per_minute"},
		},
		"a bad SPIFFE ID":   {"callers:\n  - name: a\n    spiffe_id: https://hunter2", []string{"line 3: spiffe_id must be a URI such as"}},
		"a wildcard":        {"callers:\n  - name: a\n    dns_san: '*.example.org'", []string{"line 3: dns_san must be a DNS name"}},
		"an alias":          {"callers:\n  - &a {name: a, token_sha256: " + good + "}\n  - *a", []string{"line 3: a caller must be fields"}},
		"a caller as text":  {"callers: [hunter2]", []string{"line 1: a caller must be fields"}},
		"an unknown anchor": {"callers: *hunter2", []string{"line 1: is not YAML"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("callers.yaml", []byte(c.text), known)
			if err == nil {
				t.Fatal("got nil; want an error")
			}
			for _, want := range c.wants {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %v; want %q in it", err, want)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("got %v; want no value in it", err)
			}
		})
	}
	if _, err := Parse("callers.yaml", []byte("callers:\n  - name: a\n    dns_san: a.example.org"), ParseOptions{}); err == nil || !strings.Contains(err.Error(), "callers.yaml: line 3: certificates are asked for with PHONENUMBER_TLS_CLIENT_CA alone") {
		t.Errorf("dns_san without PHONENUMBER_TLS_CLIENT_CA: got %v; want an error that names that variable", err)
	}
	if _, err := Parse("callers.yaml", make([]byte, maxFileBytes+1), known); err == nil {
		t.Error("a file of more than a megabyte: got nil; want an error")
	}
}

func TestNewToken_IsLongAndUnique(t *testing.T) {
	one, hash := NewToken()
	other, _ := NewToken()
	if one == other || len(one) != 43 || hash != hashOf(one) {
		t.Errorf("got the tokens %s and %s, and the hash %s of the first; want two tokens of 43 characters, and %s", one, other, hash, hashOf(one))
	}
}

func FuzzParse(f *testing.F) {
	f.Add("callers:\n  - name: a\n    token_sha256: " + hashOf("x") + "\n    calls: [Valid]\n    sends_per_minute: 3\n    burst: 2\n")
	f.Add("callers: [{name: a, spiffe_id: spiffe://a/b, dns_san: [a.b], sign_names: 阿里云, countries: CN}]")
	f.Add("callers: &a [*a, *a]\n---\n{}")
	f.Add("? [a]\n: !!binary x\n<<: {}\n")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := Parse("callers.yaml", []byte(text), known)
		if err != nil {
			for _, line := range strings.Split(err.Error(), "\n") {
				if !strings.HasPrefix(line, "callers.yaml: line ") {
					t.Errorf("got the error %q; want one with its line", line)
				}
			}
			return
		}
		if len(list) == 0 {
			t.Error("a file without callers: got nil; want an error")
		}
		names := map[string]bool{}
		for _, c := range list {
			if !callerName.MatchString(c.Name) || c.Name == Unknown || names[c.Name] {
				t.Errorf("got the name %q; want a valid one, and only once", c.Name)
			}
			names[c.Name] = true
			if len(c.tokens)+len(c.spiffeIDs)+len(c.dnsSANs) == 0 {
				t.Errorf("%s: got no credential; want one", c.Name)
			}
			for field, listed := range map[string][]string{
				"calls": c.calls, "sign_names": c.signNames, "template_codes": c.templateCodes,
				"countries": c.countries,
			} {
				if strings.Contains(text, field) && listed != nil && len(listed) == 0 {
					t.Errorf("%s: got an empty list %s; want an error", c.Name, field)
				}
			}
		}
	})
}
