package auth

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"golang.org/x/time/rate"
)

// Limits of a callers file.
const (
	maxFileBytes      = 1 << 20
	maxSendsPerMinute = 1_000_000
)

// ParseOptions are the values that a callers file may contain.
type ParseOptions struct {
	Calls        []string
	Countries    map[string]bool // as returned by numberplan.Country
	Certificates bool            // whether client certificates are asked for
}

// Whole reports whether the last line of a callers file is YAML's end of a document. A
// truncated file never has this line, because Parse rejects a file with content after it.
func Whole(content string) bool {
	return strings.HasSuffix("\n"+strings.TrimRight(content, " \t\r\n"), "\n...")
}

// Parse parses the content of a callers file. It reports all errors, each with the file's name,
// the line and the expected value. It never quotes a value: it could be a token.
func Parse(name string, content []byte, known ParseOptions) ([]*Caller, error) {
	if len(content) > maxFileBytes {
		return nil, fmt.Errorf("%s: is larger than %d bytes", name, maxFileBytes)
	}
	f := &parser{name: name, known: known}
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	var document, more yaml.Node
	if err := decoder.Decode(&document); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: %s: is not YAML", name, lineOf(err))
	}
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		f.add(&more, "there must be one YAML document, and nothing behind it")
	}
	if len(document.Content) == 0 {
		return nil, fmt.Errorf(`%s: line 1: must begin with "callers:", a list of callers below it`, name)
	}
	f.parseTop(document.Content[0])
	return f.callers, errors.Join(f.errs...)
}

var line = regexp.MustCompile(`line \d+`)

// lineOf returns only the line of a YAML error, because its text can quote the file.
func lineOf(err error) string { return cmp.Or(line.FindString(err.Error()), "line 1") }

// parser collects the callers and the errors of a file.
type parser struct {
	name        string
	known       ParseOptions
	callers     []*Caller
	errs        []error
	credentials map[string]bool
}

func (f *parser) add(at *yaml.Node, format string, args ...any) {
	f.errs = append(f.errs, fmt.Errorf("%s: line %d: %s", f.name, max(at.Line, 1), fmt.Sprintf(format, args...)))
}

func (f *parser) parseTop(top *yaml.Node) {
	f.credentials = map[string]bool{}
	f.fields(top, `the file must hold "callers:", a list of callers below it`, map[string]func(*yaml.Node){
		"callers": func(list *yaml.Node) {
			if list.Kind != yaml.SequenceNode || len(list.Content) == 0 {
				f.add(list, `callers must be a list of callers, each beginning with "- name:"`)
				return
			}
			for _, each := range list.Content {
				f.caller(each)
			}
		},
	})
	if f.callers == nil && f.errs == nil {
		f.add(top, `callers is missing: a list of callers, each beginning with "- name:"`)
	}
}

// fields parses the fields of a mapping with the functions in known. It returns the names of
// the fields that are present, or nil if m is not a mapping.
func (f *parser) fields(m *yaml.Node, want string, known map[string]func(*yaml.Node)) (seen map[string]bool) {
	if m.Kind != yaml.MappingNode {
		f.add(m, "%s", want)
		return nil
	}
	var names []string
	for name := range known {
		names = append(names, name)
	}
	slices.Sort(names)
	seen = map[string]bool{}
	for i := 0; i < len(m.Content); i += 2 {
		key, value := m.Content[i], m.Content[i+1]
		read := known[key.Value]
		switch {
		case read == nil:
			f.add(key, "is no field here; there are %s", strings.Join(names, ", "))
		case seen[key.Value]:
			f.add(key, "%s is there twice", key.Value)
		default:
			seen[key.Value] = true
			read(value)
		}
	}
	return seen
}

var (
	callerName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)
	hexHash    = regexp.MustCompile(`^[0-9a-f]{64}$`)
	spiffeID   = regexp.MustCompile(`^spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]+)+$`)
	dnsName    = regexp.MustCompile(`^[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*$`)
	template   = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)
)

// Names that metrics use for calls without a caller name of their own.
const (
	Unknown = "unknown" // not authenticated
	Other   = "other"   // callers beyond the label cap
)

