package testutil

import (
	"bytes"
	"strings"
	"sync"
)

// Output is a writer for several goroutines, such as the output of a process or a log. Its zero
// value is ready for use.
type Output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

// String returns all text so far.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// Contains reports whether text was written.
func (o *Output) Contains(text string) bool { return strings.Contains(o.String(), text) }

// Count returns how many times text was written.
func (o *Output) Count(text string) int { return strings.Count(o.String(), text) }
