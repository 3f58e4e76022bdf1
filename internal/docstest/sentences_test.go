package docstest

import (
	"regexp"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

var (
	brackets    = regexp.MustCompile(`\([^()]*\)|（[^（）]*）`)
	sentenceEnd = regexp.MustCompile(`[\p{Ll}\d)*"]{2}[.!?]\*{0,2} +[A-Z` + "`" + `]|[^（“”「」]。[^”」*）]`)
)

// A line of text has one sentence, so that a diff shows the sentence that changed. Rows of tables and
// headings are single lines.
func TestPages_HaveOneSentenceALine(t *testing.T) {
	for _, page := range pages(t) {
		for i, line := range strings.Split(fence.ReplaceAllStringFunc(testutil.ReadFile(t, page), func(block string) string {
			return strings.Repeat("\n", strings.Count(block, "\n"))
		}), "\n") {
			text := brackets.ReplaceAllString(inlineCode.ReplaceAllString(line, "`x`"), "")
			if !strings.HasPrefix(strings.TrimSpace(line), "|") && !strings.HasPrefix(line, "#") && sentenceEnd.MatchString(text) {
				t.Errorf("%s:%d: got two sentences; want one a line: %s", page, i+1, line)
			}
		}
	}
}
