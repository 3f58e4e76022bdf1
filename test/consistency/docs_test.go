package consistency

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestDocs_NameExistingTests(t *testing.T) {
	var source strings.Builder
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, "_test.go") {
			var text []byte
			text, err = os.ReadFile(path)
			source.Write(text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, page := range []string{"guarantees.md", "scaling.md", "security.md"} {
		text, err := os.ReadFile(filepath.Join(root, "docs", page))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`\bTest[A-Z0-9]\w+`).FindAllString(string(text), -1) {
			named++
			if !strings.Contains(source.String(), "func "+name+"(") {
				t.Errorf("docs/%s: got test %s, which does not exist; want an existing one", page, name)
			}
		}
	}
	guarantees, err := os.ReadFile(filepath.Join(root, "docs/guarantees.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, bug := range plantedBugs {
		if row := fmt.Sprintf("| %s | `%s` |", bug.name, bug.foundBy); !strings.Contains(string(guarantees), row) {
			t.Errorf("docs/guarantees.md: want the row %s", row)
		}
	}
	if named < 20 {
		t.Errorf("got %d tests named in the documents; want 20 at least", named)
	}
}
