// Package deploy tests the files of deploy/ with the programs and libraries that read them:
// the types of Kubernetes, kustomize, the loader of compose, systemd, and the built program.
package deploy

import (
	"bufio"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

const (
	root   = "../.."
	deploy = root + "/deploy"

	// Maximum time for calls in flight after the drain delay, by default: docs/install.md.
	longestCall = 12 * time.Second
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type setting struct {
	fallback string // the column "default"
	file     bool   // may be given as NAME_FILE
}

// documented returns the settings of the tables in docs/configuration.md.
func documented(t testing.TB) map[string]setting {
	t.Helper()
	settings := map[string]setting{}
	for line := range strings.Lines(testutil.ReadFile(t, root+"/docs/configuration.md")) {
		cells := strings.Split(line, "|")
		if len(cells) < 5 || !strings.HasPrefix(cells[1], " `") {
			continue
		}
		for _, m := range regexp.MustCompile("`([A-Z_]+)`( †)?").FindAllStringSubmatch(cells[1], -1) {
			settings[m[1]] = setting{strings.TrimSpace(cells[2]), m[2] != ""}
		}
	}
	if len(settings) < 10 {
		t.Fatalf("settings in docs/configuration.md: got %v; want at least 10", settings)
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
		for _, found := range regexp.MustCompile(`\b(PHONENUMBER|ALIYUN|DATA_SOURCE)_[A-Z_]+`).FindAllString(testutil.ReadFile(t, name), -1) {
			seen++
			base, file := strings.CutSuffix(found, "_FILE")
			if s, known := settings[base]; !known || file && !s.file {
				t.Errorf("%s: got %s; want a setting of docs/configuration.md", name, found)
			}
		}
		return nil
	}))
	if seen < 15 {
		t.Errorf("settings in deploy/: got %d; want at least 15", seen)
	}
}

func TestMain(m *testing.M) {
	code := m.Run()
	servicetest.RemoveProgram()
	os.Exit(code)
}

// mustAccept runs the program with env until it waits for its database, which does not exist. At
// that point the program has accepted every setting.
func mustAccept(t *testing.T, env map[string]string) {
	t.Helper()
	secrets := map[string]string{
		"DATA_SOURCE_NAME":     "phone:password@tcp(127.0.0.1:1)/PhoneNumberService",
		"ALIYUN_ACCESS_KEY_ID": "id", "ALIYUN_ACCESS_KEY_SECRET": "secret",
		"PHONENUMBER_CODE_KEY": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
	}
	cmd := exec.CommandContext(t.Context(), servicetest.Program())
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
	var output strings.Builder
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if strings.Contains(lines.Text(), "waiting for the database") {
			return
		}
		output.WriteString(lines.Text() + "\n")
	}
	t.Errorf("the program with %v: got\n%s\nwant it to wait for the database", env, &output)
}
