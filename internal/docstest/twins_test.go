package docstest

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// A section is a part of a page, from one heading to the next. It has the things that two languages
// write in the same way.
type section struct {
	anchor string // of the English heading
	level  string // such as "##"
	words  map[string]bool
	rows   int      // of tables
	items  int      // of lists
	blocks []string // of code, without comments
}

var (
	inlineCode = regexp.MustCompile("`[^`\n]+`")
	panel      = regexp.MustCompile(`\*[A-Z][^*\n]+\*`)                         // its title in italics, as on the dashboard
	figure     = regexp.MustCompile(`\d[\d,.]*\d`)                              // two digits at least: shorter ones are often words
	comments   = regexp.MustCompile(`(?m)(\s+#\s.*|\s+//\s.*|^#\s.*|^//\s.*)$`) // of shell, YAML and Go
)

// sections splits a page at its headings. A Chinese heading ends with the anchor of its English twin,
// as in "## 选择产品 <a id="which-product"></a>", unless both have the same text.
func sections(page string) (all []section) {
	var blocks []string
	page = fence.ReplaceAllStringFunc(page, func(block string) string {
		blocks = append(blocks, comments.ReplaceAllString(fence.FindStringSubmatch(block)[2], ""))
		return "\x00"
	})
	starts := heading.FindAllStringSubmatchIndex(page, -1)
	for i, start := range starts {
		h := heading.FindStringSubmatch(page[start[0]:start[1]])
		end := len(page)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		text := page[start[1]:end]
		s := section{anchor: slug(h[2]), level: h[1], words: map[string]bool{}}
		if h[3] != "" {
			s.anchor = h[3]
		}
		for _, word := range append(inlineCode.FindAllString(text, -1), panel.FindAllString(strings.ReplaceAll(text, "**", ""), -1)...) {
			s.words[word] = true
		}
		for _, number := range figure.FindAllString(inlineCode.ReplaceAllString(link.ReplaceAllString(text, "]"), ""), -1) {
			s.words[number] = true
		}
		s.rows = len(regexp.MustCompile(`(?m)^ *\|`).FindAllString(text, -1))
		s.items = len(regexp.MustCompile(`(?m)^ *(?:-|\d+\.) `).FindAllString(text, -1))
		n := strings.Count(text, "\x00")
		s.blocks, blocks = blocks[:n], blocks[n:]
		all = append(all, s)
	}
	return all
}

// twins returns the pages that exist in both languages: the Chinese page of each English one.
func twins(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{root + "README.md": root + "README.zh-CN.md"}
	chinese, err := filepath.Glob(root + "docs/zh/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range chinese {
		all[root+"docs/"+filepath.Base(page)] = page
	}
	for _, name := range []string{"aliyun", "configuration", "errors", "install", "runbook", "testing"} {
		all[root+"docs/"+name+".md"] = root + "docs/zh/" + name + ".md"
	}
	return all
}

// A writer who changes an English page sees here what the Chinese page lacks, and the reverse. The test
// does not compare sentences.
func TestChinese_HasTheTwinOfEverything(t *testing.T) {
	for english, chinese := range twins(t) {
		if _, err := os.Stat(chinese); err != nil {
			t.Errorf("%s: got no Chinese page %s; want one", english, chinese)
			continue
		}
		want, got := sections(testutil.ReadFile(t, english)), sections(testutil.ReadFile(t, chinese))
		twin := map[string]section{}
		for _, s := range got {
			twin[s.anchor] = s
		}
		var order []string
		for _, s := range want {
			c, ok := twin[s.anchor]
			if !ok {
				t.Errorf("%s lacks the twin of the heading %s %s", chinese, s.level, s.anchor)
				continue
			}
			order = append(order, s.anchor)
			compare(t, chinese+"#"+s.anchor, s, c)
		}
		var gotOrder []string
		for _, s := range got {
			gotOrder = append(gotOrder, s.anchor)
		}
		if !slices.Equal(order, gotOrder) {
			t.Errorf("%s: got the headings %v; want those and the order of %s: %v", chinese, gotOrder, english, order)
		}
	}
}

func compare(t *testing.T, place string, english, chinese section) {
	t.Helper()
	for _, word := range slices.Sorted(maps.Keys(english.words)) {
		if !chinese.words[word] {
			t.Errorf("%s lacks %s, which the English page has", place, word)
		}
	}
	for _, word := range slices.Sorted(maps.Keys(chinese.words)) {
		if !english.words[word] && word[0] == '`' {
			t.Errorf("%s has %s, which the English page lacks", place, word)
		}
	}
	if english.level != chinese.level || english.rows != chinese.rows || english.items != chinese.items {
		t.Errorf("%s: got level %s, %d rows of tables and %d items of lists; want as in English %s, %d and %d",
			place, chinese.level, chinese.rows, chinese.items, english.level, english.rows, english.items)
	}
	if !slices.Equal(english.blocks, chinese.blocks) {
		t.Errorf("%s: got the code\n%q\nwant that of the English page, except comments\n%q", place, chinese.blocks, english.blocks)
	}
}
