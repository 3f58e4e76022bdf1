// Package docstest tests the documents: docs/api.md has the comments of the proto, every link has a
// target, and the Chinese pages have the twin of everything.
package docstest

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

const (
	root      = "../../"
	protoFile = root + "phonenumberservice/phonenumberservice.proto"
	apiPage   = root + "docs/api.md"
	begin     = "<!-- begin: from phonenumberservice.proto, by go test ./internal/docstest -update -->\n"
	end       = "<!-- end -->\n"
)

var update = flag.Bool("update", false, "write the comments of the proto into docs/api.md")

func TestAPI_HasTheCommentsOfTheProto(t *testing.T) {
	page := testutil.ReadFile(t, apiPage)
	before, rest, found := strings.Cut(page, begin)
	got, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		t.Fatalf("docs/api.md has no lines\n%s%s", begin, end)
	}
	want := reference(testutil.ReadFile(t, protoFile))
	if got == want {
		return
	}
	if *update {
		if err := os.WriteFile(apiPage, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("docs/api.md is not current: run go test ./internal/docstest -update\ngot\n%s\nwant\n%s", got, want)
}

var (
	rpc     = regexp.MustCompile(`^  rpc (\w+)\((\w+)\) returns \((\w+)\)`)
	message = regexp.MustCompile(`^message (\w+) \{(\})?`)
	field   = regexp.MustCompile(`^  (\w+) (\w+) = (\d+);`)
	other   = regexp.MustCompile(`^(option|package|service) |^\}?$`)
)

// reference returns the comments of a proto file as Markdown. It reads the subset of the language that
// phonenumberservice.proto uses, and panics if a line has another form.
func reference(source string) string {
	var b strings.Builder
	var comment []string
	for line := range strings.Lines(source) {
		line = strings.TrimRight(line, "\n")
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "//"); ok {
			comment = append(comment, strings.TrimSpace(text))
			continue
		}
		if r := rpc.FindStringSubmatch(line); r != nil {
			fmt.Fprintf(&b, "\n### %s\n\n%s\nRequest: [%s](#%s).\nResponse: [%s](#%s).\n", r[1], sentences(comment),
				r[2], strings.ToLower(r[2]), r[3], strings.ToLower(r[3]))
		} else if m := message.FindStringSubmatch(line); m != nil && m[2] != "" {
			fmt.Fprintf(&b, "\n### %s\n\nIt has no fields.\n", m[1])
		} else if m != nil {
			fmt.Fprintf(&b, "\n### %s\n\n| field | type | number | meaning |\n|---|---|---|---|\n", m[1])
		} else if f := field.FindStringSubmatch(line); f != nil {
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f[2], f[1], f[3], strings.Join(comment, " "))
		} else if strings.HasPrefix(line, "syntax ") {
			b.WriteString(sentences(comment))
		} else if !other.MatchString(line) {
			panic("unknown form of a line: " + line)
		}
		comment = nil
	}
	return b.String()
}

// sentences returns a comment with one sentence a line, as the documents have it.
func sentences(comment []string) string {
	text := strings.ReplaceAll(strings.Join(comment, "\n"), "\n\n", "\x00")
	text = strings.ReplaceAll(text, "\n", " ")
	text = regexp.MustCompile(`\. ([A-Z])`).ReplaceAllString(text, ".\n$1")
	return strings.ReplaceAll(text, "\x00", "\n\n") + "\n"
}
