// Package examples tests the programs in examples/: each runs as a process with scripted input,
// against dev and serve. Their READMEs have the commands.
package examples

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

const folder = "../../examples"

// A language is one folder of examples.
type language struct {
	name     string
	needs    []string // commands
	howToGet string
}

// missing returns the first command that this machine lacks, or "".
func (l language) missing() string {
	for _, command := range l.needs {
		if _, err := exec.LookPath(command); err != nil {
			return command
		}
	}
	return ""
}

var languages = []language{
	{"go", []string{"go"}, "Go 1.26"},
	{"java", []string{"javac", "mvn"}, "make deps-examples"},
	{"node", []string{"node", "npm"}, "make deps-examples"},
	{"python", []string{"python3"}, "make deps-examples"},
	{"php", []string{"php"}, "make deps-examples"},
	{"ruby", []string{"ruby", "grpc_ruby_plugin"}, "make deps-examples"},
	{"cpp", []string{"g++", "cmake", "grpc_cpp_plugin"}, "make deps-examples"},
	{"csharp", []string{"mcs", "mono"}, "make deps-examples"},
	{"rust", []string{"cargo", "protoc"}, "make deps-examples"},
	{"shell", []string{"curl", "jq", "grpcurl"}, "make deps-examples .bin/grpcurl-1.9.4"},
}

// A program is one example, after its build.
type program struct {
	name    string
	dir     string
	command string // without the phone number
}

// The phone number in the READMEs, and the block of commands.
const readmeNumber = " 18600000000"

var commandBlock = regexp.MustCompile("(?s)```sh\n(.*?)```")

// builds has a function for each language, which builds its examples at the first call.
var builds = func() map[string]func() ([]program, error) {
	all := map[string]func() ([]program, error){}
	for _, l := range languages {
		all[l.name] = sync.OnceValues(func() ([]program, error) { return build(l.name) })
	}
	return all
}()

// build runs the commands in the README of a language. A line that ends with the phone number starts
// a program; the others build.
func build(language string) (all []program, err error) {
	dir := filepath.Join(folder, language)
	readme, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		return nil, err
	}
	block := commandBlock.FindSubmatch(readme)
	if block == nil {
		return nil, fmt.Errorf("%s: the README has no block of commands", language)
	}
	began := time.Now()
	for line := range strings.Lines(string(block[1])) {
		line = strings.TrimSpace(line)
		if command, ok := strings.CutSuffix(line, readmeNumber); ok {
			words := strings.Fields(command)
			all = append(all, program{path.Join(language, path.Base(words[len(words)-1])), dir, command})
			continue
		}
		cmd := exec.Command("sh", "-c", line)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%s: %s: %w\n%s", language, line, err, out)
		}
	}
	fmt.Printf("%s: built in %v\n", language, time.Since(began).Round(100*time.Millisecond))
	return all, nil
}

// available builds the examples of a language, and returns them, if this machine has its commands. Under
// CI none may be missing.
func available(t *testing.T, l language) []program {
	t.Helper()
	missing := l.missing()
	switch {
	case missing == "":
		all, err := builds[l.name]()
		if err != nil {
			t.Fatal(err)
		}
		return all
	case os.Getenv("CI") != "":
		t.Errorf("no %s: %s", missing, l.howToGet)
	default:
		fmt.Fprintf(os.Stderr, "skipped the examples in %s: no %s: %s\n", l.name, missing, l.howToGet)
	}
	return nil
}

// allAvailable builds the examples of all languages at once, and returns the available ones.
func allAvailable(t *testing.T) (all []program) {
	t.Helper()
	for _, l := range languages {
		if l.missing() == "" {
			go builds[l.name]()
		}
	}
	for _, l := range languages {
		all = append(all, available(t, l)...)
	}
	return all
}

// each runs test for every available example.
func each(t *testing.T, test func(t *testing.T, p program)) {
	t.Helper()
	for _, p := range allAvailable(t) {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			test(t, p)
		})
	}
}

