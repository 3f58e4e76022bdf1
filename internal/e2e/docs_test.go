package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

const (
	moduleRoot   = "../.."
	inBackground = "run: in the background"
	documented   = "localhost:50511" // the address of the service in the documents
)

// shellBlock matches a block of shell commands in a document, and the mark in front of it.
var shellBlock = regexp.MustCompile("(?m)^ *(?:<!-- ((?:not )?run: .+) -->\n *)?```(?:sh|shell|bash|console)\n((?s:.*?))^ *```$")

// TestDocs_CommandsRun runs each block of shell commands in README.md, CONTRIBUTING.md, docs/ and the
// READMEs of examples/. The Chinese pages have the same blocks (internal/docstest). A block runs in the
// root of the module, with the built program in its PATH, and fails if a command or an HTTP request
// fails. A mark in front of a block says otherwise: "<!-- not run: REASON -->", or "<!-- run: in the
// background -->" for a command that serves until it is stopped.
func TestDocs_CommandsRun(t *testing.T) {
	found, pages := 0, []string{moduleRoot + "/README.md", moduleRoot + "/CONTRIBUTING.md", moduleRoot + "/examples/README.md"}
	for _, pattern := range []string{"/docs/*.md", "/examples/*/README.md"} {
		matches, err := filepath.Glob(moduleRoot + pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, matches...)
	}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		blocks := shellBlock.FindAllSubmatchIndex(text, -1)
		if found += len(blocks); len(blocks) == 0 {
			continue
		}
		t.Run(strings.TrimPrefix(page, moduleRoot+"/"), func(t *testing.T) {
			setDocumentEnvironment(t)
			d := &document{t: t}
			for _, at := range blocks {
				mark, script := "", string(text[at[4]:at[5]])
				if at[2] >= 0 {
					mark = string(text[at[2]:at[3]])
				}
				place := fmt.Sprintf("%s:%d", page, 1+strings.Count(string(text[:at[4]]), "\n"))
				switch reason, notRun := strings.CutPrefix(mark, "not run: "); {
				case notRun:
					t.Logf("%s is not run: %s", place, reason)
				case mark == inBackground:
					d.start(place, script)
				case mark == "":
					d.run(place, script)
				default:
					t.Errorf("%s: got the mark %q; want %q, or not run with a reason", place, mark, inBackground)
				}
			}
		})
	}
	if found < 30 {
		t.Errorf("blocks of commands: got %d; want at least 30", found)
	}
}

// setDocumentEnvironment lets commands find the built program, the tools of make, a curl that fails if
// an HTTP request fails, and a database.
func setDocumentEnvironment(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	if path, err := exec.LookPath("curl"); err == nil {
		if err := os.WriteFile(dir+"/curl", []byte("#!/bin/sh\nexec "+path+" --fail-with-body -sS \"$@\"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	tools, err := filepath.Abs(moduleRoot + "/.bin")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", strings.Join([]string{dir, filepath.Dir(servicetest.Program()), tools, os.Getenv("PATH")}, ":"))
	t.Setenv("DATA_SOURCE_NAME", "sqlite:"+dir+"/codes.db")
	if out, err := command(os.Environ(), "migrate").CombinedOutput(); err != nil {
		t.Fatalf("migrate: %v\n%s", err, out)
	}
}

// A document runs the blocks of one page.
type document struct {
	t       *testing.T
	address string // of the service, "" before it was started
}

// run runs a block to its end. If the page has not started the service, run starts dev.
func (d *document) run(place, script string) {
	d.t.Helper()
	for _, tool := range []string{"curl", "grpcurl"} { // tools/deps.sh and make install them
		if _, err := exec.LookPath(tool); err == nil || !regexp.MustCompile(`(?m)^`+tool+` `).MatchString(script) {
			continue
		} else if os.Getenv("CI") != "" {
			d.t.Fatalf("%s: %v", place, err)
		} else {
			fmt.Fprintf(os.Stderr, "skipped %s: %v\n", place, err)
			return
		}
	}
	if strings.Contains(script, documented) && d.address == "" {
		d.address = run(d.t, nil, "dev").serving(d.t).Addr
	}
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	if out, err := d.shell(ctx, script).CombinedOutput(); err != nil {
		d.t.Errorf("%s: %v\n%s\n%s", place, err, script, out)
	} else {
		d.t.Logf("%s:\n%s%s", place, script, out)
	}
}

// start starts a block that serves until the end of the test, on a free port, and waits until it
// accepts connections.
func (d *document) start(place, script string) {
	d.t.Helper()
	listen := servicetest.FreeAddress(d.t)
	cmd := d.shell(context.Background(), script)
	cmd.Env = append(os.Environ(), "PHONENUMBER_LISTEN="+listen, "LOGIN_LISTEN="+listen, "PHONE_NUMBER_SERVICE="+d.address)
	var output testutil.Output
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // with the children of go run
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
			d.t.Errorf("%s: got no running process to kill at the end: %v\n%s", place, err, &output)
		}
		cmd.Wait()
	})
	testutil.Eventually(d.t, place+" accepts connections", func() bool {
		conn, err := net.Dial("tcp", listen)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	if strings.Contains(script, " dev") {
		d.address = listen
	}
}

// shell returns a command that runs a script in the root of the module.
func (d *document) shell(ctx context.Context, script string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "bash", "-eu", "-o", "pipefail", "-c", strings.ReplaceAll(script, documented, d.address))
	cmd.Dir = moduleRoot
	return cmd
}
