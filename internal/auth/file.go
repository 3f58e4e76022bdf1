package auth

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
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

// ParseOptions are the values that a callers file can contain.
type ParseOptions struct {
	Calls        []string        // names of methods
	Countries    map[string]bool // as returned by numberplan.Country
	Certificates bool            // whether the port asks clients for certificates
}

// Whole reports whether the last line of a callers file is "...", YAML's mark for the end of a
// document. A truncated file never has this line, because Parse rejects a file with content after it.
func Whole(content string) bool {
	return strings.HasSuffix("\n"+strings.TrimRight(content, " \t\r\n"), "\n...")
}

// Parse parses the content of a callers file. It reports all errors, each with the file's name,
// the line and the expected value. It never quotes a value: it could be a token.
func Parse(name string, content []byte, known ParseOptions) ([]*Caller, error) {
	if len(content) > maxFileBytes {
		return nil, fmt.Errorf("%s: is larger than %d bytes", name, maxFileBytes)
	}
	p := &parser{name: name, known: known, seen: map[string]bool{}}
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	var document, more yaml.Node
	if err := decoder.Decode(&document); err != nil && !errors.Is(err, io.EOF) {
		// The text of err can quote the file, except for the line.
		return nil, fmt.Errorf("%s: %s: is not YAML", name, cmp.Or(yamlLine.FindString(err.Error()), "line 1"))
	}
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		p.add(&more, "there must be one YAML document, and nothing behind it")
	}
	if len(document.Content) == 0 {
		return nil, fmt.Errorf(`%s: line 1: must begin with "callers:", a list of callers below it`, name)
	}
	top := document.Content[0]
	p.fields(top, `the file must hold "callers:", a list of callers below it`, map[string]func(string, *yaml.Node){
		"callers": func(_ string, list *yaml.Node) {
			if list.Kind != yaml.SequenceNode || len(list.Content) == 0 {
				p.add(list, `callers must be a list of callers, each beginning with "- name:"`)
				return
			}
			for _, each := range list.Content {
				p.caller(each)
			}
		},
	})
	if p.callers == nil && p.errs == nil {
		p.add(top, `callers is missing: a list of callers, each beginning with "- name:"`)
	}
	return p.callers, errors.Join(p.errs...)
}

// parser collects the callers and the errors of a file.
type parser struct {
	name    string
	known   ParseOptions
	callers []*Caller
	errs    []error
	seen    map[string]bool // the credentials of all callers
}

func (p *parser) add(at *yaml.Node, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: line %d: %s", p.name, max(at.Line, 1), fmt.Sprintf(format, args...)))
}