// A session is a running example: one person logs in.
type session struct {
	t      *testing.T
	name   string
	number string
	stdin  io.Writer
	output testutil.Output
	errors testutil.Output
	read   int // bytes of the output that were expected
	exited chan struct{}
	err    error
}

var numbers atomic.Int64

// newNumber returns a phone number that no other test uses.
func newNumber() string { return fmt.Sprintf("186%08d", numbers.Add(1)) }

// start starts an example for a number, with further variables.
func (p program) start(t *testing.T, number, address string, env ...string) *session {
	t.Helper()
	cmd := exec.Command("sh", "-c", "exec "+p.command+" "+number)
	cmd.Dir = p.dir
	cmd.Env = append(append(os.Environ(), "PHONE_NUMBER_SERVICE="+address), env...)
	s := &session{t: t, name: p.name, number: number, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &s.output, &s.errors
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.stdin = stdin
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		s.err = cmd.Wait()
		close(s.exited)
	}()
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		<-s.exited
		if t.Failed() {
			t.Logf("output of %s:\n%s\n%s", p.name, &s.output, &s.errors)
		}
	})
	return s
}

// patience is longer than an example takes to start and to wait for its deadline, on a busy machine.
const patience = 2 * time.Minute

// reads requires text as the next output.
func (s *session) reads(text string) {
	s.t.Helper()
	deadline := time.After(patience)
	for gone := false; ; {
		rest := s.output.String()[s.read:]
		switch {
		case strings.HasPrefix(rest, text):
			s.read += len(text)
			return
		case gone || !strings.HasPrefix(text, rest):
			s.t.Fatalf("%s: output: got %q; want %q", s.name, rest, text)
		}
		select {
		case <-s.exited:
			gone = true
		case <-deadline:
			gone = true
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// types types a line at the prompt.
func (s *session) types(line string) {
	s.t.Helper()
	s.reads("Code (empty for another one): ")
	if _, err := io.WriteString(s.stdin, line+"\n"); err != nil {
		s.t.Fatal(err)
	}
}

// ends requires the end of the example, with no more output.
func (s *session) ends(success bool) {
	s.t.Helper()
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.t.Fatalf("%s: still runs; want its end", s.name)
	}
	if (s.err == nil) != success {
		s.t.Errorf("%s: exit: got %v; want success %t", s.name, s.err, success)
	}
	if rest := s.output.String()[s.read:]; rest != "" {
		s.t.Errorf("%s: output: got %q; want no more", s.name, rest)
	}
}

// The texts that examples show to the person.
func (s *session) sent() { s.t.Helper(); s.reads("We sent a code to " + s.number + ".\n") }

func (s *session) late()     { s.t.Helper(); s.reads("The code may come late. Type it if it comes.\n") }
func (s *session) notSent()  { s.t.Helper(); s.reads("No code was sent. Try again later.\n") }
func (s *session) noMobile() { s.t.Helper(); s.reads(s.number + " is not a mobile number.\n") }
func (s *session) refuses() {
	s.t.Helper()
	s.reads("This number does not accept our SMS; please use another one, or contact us.\n")
}

func (s *session) country() {
	s.t.Helper()
	s.reads("We cannot send codes to this country or region.\n")
}

func (s *session) limited(seconds int) {
	s.t.Helper()
	s.reads(fmt.Sprintf("Too many codes. Try again in %d seconds.\n", seconds))
}
func (s *session) wrong()      { s.t.Helper(); s.reads("This code is not valid.\n") }
func (s *session) notChecked() { s.t.Helper(); s.reads("The code was not checked. Type it again.\n") }

func (s *session) mayCount() {
	s.t.Helper()
	s.reads("The check may have counted. Type the code again; if it fails, ask for another one.\n")
}

func (s *session) welcome() {
	s.t.Helper()
	s.reads("Welcome.\n")
	s.ends(true)
}