func (f *parser) caller(m *yaml.Node) {
	c := &Caller{}
	var perMinute, burst int
	var burstAt *yaml.Node
	has := f.fields(m, `a caller must be fields, the first of them "- name:"`, map[string]func(*yaml.Node){
		"name": func(n *yaml.Node) {
			if n.Kind != yaml.ScalarNode || !callerName.MatchString(n.Value) || n.Value == Unknown {
				f.add(n, `name must be 1 to 64 letters, digits, ".", "_" and "-", and not "%s"`, Unknown)
			} else if slices.ContainsFunc(f.callers, func(other *Caller) bool { return other.Name == n.Value }) {
				f.add(n, "name must not be that of another caller")
			}
			c.Name = n.Value
		},
		"token_sha256": func(n *yaml.Node) {
			for _, text := range f.list(n, "token_sha256", "must be the SHA-256 of a token, 64 digits of 0-9 and a-f, as the command token prints it; if this is the token itself, make a new one", hexHash.MatchString) {
				f.credential(n, text)
				var hash [sha256.Size]byte
				hex.Decode(hash[:], []byte(text)) //nolint:errcheck // hexHash matched
				c.tokens = append(c.tokens, hash)
			}
		},
		"spiffe_id": func(n *yaml.Node) {
			c.spiffeIDs = f.list(n, "spiffe_id", "must be a URI such as spiffe://example.org/login", spiffeID.MatchString)
			f.certificates(n, c.spiffeIDs)
		},
		"dns_san": func(n *yaml.Node) {
			c.dnsSANs = f.list(n, "dns_san", "must be a DNS name in lower case, without a wildcard, such as login.example.org", dnsName.MatchString)
			f.certificates(n, c.dnsSANs)
		},
		"calls": func(n *yaml.Node) {
			c.calls = f.list(n, "calls", "must be of "+strings.Join(f.known.Calls, ", "), func(s string) bool { return slices.Contains(f.known.Calls, s) })
		},
		"sign_names": func(n *yaml.Node) {
			c.signNames = f.list(n, "sign_names", "must be Aliyun SMS sign names", func(s string) bool { return s != "" })
		},
		"template_codes": func(n *yaml.Node) {
			c.templateCodes = f.list(n, "template_codes", "must be Aliyun SMS template codes, such as SMS_123456789", template.MatchString)
		},
		"countries": func(n *yaml.Node) {
			c.countries = f.list(n, "countries", "must be ISO 3166 codes in capitals, each that of the main country of a country code: US is all of +1", func(s string) bool { return f.known.Countries[s] })
		},
		"sends_per_minute": func(n *yaml.Node) { perMinute = f.number(n, "sends_per_minute") },
		"burst":            func(n *yaml.Node) { burst, burstAt = f.number(n, "burst"), n },
	})
	if has == nil {
		return
	}
	if !has["name"] {
		f.add(m, "name is missing")
	}
	if !has["token_sha256"] && !has["spiffe_id"] && !has["dns_san"] {
		f.add(m, "a caller must have token_sha256, spiffe_id or dns_san to prove who it is")
	}
	switch {
	case perMinute > 0:
		if burst == 0 {
			burst = perMinute
		}
		c.sends = rate.NewLimiter(rate.Limit(perMinute)/60, burst)
	case burstAt != nil && !has["sends_per_minute"]:
		f.add(burstAt, "burst needs sends_per_minute")
	}
	f.callers = append(f.callers, c)
}

// list parses a value or a list of values, each of which must be valid. want is the error text.
func (f *parser) list(n *yaml.Node, field, want string, valid func(string) bool) (values []string) {
	nodes := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		nodes = n.Content
	}
	if len(nodes) == 0 {
		f.add(n, "%s is an empty list: leave it out to allow all", field)
	}
	for _, each := range nodes {
		if each.Kind != yaml.ScalarNode || !valid(each.Value) {
			f.add(each, "%s %s", field, want)
			continue
		}
		values = append(values, each.Value)
	}
	return values
}

func (f *parser) certificates(n *yaml.Node, credentials []string) {
	if !f.known.Certificates {
		f.add(n, "certificates are asked for with PHONENUMBER_TLS_CLIENT_CA alone; set it, or use token_sha256")
	}
	for _, p := range credentials {
		f.credential(n, p)
	}
}

// credential records a credential, which must be unique in the file.
func (f *parser) credential(n *yaml.Node, p string) {
	if f.credentials[p] {
		f.add(n, "proves a caller already")
	}
	f.credentials[p] = true
}

func (f *parser) number(n *yaml.Node, field string) int {
	v, err := strconv.Atoi(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil || v < 1 || v > maxSendsPerMinute {
		f.add(n, "%s must be a whole number from 1 to %d", field, maxSendsPerMinute)
		return 0
	}
	return v
}

func hashOf(token string) string {
	hash := sha256.Sum256([]byte(token))
	return hex.EncodeToString(hash[:])
}
