package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// lastLinesTimeout is the time for the last lines when the process ends.
const lastLinesTimeout = time.Second

// smallPipe returns a pipe with a buffer of one page. Its write end blocks.
func smallPipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, w.Fd(), syscall.F_SETPIPE_SZ, 4096); errno != 0 {
		t.Fatal(errno)
	}
	return r, w
}

// runWithStreams starts the program with stdout and stderr, without waiting for it.
func runWithStreams(t *testing.T, stdout, stderr io.Writer, env []string, args ...string) process {
	t.Helper()
	return process{servicetest.StartWithStreams(t, stdout, stderr, servicetest.Program(), servicetest.FreeAddress(t), env, args...)}
}

// check makes n calls from 16 goroutines. Each call has a deadline.
func (p process) check(t *testing.T, n int) {
	t.Helper()
	var calling sync.WaitGroup
	for range 16 {
		calling.Go(func() {
			for range n / 16 {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				_, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18600000000", Code: "x"})
				cancel()
				if err != nil {
					t.Errorf("Valid: %v", err)
					return
				}
			}
		})
	}
	calling.Wait()
}

// droppedLines returns the number of dropped log lines according to the metrics.
func droppedLines(t *testing.T, metrics string) int {
	t.Helper()
	m := regexp.MustCompile(`(?m)^phonenumber_log_lines_dropped_total (\S+)$`).FindStringSubmatch(testutil.Get(t, metrics, "/metrics", 200))
	if m == nil {
		t.Fatal("the metrics lack phonenumber_log_lines_dropped_total")
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// A closed stream or a full disk drops log lines. It has no other effect.
func TestLog_WriteErrorFailsNoCall(t *testing.T) {
	for _, c := range []struct {
		name string
		open func(t *testing.T) (stderr *os.File, fail func())
	}{
		{"closed by the reader", func(t *testing.T) (*os.File, func()) {
			r, w := smallPipe(t)
			lines := bufio.NewScanner(r)
			return w, func() { lines.Scan(); r.Close() }
		}},
		{"a full disk", func(t *testing.T) (*os.File, func()) {
			full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { full.Close() })
			return full, func() {}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			fake, metrics := dysmsapitest.New(t), servicetest.FreeAddress(t)
			stderr, fail := c.open(t)
			env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), "PHONENUMBER_METRICS_LISTEN="+metrics)
			p := runWithStreams(t, nil, stderr, env).serving(t)
			fail()
			p.check(t, 160)
			p.send(t, "18612345678")
			if !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
				t.Error("the sent code: got invalid; want valid")
			}
			testutil.Eventually(t, "the dropped lines of 162 calls are counted", func() bool { return droppedLines(t, metrics) >= 162 })
			p.mustStop(t)
		})
	}
}

func TestLog_UnreadBlocksNoCall(t *testing.T) {
	for _, c := range []struct {
		name        string
		env         []string
		nonBlocking bool
		calls       int
		drops       bool
	}{
		{"text", nil, false, 480, false},
		{"json", []string{"PHONENUMBER_LOG_FORMAT=json"}, true, 480, false},
		{"everything", []string{
			"PHONENUMBER_LOG_FORMAT=json", "PHONENUMBER_LOG_LEVEL=debug", "GRPC_GO_LOG_SEVERITY_LEVEL=info", "GRPC_GO_LOG_VERBOSITY_LEVEL=99",
			"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1", "OTEL_BSP_SCHEDULE_DELAY=100",
		}, false, 6400, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fake, metrics := dysmsapitest.New(t), servicetest.FreeAddress(t)
			_, w := smallPipe(t)
			env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")),
				append(c.env, "PHONENUMBER_METRICS_LISTEN="+metrics)...)
			p := runWithStreams(t, nil, w, env).serving(t)
			if err := syscall.SetNonblock(int(w.Fd()), c.nonBlocking); err != nil { // also in the program
				t.Fatal(err)
			}
			p.check(t, c.calls)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if _, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
				t.Errorf("SendSMS: %v", err)
			}
			p.serving(t)
			testutil.Get(t, metrics, "/readyz", 200)
			if dropped := droppedLines(t, metrics) > 0; dropped != c.drops {
				t.Errorf("log lines were dropped: got %v; want %v", dropped, c.drops)
			}
			signaled := time.Now()
			p.mustStop(t)
			if took := time.Since(signaled); took < lastLinesTimeout {
				t.Errorf("the program ended %v after SIGTERM; want it to wait %v for a reader", took, lastLinesTimeout)
			}
		})
	}
}

