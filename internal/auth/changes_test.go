package auth

import (
	"slices"
	"strings"
	"testing"
)

// A truncated file is often a valid file with fewer restrictions. Only the mark at its end shows
// that a file is whole.
func TestWhole_IsFalseForEveryTruncatedFile(t *testing.T) {
	text := `callers:
  - name: login
    token_sha256: [` + hashOf("a") + `]
    calls: [SendSMS]
    sign_names:
      - "..."
      - |-
        Acme
        ...
    countries: [CN]
    sends_per_minute: 600
  - name: batch
    dns_san: batch.example.org
...
`
	if _, err := Parse("callers.yaml", []byte(text), known); err != nil || !Whole(text) {
		t.Fatalf("the whole file: got %v, %v; want nil and whole", err, Whole(text))
	}
	valid := 0
	for i := range text {
		cut := text[:i]
		if _, err := Parse("callers.yaml", []byte(cut), known); err != nil {
			continue
		}
		valid++
		if Whole(cut) && strings.TrimSpace(cut) != strings.TrimSpace(text) {
			t.Errorf("truncated after %d of %d bytes: got whole; want not whole\n%s", i, len(text), cut)
		}
	}
	if valid < 20 {
		t.Errorf("got %d truncated files that are valid; want 20 at least for a useful test", valid)
	}
}

func TestWhole_NeedsTheMarkOnTheLastLine(t *testing.T) {
	for text, want := range map[string]bool{
		"callers: []\n...":          true,
		"callers: []\n...\n":        true,
		"callers: []\r\n... \r\n\n": true,
		"callers: []\n":             false,
		"callers: []\n...\n# end":   false,
		"callers: []\n ...\n":       false,
		"callers: []\n# ...\n":      false,
		"callers: []\n....\n":       false,
		"":                          false,
	} {
		if got := Whole(text); got != want {
			t.Errorf("%q: got %v; want %v", text, got, want)
		}
	}
}

func TestReplace_ReturnsAddedRemovedAndWidenedCallers(t *testing.T) {
	const before = "name: a, token_sha256: TOKEN, calls: [Valid], sign_names: [x, y], template_codes: [SMS_12], countries: [CN], sends_per_minute: 60, burst: 5"
	for name, c := range map[string]struct {
		old, now string // text of before, and its replacement
		want     []string
	}{
		"nothing":       {"", "", nil},
		"no calls":      {", calls: [Valid]", "", []string{"a calls"}},
		"no sign names": {", sign_names: [x, y]", "", []string{"a sign_names"}},
		"no templates":  {", template_codes: [SMS_12]", "", []string{"a template_codes"}},
		"no countries":  {", countries: [CN]", "", []string{"a countries"}},
		"no rate":       {", sends_per_minute: 60, burst: 5", "", []string{"a sends_per_minute"}},
		"only the name is left": {
			before[strings.Index(before, ", calls"):], "",
			[]string{"a calls", "a sign_names", "a template_codes", "a countries", "a sends_per_minute"},
		},
		"another country":      {"[CN]", "[US]", []string{"a countries"}},
		"a truncated template": {"SMS_12", "SMS_1", []string{"a template_codes"}},
		"a higher rate":        {"60", "61", []string{"a sends_per_minute"}},
		"a larger burst":       {"burst: 5", "burst: 6", []string{"a burst"}},
		"no burst":             {", burst: 5", "", []string{"a burst"}},
		"one more token":       {"TOKEN", "[TOKEN, " + hashOf("b") + "]", []string{"a token_sha256"}},
		"another certificate":  {"name: a", "name: a, dns_san: a.example, spiffe_id: spiffe://a/b", []string{"a spiffe_id", "a dns_san"}},
		"fewer sign names":     {"[x, y]", "[x]", nil},
		"a lower rate":         {"60, burst: 5", "6, burst: 1", nil},
	} {
		t.Run(name, func(t *testing.T) {
			parsed := func(text string) []*Caller {
				list, err := Parse("callers.yaml", []byte("callers: [{"+strings.ReplaceAll(text, "TOKEN", hashOf("a"))+"}]"), known)
				if err != nil {
					t.Fatal(err)
				}
				return list
			}
			var s Registry
			if first := s.Replace(parsed(before)); first.Added != nil || first.Widened != nil {
				t.Errorf("the first list: got %+v; want no changes", first)
			}
			got := s.Replace(parsed(strings.Replace(before, c.old, c.now, 1)))
			if !slices.Equal(got.Widened, c.want) || got.Added != nil || got.Removed != nil {
				t.Errorf("got %+v; want %q widened", got, c.want)
			}
		})
	}
	s := parse(t, "callers: [{name: a, token_sha256: "+hashOf("a")+"}, {name: b, token_sha256: "+hashOf("b")+"}]")
	list, err := Parse("callers.yaml", []byte("callers: [{name: b, token_sha256: "+hashOf("b")+
		"}, {name: c, token_sha256: "+hashOf("c")+"}]"), known)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Replace(list); !slices.Equal(got.Removed, []string{"a"}) || !slices.Equal(got.Added, []string{"c"}) || got.Widened != nil {
		t.Errorf("a removed and c added: got %+v; want [c] added and [a] removed", got)
	}
	if got := s.Names(); !slices.Equal(got, []string{"b", "c"}) {
		t.Errorf("names: got %q; want b and c", got)
	}
}
