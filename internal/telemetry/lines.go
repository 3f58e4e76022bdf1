package telemetry

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	maxPendingBytes = 1 << 20
	// maxWriteBytes is PIPE_BUF: a write of at most so many bytes to a pipe is atomic, so lines
	// of other processes do not split it.
	maxWriteBytes = 4096
	retryInterval = 10 * time.Millisecond
)

// Lines is a writer that never blocks. It keeps lines in a bounded buffer, and one goroutine
// writes them to a file. It drops and counts lines that do not fit into the buffer or cannot
// be written, so that a log without a reader blocks no call.
type Lines struct {
	file    io.Writer
	dropped prometheus.Counter
	wake    chan struct{}
	flushes chan chan struct{}

	mu      sync.Mutex
	pending []byte
	lost    int            // lines dropped since the last call of onLoss
	onLoss  func(lost int) // may be nil

	// Used only by the writing goroutine.
	spare  []byte
	failed bool // the last write failed
	torn   bool // the file ends within a line
}

// NewLines returns a writer of lines to file. It counts dropped lines in dropped.
func NewLines(file io.Writer, dropped prometheus.Counter) *Lines {
	l := &Lines{file: file, dropped: dropped, wake: make(chan struct{}, 1), flushes: make(chan chan struct{})}
	go l.run()
	return l
}

// OnLoss sets a function that is called with the number of dropped lines when lines can be
// written again. It may write to l.
func (l *Lines) OnLoss(f func(lost int)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.onLoss = f
}

// Write implements io.Writer. p must be whole lines. It always succeeds.
func (l *Lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pending)+len(p) > maxPendingBytes {
		l.drop(p)
		return len(p), nil
	}
	l.pending = append(l.pending, p...)
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return len(p), nil
}

// drop counts the lines of p. l.mu must be locked.
func (l *Lines) drop(p []byte) {
	n := bytes.Count(p, []byte("\n"))
	l.lost += n
	l.dropped.Add(float64(n))
}

// Flush waits until all earlier lines are written or dropped, for at most timeout.
func (l *Lines) Flush(timeout time.Duration) {
	expired := time.After(timeout)
	done := make(chan struct{})
	select {
	case l.flushes <- done:
	case <-expired:
		return
	}
	select {
	case <-done:
	case <-expired:
	}
}

func (l *Lines) run() {
	for {
		select {
		case <-l.wake:
			runtime.Gosched() // goroutines that are ready to run add lines to this write
			l.writePending()
		case done := <-l.flushes:
			l.writePending()
			close(done)
		}
	}
}

func (l *Lines) writePending() {
	for {
		l.mu.Lock()
		batch := l.pending
		l.pending = l.spare[:0]
		lost, onLoss := l.lost, l.onLoss
		if l.failed || onLoss == nil {
			lost = 0
		}
		l.lost -= lost
		l.mu.Unlock()
		l.spare = batch
		if lost > 0 {
			// The buffer is empty now, so the line of onLoss fits. It is written after batch,
			// where the dropped lines would be.
			onLoss(lost)
		} else if len(batch) == 0 {
			return
		}
		l.writeBatch(batch)
	}
}

func (l *Lines) writeBatch(batch []byte) {
	for len(batch) > 0 {
		chunk := firstLines(batch)
		n, err := l.writeChunk(chunk)
		if errors.Is(err, syscall.EAGAIN) { // another process made the pipe non-blocking
			batch = batch[n:]
			time.Sleep(retryInterval)
			continue
		}
		if l.failed = err != nil; l.failed {
			l.torn = l.torn || n > 0 && chunk[n-1] != '\n'
			l.mu.Lock()
			l.drop(chunk[n:])
			l.mu.Unlock()
		}
		batch = batch[len(chunk):]
	}
}

// writeChunk writes chunk to the file, on a new line.
func (l *Lines) writeChunk(chunk []byte) (int, error) {
	if l.torn {
		if _, err := l.file.Write([]byte("\n")); err != nil {
			return 0, err
		}
		l.torn = false
	}
	return l.file.Write(chunk)
}

// firstLines returns the first lines of batch that fit into one write, at least one.
func firstLines(batch []byte) []byte {
	if len(batch) <= maxWriteBytes {
		return batch
	}
	end := bytes.LastIndexByte(batch[:maxWriteBytes], '\n')
	if end < 0 {
		end = maxWriteBytes + bytes.IndexByte(batch[maxWriteBytes:], '\n')
	}
	return batch[:end+1]
}
