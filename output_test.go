package main

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
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// smallPipe returns a pipe that holds one page. Its write end blocks.
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

// runWithStreams starts the program with these streams.
func runWithStreams(t *testing.T, stdout, stderr io.Writer, env []string, args ...string) process {
	t.Helper()
	return process{servicetest.StartWithStreams(t, stdout, stderr, binary(), servicetest.FreeAddress(t), env, args...)}
}

// check makes n calls, of 16 callers at once, each with a deadline.
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

// mustStop sends SIGTERM, and wants exit code 0 within the time that docs/install.md asks for.
func (p process) mustStop(t *testing.T) {
	t.Helper()
	p.Signal(syscall.SIGTERM)
	p.mustEnd(t)
}

func (p process) mustEnd(t *testing.T) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("exit: got %v; want code 0", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("it runs 30 s after the signal; want it ended")
	}
}

func droppedLines(t *testing.T, metrics string) int {
	t.Helper()
	m := regexp.MustCompile(`(?m)^phonenumber_log_lines_dropped_total (\S+)$`).FindStringSubmatch(get(t, metrics, "/metrics", 200))
	if m == nil {
		t.Fatal("the metrics lack phonenumber_log_lines_dropped_total")
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// A stream that is closed, or a disk that is full, costs lines and nothing else.
func TestLog_WriteErrorFailsNoCall(t *testing.T) {
	for _, c := range []struct {
		name string
		open func(t *testing.T) (stderr *os.File, fail func())
	}{
		{"a reader that goes away", func(t *testing.T) (*os.File, func()) {
			r, w := smallPipe(t)
			scanned := bufio.NewScanner(r)
			return w, func() { scanned.Scan(); r.Close() }
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
			if !p.valid(t, "18612345678", lastCode(fake)) {
				t.Error("a right code is refused")
			}
			eventually(t, "the lines of 162 calls are counted as dropped", func() bool { return droppedLines(t, metrics) >= 162 })
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
			env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), append(c.env, "PHONENUMBER_METRICS_LISTEN="+metrics)...)
			p := runWithStreams(t, nil, w, env).serving(t)
			if err := syscall.SetNonblock(int(w.Fd()), c.nonBlocking); err != nil { // of its end too
				t.Fatal(err)
			}
			p.check(t, c.calls)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if _, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
				t.Errorf("SendSMS: %v", err)
			}
			p.serving(t)
			get(t, metrics, "/readyz", 200)
			if dropped := droppedLines(t, metrics) > 0; dropped != c.drops {
				t.Errorf("lines are dropped: got %v; want %v", dropped, c.drops)
			}
			signalled := time.Now()
			p.mustStop(t)
			if took := time.Since(signalled); took < lastLinesTimeout {
				t.Errorf("it ended after %v; want it to wait %v for a reader", took, lastLinesTimeout)
			}
		})
	}
}

// The trace of a call, as its caller sent it, says in which order lines belong.
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
	var wrong string
	read := make(chan struct{})
	go func() {
		defer close(read)
		for scanner := bufio.NewScanner(r); scanner.Scan(); {
			var l line
			if json.Unmarshal(scanner.Bytes(), &l) != nil {
				wrong = scanner.Text()
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
	if dropped != 0 || wrong != "" {
		t.Errorf("got %d dropped lines, and the line %q that is no JSON; want neither", dropped, wrong)
	}
	if last := lines[len(lines)-1].Msg; last != "stopped" {
		t.Errorf("the last line: got %q; want stopped", last)
	}
	next := map[string]int{} // by caller: twice the calls whose lines were read
	for _, l := range lines {
		if len(l.TraceID) != 32 {
			continue
		}
		caller := l.TraceID[:16]
		want := fmt.Sprintf("%s of %s%016x", []string{"step", "call"}[next[caller]%2], caller, next[caller]/2)
		if got := l.Msg + " of " + l.TraceID; got != want {
			t.Fatalf("got the line %s; want %s", got, want)
		}
		next[caller]++
	}
	for caller, n := range next {
		if n != 2*calls {
			t.Errorf("caller %s: got %d lines; want %d", caller, n, 2*calls)
		}
	}
	if len(next) != callers {
		t.Errorf("got lines of %d callers; want %d", len(next), callers)
	}
}

// As dev | head -3 does, and a terminal that stands still.
func TestDev_NeedsNoReaderOfItsStdout(t *testing.T) {
	for _, goes := range []bool{true, false} {
		t.Run(fmt.Sprint("goes away ", goes), func(t *testing.T) {
			r, w := smallPipe(t)
			stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
			if err != nil {
				t.Fatal(err)
			}
			defer stderr.Close()
			p := runWithStreams(t, w, stderr, nil, "dev").serving(t)
			if goes {
				if !bufio.NewScanner(r).Scan() {
					t.Error("no banner was written")
				}
				r.Close()
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			for i := range 200 {
				if _, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("186%08d", i)}); err != nil {
					t.Fatalf("SendSMS %d: %v", i, err)
				}
			}
			p.mustStop(t)
		})
	}
}

func TestCommands_ExitWithCodeIfStderrIsBlocked(t *testing.T) {
	r, closed := smallPipe(t)
	r.Close()
	_, full := smallPipe(t)
	if n, err := full.Write(make([]byte, 4096)); err != nil {
		t.Fatalf("wrote %d: %v", n, err)
	}
	for name, stderr := range map[string]*os.File{"closed": closed, "full": full} {
		for _, args := range [][]string{{"serve"}, {"migrate"}, {"serve", "--unknown"}} {
			cmd := program(nil, args...)
			cmd.Stderr = stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			kill := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
			cmd.Wait()
			kill.Stop()
			if code := cmd.ProcessState.ExitCode(); code <= 0 {
				t.Errorf("%v, stderr %s: got %v; want an exit code", args, name, cmd.ProcessState)
			}
		}
	}
}

func TestSIGHUP_DrainsLikeSIGTERM(t *testing.T) {
	for _, signals := range [][]syscall.Signal{{syscall.SIGHUP}, {syscall.SIGHUP, syscall.SIGHUP}, {syscall.SIGTERM, syscall.SIGHUP}, {syscall.SIGHUP, syscall.SIGTERM}} {
		t.Run(fmt.Sprint(signals), func(t *testing.T) {
			fake := dysmsapitest.New(t)
			p := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
			fake.Next(dysmsapitest.Delay(2 * time.Second))
			done := make(chan error, 1)
			go func() {
				_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
				done <- err
			}()
			eventually(t, "Aliyun is asked", func() bool { return len(fake.Accepted()) > 0 })
			for _, s := range signals {
				p.Signal(s)
				eventually(t, "it drains", func() bool { return strings.Contains(p.Output.String(), "draining") || len(done) > 0 })
			}
			if err := <-done; err != nil {
				t.Errorf("the call in flight: %v", err)
			}
			p.mustEnd(t)
		})
	}
}

func TestSIGHUP_StaysIgnoredUnderNohup(t *testing.T) {
	p := process{servicetest.Start(t, "/bin/sh", servicetest.FreeAddress(t), nil, "-c", `trap "" HUP; exec "$0" dev`, binary())}.serving(t)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	ignored, err := strconv.ParseUint(regexp.MustCompile(`SigIgn:\s*(\w+)`).FindStringSubmatch(string(status))[1], 16, 64)
	if err != nil || ignored&(1<<(syscall.SIGHUP-1)) == 0 {
		t.Errorf("ignored signals: got %x, %v; want SIGHUP among them", ignored, err)
	}
}