// fields parses the fields of a mapping, each with its function in known, which gets the name of
// the field and its value. It returns the names of the fields that are present, or nil if m is not
// a mapping.
func (p *parser) fields(m *yaml.Node, want string, known map[string]func(string, *yaml.Node)) (seen map[string]bool) {
	if m.Kind != yaml.MappingNode {
		p.add(m, "%s", want)
		return nil
	}
	seen = map[string]bool{}
	for i := 0; i < len(m.Content); i += 2 {
		key, value := m.Content[i], m.Content[i+1]
		parse := known[key.Value]
		switch {
		case parse == nil:
			p.add(key, "is no field here; there are %s", strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		case seen[key.Value]:
			p.add(key, "%s is there twice", key.Value)
		default:
			seen[key.Value] = true
			parse(key.Value, value)
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
	yamlLine   = regexp.MustCompile(`line \d+`) // in an error of package yaml
)

func (p *parser) caller(m *yaml.Node) {
	c := &Caller{}
	var perMinute, burst int
	var burstAt *yaml.Node
	list := func(to *[]string, want string, valid func(string) bool) func(string, *yaml.Node) {
		return func(field string, n *yaml.Node) { *to = p.list(n, field, want, valid) }
	}
	certificateName := func(to *[]string, want string, pattern *regexp.Regexp) func(string, *yaml.Node) {
		return func(field string, n *yaml.Node) {
			*to = p.list(n, field, want, pattern.MatchString)
			if !p.known.Certificates {
				p.add(n, "certificates are asked for with PHONENUMBER_TLS_CLIENT_CA alone; set it, or use token_sha256")
			}
			p.credentials(n, *to)
		}
	}
	has := p.fields(m, `a caller must be fields, the first of them "- name:"`, map[string]func(string, *yaml.Node){
		"name": func(_ string, n *yaml.Node) {
			if n.Kind != yaml.ScalarNode || !callerName.MatchString(n.Value) || n.Value == Unknown {
				p.add(n, `name must be 1 to 64 letters, digits, ".", "_" and "-", and not "%s"`, Unknown)
			} else if slices.ContainsFunc(p.callers, func(other *Caller) bool { return other.Name == n.Value }) {
				p.add(n, "name must not be that of another caller")
			}
			c.Name = n.Value
		},
		"token_sha256": func(field string, n *yaml.Node) {
			hashes := p.list(n, field, "must be the SHA-256 of a token, 64 digits of 0-9 and a-f, as the command token prints it; if this is the token itself, make a new one", hexHash.MatchString)
			p.credentials(n, hashes)
			for _, text := range hashes {
				hash, _ := hex.DecodeString(text) // hexHash matched
				c.tokens = append(c.tokens, [sha256.Size]byte(hash))
			}
		},
		"spiffe_id":        certificateName(&c.spiffeIDs, "must be a URI such as spiffe://example.org/login", spiffeID),
		"dns_san":          certificateName(&c.dnsSANs, "must be a DNS name in lower case, without a wildcard, such as login.example.org", dnsName),
		"calls":            list(&c.calls, "must be of "+strings.Join(p.known.Calls, ", "), func(s string) bool { return slices.Contains(p.known.Calls, s) }),
		"sign_names":       list(&c.signNames, "must be Aliyun SMS sign names", func(s string) bool { return s != "" }),
		"template_codes":   list(&c.templateCodes, "must be codes of Aliyun templates, such as SMS_123456789 or 100001", template.MatchString),
		"countries":        list(&c.countries, "must be ISO 3166 codes in capitals, each that of the main country of a country code: US is all of +1", func(s string) bool { return p.known.Countries[s] }),
		"sends_per_minute": func(field string, n *yaml.Node) { perMinute = p.number(n, field) },
		"burst":            func(field string, n *yaml.Node) { burst, burstAt = p.number(n, field), n },
	})
	if has == nil {
		return
	}
	if !has["name"] {
		p.add(m, "name is missing")
	}
	if !has["token_sha256"] && !has["spiffe_id"] && !has["dns_san"] {
		p.add(m, "a caller must have token_sha256, spiffe_id or dns_san to prove who it is")
	}
	switch {
	case perMinute > 0:
		if burst == 0 {
			burst = perMinute
		}
		c.sends = rate.NewLimiter(rate.Limit(perMinute)/60, burst)
	case burstAt != nil && !has["sends_per_minute"]:
		p.add(burstAt, "burst needs sends_per_minute")
	}
	p.callers = append(p.callers, c)
}

// list parses a value or a list of values, each of which must be valid. want is the error text.
func (p *parser) list(n *yaml.Node, field, want string, valid func(string) bool) (values []string) {
	nodes := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		nodes = n.Content
	}
	if len(nodes) == 0 {
		p.add(n, "%s is an empty list: leave it out to allow all", field)
	}
	for _, each := range nodes {
		if each.Kind != yaml.ScalarNode || !valid(each.Value) {
			p.add(each, "%s %s", field, want)
			continue
		}
		values = append(values, each.Value)
	}
	return values
}

// credentials records credentials, each of which must be unique in the file.
func (p *parser) credentials(n *yaml.Node, values []string) {
	for _, v := range values {
		if p.seen[v] {
			p.add(n, "proves a caller already")
		}
		p.seen[v] = true
	}
}

func (p *parser) number(n *yaml.Node, field string) int {
	v, err := strconv.Atoi(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil || v < 1 || v > maxSendsPerMinute {
		p.add(n, "%s must be a whole number from 1 to %d", field, maxSendsPerMinute)
		return 0
	}
	return v
}
