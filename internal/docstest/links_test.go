package docstest

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// pages returns the Markdown files of the repository's root, of docs/ and of examples/.
func pages(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md", "examples/*.md", "examples/*/*.md"} {
		found, err := filepath.Glob(root + pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	if len(all) < 40 {
		t.Fatalf("pages: got %v; want at least 40", all)
	}
	return all
}

var (
	fence   = regexp.MustCompile("(?ms)^ *```(\\w*)\n(.*?)^ *```$")
	heading = regexp.MustCompile(`(?m)^(#+) (.+?)(?: <a id="([a-z0-9-]+)"></a>)?$`)
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	dropped = regexp.MustCompile(`[^\p{L}\p{N} _-]`) // from an anchor
)

// slug returns the anchor that GitHub gives to a heading.
func slug(heading string) string {
	return strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(heading), ""), " ", "-")
}

// anchors returns the anchors of a page without its code blocks.
func anchors(page string) (all []string) {
	seen := map[string]int{}
	for _, h := range heading.FindAllStringSubmatch(page, -1) {
		anchor := slug(h[2])
		if seen[anchor]++; seen[anchor] > 1 {
			all = append(all, fmt.Sprint(anchor, "-", seen[anchor]-1))
		} else {
			all = append(all, anchor)
		}
		all = append(all, h[3])
	}
	return all
}

func TestLinks_HaveTargets(t *testing.T) {
	checked, known := 0, map[string][]string{} // the anchors of each target
	for _, page := range pages(t) {
		for _, l := range link.FindAllStringSubmatch(fence.ReplaceAllString(testutil.ReadFile(t, page), ""), -1) {
			path, anchor, _ := strings.Cut(l[1], "#")
			if strings.Contains(path, "://") || strings.HasPrefix(path, "mailto:") {
				continue
			}
			checked++
			target := filepath.Join(filepath.Dir(page), path)
			if path == "" {
				target = page
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: got no such file; want one", page, l[1])
				continue
			}
			if anchor != "" && known[target] == nil {
				known[target] = anchors(fence.ReplaceAllString(testutil.ReadFile(t, target), ""))
			}
			if anchor != "" && !slices.Contains(known[target], anchor) {
				t.Errorf("%s links to %s: got no such heading; want one", page, l[1])
			}
		}
	}
	if checked < 200 {
		t.Errorf("links: got %d; want at least 200", checked)
	}
}
