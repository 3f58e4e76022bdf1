package telemetry

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

func newLines(file io.Writer) (*Lines, prometheus.Counter) {
	dropped := prometheus.NewCounter(prometheus.CounterOpts{Name: "dropped"})
	return NewLines(file, dropped), dropped
}

// BenchmarkLine compares log lines that are written to a pipe directly with lines that go
// through Lines. Another process reads the pipe, so cpu-ns/op is the CPU time of the writer
// only.
func BenchmarkLine(b *testing.B) {
	for _, callers := range []int{1, 64} {
		for _, kind := range []string{"direct", "lines"} {
			b.Run(fmt.Sprintf("%s/callers=%d", kind, callers), func(b *testing.B) {
				reader := exec.Command("cat")
				r, w, err := os.Pipe()
				if err != nil {
					b.Fatal(err)
				}
				defer w.Close()
				w.Fd() // makes it blocking, as stderr is
				reader.Stdin = r
				if err := reader.Start(); err != nil {
					b.Fatal(err)
				}
				r.Close()
				var out io.Writer = w
				lines, dropped := newLines(w)
				if kind == "lines" {
					out = lines
				}
				log := slog.New(NewLogHandler(slog.NewJSONHandler(out, nil)))
				before := cpu()
				b.ResetTimer()
				var calling sync.WaitGroup
				for range callers {
					calling.Go(func() {
						for range b.N / callers {
							log.Info("call", "method", "Valid", "status", "OK", "duration_ms", 1.25, "peer", "127.0.0.1", "number", "+86186****0000", "country",
								"CN", "outcome", "mismatch")
							runtime.Gosched() // as between two calls
						}
					})
				}
				calling.Wait()
				lines.Flush(time.Minute)
				b.ReportMetric(float64(cpu()-before)/float64(b.N), "cpu-ns/op")
				b.ReportMetric(valueOf(dropped)/float64(b.N), "dropped/op")
			})
		}
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func valueOf(c prometheus.Counter) float64 {
	var m dto.Metric
	c.Write(&m)
	return m.GetCounter().GetValue()
}

// scriptedFile handles its first writes according to results, and accepts all later ones.
type scriptedFile struct {
	testutil.Output
	mu      sync.Mutex
	results []writeResult
}

type writeResult struct {
	n   int
	err error
}

func (f *scriptedFile) script(a ...writeResult) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.results = append(f.results, a...)
}

func (f *scriptedFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.results) == 0 {
		return f.Output.Write(p)
	}
	a := f.results[0]
	f.results = f.results[1:]
	f.Output.Write(p[:a.n])
	return a.n, a.err
}

// blockedFile blocks each write until open is closed.
type blockedFile struct {
	testutil.Output
	begun  chan struct{} // the first write began
	open   chan struct{}
	writes []string
}

func newBlockedFile() *blockedFile {
	return &blockedFile{begun: make(chan struct{}, 1), open: make(chan struct{})}
}

func (f *blockedFile) Write(p []byte) (int, error) {
	select {
	case f.begun <- struct{}{}:
	default:
	}
	<-f.open
	f.writes = append(f.writes, string(p))
	return f.Output.Write(p)
}

func TestLines_KeepTheOrderOfEachWriter(t *testing.T) {
	const writers, each = 8, 2000
	var file testutil.Output
	l, dropped := newLines(&file)
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				fmt.Fprintf(l, "%d %d\n", w, i)
			}
		})
	}
	writing.Wait()
	l.Flush(time.Minute)
	var next [writers]int
	for line := range strings.Lines(file.String()) {
		var w, i int
		if n, err := fmt.Sscanf(line, "%d %d\n", &w, &i); n != 2 || i != next[w] {
			t.Fatalf("got the line %q, %v; want line %d of that writer", line, err, next[w])
		}
		next[w]++
	}
	for w, n := range next {
		if n != each {
			t.Errorf("writer %d: got %d lines; want %d", w, n, each)
		}
	}
	if n := valueOf(dropped); n != 0 {
		t.Errorf("got %v dropped lines; want none", n)
	}
}