// Each call has its own trace ID, made of the numbers of its caller and of the call. The trace
// IDs of the log lines must be in the order of the calls.
func TestLog_ReadHasEveryLineInOrder(t *testing.T) {
	const callers, calls = 8, 400
	fake, metrics := dysmsapitest.New(t), servicetest.FreeAddress(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")),
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_LOG_FORMAT=json", "PHONENUMBER_LOG_LEVEL=debug")
	p := runWithStreams(t, nil, w, env)
	w.Close()
	type line struct {
		Msg     string
		TraceID string `json:"trace_id"`
	}
	var lines []line
	var invalid string
	read := make(chan struct{})
	go func() {
		defer close(read)
		for scanner := bufio.NewScanner(r); scanner.Scan(); {
			var l line
			if json.Unmarshal(scanner.Bytes(), &l) != nil {
				invalid = scanner.Text()
			}
			lines = append(lines, l)
		}
	}()
	p.serving(t)
	var calling sync.WaitGroup
	for caller := range callers {
		calling.Go(func() {
			for call := range calls {
				ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", fmt.Sprintf("00-%016x%016x-0000000000000001-01", caller+1, call))
				if _, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18600000000", Code: "x"}); err != nil {
					t.Errorf("Valid: %v", err)
					return
				}
			}
		})
	}
	calling.Wait()
	dropped := droppedLines(t, metrics)
	p.mustStop(t)
	<-read
	if dropped != 0 {
		t.Errorf("dropped lines: got %d; want 0", dropped)
	}
	if invalid != "" {
		t.Errorf("got the line %q; want JSON", invalid)
	}
	if last := lines[len(lines)-1].Msg; last != "stopped" {
		t.Errorf("last line: got %q; want stopped", last)
	}
	next := map[string]int{} // by caller: lines read, two per call
	for _, l := range lines {
		if len(l.TraceID) != 32 {
			continue
		}
		caller := l.TraceID[:16]
		want := fmt.Sprintf("%s of %s%016x", []string{"step", "call"}[next[caller]%2], caller, next[caller]/2)
		if got := l.Msg + " of " + l.TraceID; got != want {
			t.Fatalf("next line of caller %s: got %s; want %s", caller, got, want)
		}
		next[caller]++
	}
	for caller, n := range next {
		if n != 2*calls {
			t.Errorf("lines of caller %s: got %d; want %d", caller, n, 2*calls)
		}
	}
	if len(next) != callers {
		t.Errorf("callers with lines: got %d; want %d", len(next), callers)
	}
}

// Stderr is a pipe that is closed or full.
func TestCommands_ExitWithCodeIfStderrIsBlocked(t *testing.T) {
	r, closed := smallPipe(t)
	r.Close()
	_, full := smallPipe(t)
	if n, err := full.Write(make([]byte, 4096)); err != nil {
		t.Fatalf("wrote %d: %v", n, err)
	}
	for name, stderr := range map[string]*os.File{"closed": closed, "full": full} {
		for _, args := range [][]string{{"serve"}, {"migrate"}, {"serve", "--unknown"}} {
			cmd := command(nil, args...)
			cmd.Stderr = stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			kill := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
			cmd.Wait()
			kill.Stop()
			if code := cmd.ProcessState.ExitCode(); code <= 0 {
				t.Errorf("%v, stderr %s: got %v; want an exit code above 0", args, name, cmd.ProcessState)
			}
		}
	}
}
