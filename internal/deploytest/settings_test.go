// Package deploytest checks the files of deploy/ with what reads them: the types of
// Kubernetes, kustomize, the loader of compose, systemd, and the built program. It is a
// module of its own for what only it imports.
package deploytest

import (
	"bufio"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	root   = "../.."
	deploy = root + "/deploy"

	// How long calls in flight take to finish after the drain delay, by default: docs/install.md.
	longestCall = 12 * time.Second
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	must(t, err)
	return string(text)
}

type setting struct {
	fallback string // the column "default"
	file     bool   // may be given as NAME_FILE
}

// documented returns the settings of the tables in docs/configuration.md.
func documented(t testing.TB) map[string]setting {
	t.Helper()
	settings := map[string]setting{}
	for line := range strings.Lines(read(t, root+"/docs/configuration.md")) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || !strings.HasPrefix(cells[1], " `") {
			continue
		}
		for _, m := range regexp.MustCompile("`([A-Z_]+)`( †)?").FindAllStringSubmatch(cells[1], -1) {
			settings[m[1]] = setting{strings.TrimSpace(cells[2]), m[2] != ""}
		}
	}
	if len(settings) < 10 {
		t.Fatalf("docs/configuration.md has the settings %v", settings)
	}
	return settings
}

func TestDeploy_UsesDocumentedSettings(t *testing.T) {
	settings := documented(t)
	seen := 0
	must(t, filepath.WalkDir(deploy, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		for _, found := range regexp.MustCompile(`\b(PHONENUMBER|ALIYUN|DATA_SOURCE)_[A-Z_]+`).FindAllString(read(t, name), -1) {
			seen++
			base, file := strings.CutSuffix(found, "_FILE")
			if s, known := settings[base]; !known || file && !s.file {
				t.Errorf("%s: %s is not in docs/configuration.md", name, found)
			}
		}
		return nil
	}))
	if seen < 15 {
		t.Errorf("saw %d", seen)
	}
}

// program builds the program once.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "phone-number-service")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir, ".")
	cmd.Dir, cmd.Stderr = root, os.Stderr
	return filepath.Join(dir, "phone-number-service"), cmd.Run()
})

func TestMain(m *testing.M) {
	code := m.Run()
	if binary, _ := program(); binary != "" {
		os.RemoveAll(filepath.Dir(binary))
	}
	os.Exit(code)
}

// accepts runs the program with env until it looks for its database, which is nowhere:
// every setting has passed by then.
func accepts(t *testing.T, env map[string]string) {
	t.Helper()
	secrets := map[string]string{
		"DATA_SOURCE_NAME":     "phone:password@tcp(127.0.0.1:1)/PhoneNumberService",
		"ALIYUN_ACCESS_KEY_ID": "id", "ALIYUN_ACCESS_KEY_SECRET": "secret",
		"PHONENUMBER_CODE_KEY": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
	}
	binary, err := program()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), binary)
	dir := t.TempDir()
	for name, value := range env {
		base, file := strings.CutSuffix(name, "_FILE")
		if secret, ok := secrets[base]; ok && file {
			value = filepath.Join(dir, path.Base(value))
			must(t, os.WriteFile(value, []byte(secret+"\n"), 0o600))
		} else if ok {
			value = secret
		}
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var said strings.Builder
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if strings.Contains(lines.Text(), "waiting for the database") {
			return
		}
		said.WriteString(lines.Text() + "\n")
	}
	t.Errorf("with %v the program said\n%s", env, &said)
}
