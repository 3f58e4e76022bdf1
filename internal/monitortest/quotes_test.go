package monitortest

import (
	"io/fs"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// Operators search the log for texts that the docs quote. The parts of a quote around an ellipsis
// or a comma must each be in the product code.
func TestDocs_QuoteOnlyTextsOfTheProgram(t *testing.T) {
	module := os.DirFS("../..")
	var code strings.Builder
	err := fs.WalkDir(module, "internal", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := fs.ReadFile(module, path)
		code.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	words := regexp.MustCompile("`([a-z]+(?: [a-z:;,…]+)+)`")
	joints := regexp.MustCompile("…|, ")
	quotes := 0
	for _, file := range []string{runbookFile, "../../docs/security.md", "../../docs/monitoring.md"} {
		for _, quote := range words.FindAllStringSubmatch(testutil.ReadFile(t, file), -1) {
			if strings.HasPrefix(quote[1], "make ") {
				continue
			}
			quotes++
			for _, part := range joints.Split(quote[1], -1) {
				if !strings.Contains(code.String(), part) {
					t.Errorf("%s quotes %q; got no such text in the code, want it", file, quote[1])
				}
			}
		}
	}
	if quotes < 15 {
		t.Errorf("got %d quotes; want 15 or more", quotes)
	}
}
