package cli

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// TestArchitecture_GraphHasEveryImport compares the graph and the table of docs/architecture.md
// with the imports of the program's packages.
func TestArchitecture_GraphHasEveryImport(t *testing.T) {
	list := exec.Command("go", "list", "-deps", "-json=ImportPath,Name,Imports,Doc", "../..")
	output, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	const module = "github.com/liulinhuai/phone-number-service"
	var want, packages []string
	for decoder := json.NewDecoder(strings.NewReader(string(output))); ; {
		var p struct {
			ImportPath, Name, Doc string
			Imports               []string
		}
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(p.ImportPath, module) {
			continue
		}
		packages = append(packages, strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/"))
		if p.Doc == "" {
			t.Errorf("%s: got no package comment; want one", p.ImportPath)
		}
		for _, imported := range p.Imports {
			if strings.HasPrefix(imported, module) {
				want = append(want, p.Name+" --> "+path.Base(imported))
			}
		}
	}
	page := testutil.ReadFile(t, "../../docs/architecture.md")
	_, graph, _ := strings.Cut(page, "flowchart TD")
	graph, _, _ = strings.Cut(graph, "```")
	var got []string
	for _, line := range regexp.MustCompile(`(?m)^  (\w+) --> (\w+(?: & \w+)*)$`).FindAllStringSubmatch(graph, -1) {
		for imported := range strings.SplitSeq(line[2], " & ") {
			got = append(got, line[1]+" --> "+imported)
		}
	}
	slices.Sort(want)
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("imports in the graph: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, p := range packages {
		if row := "\n| `" + cmp.Or(p, "main") + "` |"; !strings.Contains(page, row) {
			t.Errorf("table of packages: got no row %q; want one", row)
		}
	}
}