// The line of OnLoss is at the place of the lost lines.
func TestLines_DropAndCountLinesThatDoNotFit(t *testing.T) {
	file := newBlockedFile()
	l, dropped := newLines(file)
	l.OnLoss(func(lost int) { fmt.Fprintf(l, "lost %d\n", lost) })
	line := strings.Repeat("x", 99) + "\n"
	io.WriteString(l, line)
	<-file.begun // the buffer is empty again
	const fit, more = maxPendingBytes / 100, 1000
	for range fit + more {
		io.WriteString(l, line)
	}
	if n := valueOf(dropped); n != more {
		t.Errorf("got %v dropped lines; want %d", n, more)
	}
	close(file.open)
	l.Flush(time.Minute)
	io.WriteString(l, "after\n")
	l.Flush(time.Minute)
	if got, want := file.String(), strings.Repeat(line, 1+fit)+fmt.Sprintf("lost %d\nafter\n", more); got != want {
		t.Errorf("got %d bytes that end with %q; want %d that end with %q", len(got), got[max(0, len(got)-30):], len(want), want[len(want)-30:])
	}
}

func TestLines_DropAndCountFailedLines(t *testing.T) {
	file := &scriptedFile{}
	file.script(writeResult{0, syscall.EPIPE}, writeResult{0, syscall.EPIPE})
	l, dropped := newLines(file)
	l.OnLoss(func(lost int) { fmt.Fprintf(l, "lost %d\n", lost) })
	writeAndFlush(l, "one\n", "two\nthree\n", "four\n")
	checkWritten(t, file, "four\nlost 3\n", dropped, 3)
}

func TestLines_BeginANewLineAfterATornOne(t *testing.T) {
	file := &scriptedFile{}
	file.script(writeResult{5, syscall.ENOSPC})
	l, dropped := newLines(file)
	writeAndFlush(l, "one\ntwo\nthree\n", "four\n")
	checkWritten(t, file, "one\nt\nfour\n", dropped, 2)
}

// writeAndFlush writes each of texts, and waits until the file has it.
func writeAndFlush(l *Lines, texts ...string) {
	for _, text := range texts {
		io.WriteString(l, text)
		l.Flush(time.Minute)
	}
}

// checkWritten compares the content of file and the number of dropped lines.
func checkWritten(t *testing.T, file *scriptedFile, want string, dropped prometheus.Counter, wantDropped float64) {
	t.Helper()
	if got := file.String(); got != want {
		t.Errorf("got %q; want %q", got, want)
	}
	if n := valueOf(dropped); n != wantDropped {
		t.Errorf("got %v dropped lines; want %v", n, wantDropped)
	}
}

func TestLines_WaitForANonBlockingPipe(t *testing.T) {
	file := &scriptedFile{}
	again := &os.PathError{Op: "write", Path: "/dev/stderr", Err: syscall.EAGAIN}
	file.script(writeResult{0, again}, writeResult{2, again})
	l, dropped := newLines(file)
	io.WriteString(l, "one\ntwo\n")
	l.Flush(time.Minute)
	if got, want := file.String(), "one\ntwo\n"; got != want || valueOf(dropped) != 0 {
		t.Errorf("got %q and %v dropped lines; want %q and none", got, valueOf(dropped), want)
	}
}

// Other processes can write to the same pipe.
func TestLines_WriteToAPipeAtomically(t *testing.T) {
	file := newBlockedFile()
	l, _ := newLines(file)
	var want bytes.Buffer
	io.WriteString(io.MultiWriter(l, &want), "first\n")
	<-file.begun // the next lines wait for it
	for i := range 200 {
		fmt.Fprintf(io.MultiWriter(l, &want), "%d %s\n", i, strings.Repeat("x", i))
	}
	long := strings.Repeat("y", maxWriteBytes) + "\n"
	io.WriteString(io.MultiWriter(l, &want), long+"after\n")
	close(file.open)
	l.Flush(time.Minute)
	for _, w := range file.writes {
		if len(w) > maxWriteBytes && w != long || !strings.HasSuffix(w, "\n") {
			t.Errorf("got a write of %d bytes that ends with %q; want whole lines of at most %d bytes, or one line", len(w), w[len(w)-1:], maxWriteBytes)
		}
	}
	if file.String() != want.String() {
		t.Errorf("got %d bytes; want the %d bytes in their order", len(file.String()), want.Len())
	}
	if len(file.writes) > 20 {
		t.Errorf("got %d writes; want 20 at most, of several lines each", len(file.writes))
	}
}

func TestLines_FlushForABoundedTime(t *testing.T) {
	file := newBlockedFile()
	defer close(file.open)
	l, _ := newLines(file)
	io.WriteString(l, "one\n")
	<-file.begun
	flushed := make(chan struct{})
	go func() {
		l.Flush(10 * time.Millisecond)
		close(flushed)
	}()
	select {
	case <-flushed:
	case <-time.After(time.Minute):
		t.Error("Flush still waits for a blocked file; want it to return after 10 ms")
	}
}
