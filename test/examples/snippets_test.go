package examples

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

// The programs around the lines of the page, in a folder of examples, which has the generated code.
// The page's own tests run its other languages.
var snippetPrograms = []struct {
	language, folder, file, before, after string
	command                               []string
}{
	{
		"Java", "java", "Snippet.java",
		"import io.github.liulinhuai.phonenumberservice.*;\nimport io.grpc.*;\nimport io.grpc.stub.MetadataUtils;\n" +
			"import java.util.concurrent.TimeUnit;\nclass Snippet { public static void main(String[] args) {\n", "\n}}\n",
		[]string{"java", "-cp", "target/classes:target/lib/*"},
	},
	{"Node.js", "node", "snippet.mjs", "", "", []string{"node"}},
	{"Python", "python", "snippet.py", "import sys\nsys.path.insert(0, '.')\n", "", []string{".venv/bin/python"}},
	{"PHP", "php", "snippet.php", "<?php\n", "", []string{"php"}},
}

// The lines that the page of dev shows make the same calls as its forms. The text has characters
// that each language must escape.
func TestPage_SnippetsRun(t *testing.T) {
	dev := run(t, servicetest.FreeAddress(t), nil, "dev")
	module := testutil.ReadFile(t, "../../internal/dev/page/snippets.js")
	lines := testutil.WriteFile(t, t.TempDir(), "lines.mjs", module+`
const [host, language, method, fields, headers] = process.argv.slice(2);
console.log(snippets({ origin: 'http://' + host, host })[language](method, JSON.parse(fields), JSON.parse(headers)));`)
	headers := map[string]string{"verification-context": `it's "$x" \ login`}
	for _, p := range snippetPrograms {
		l := languages[slices.IndexFunc(languages, func(l language) bool { return l.name == p.folder })]
		if available(t, l) == nil {
			continue
		}
		t.Run(p.language, func(t *testing.T) {
			t.Parallel()
			call := func(method string, fields map[string]string) string {
				t.Helper()
				text := output(t, "", "node", lines, dev.Addr, p.language, method, mustJSON(t, fields), mustJSON(t, headers))
				file := testutil.WriteFile(t, t.TempDir(), p.file, p.before+text+p.after)
				return output(t, filepath.Join(folder, p.folder), append(p.command, file)...)
			}
			number := newNumber()
			call("SendSMS", map[string]string{"phone_number": number, "signature": `Ö'Neil & "Co" $(x) \ 阿里云`, "template_code": "SMS_1"})
			check := map[string]string{"phone_number": number, "code": inbox(t, dev, number)}
			if got := call("Valid", check); !strings.Contains(got, "true") && !strings.Contains(got, "True") {
				t.Errorf("Valid with the right code: got %q; want true", got)
			}
			if got := call("Valid", check); !strings.Contains(got, "false") && !strings.Contains(got, "False") {
				t.Errorf("Valid with the used code: got %q; want false", got)
			}
		})
	}
}

// output runs a command in dir and returns its output.
func output(t *testing.T, dir string, command ...string) string {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command[0], err, out)
	}
	return strings.TrimSpace(string(out))
}

func mustJSON(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
