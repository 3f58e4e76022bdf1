package consistency

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
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
		text := testutil.ReadFile(t, filepath.Join(root, "docs", page))
		for _, name := range regexp.MustCompile(`\bTest[A-Z0-9]\w+`).FindAllString(text, -1) {
			named++
			if !strings.Contains(source.String(), "func "+name+"(") {
				t.Errorf("docs/%s: got test %s, which does not exist; want an existing one", page, name)
			}
		}
	}
	guarantees := testutil.ReadFile(t, filepath.Join(root, "docs/guarantees.md"))
	for _, bug := range plantedBugs {
		if row := fmt.Sprintf("| %s | `%s` |", bug.name, bug.foundBy); !strings.Contains(guarantees, row) {
			t.Errorf("docs/guarantees.md: want the row %s", row)
		}
	}
	if named < 20 {
		t.Errorf("got %d tests named in the documents; want 20 at least", named)
	}
}
