package observe

import (
	"context"
	"log/slog"
	"regexp"
	"slices"
	"sync"
	"time"
)

// Of equal warnings and errors, so many are written in such a time.
const (
	maxPerWindow = 10
	sampleWindow = 10 * time.Second
	maxGroups    = 1000 // in one window; what is beyond is one more kind
)

// What makes two lines equal, besides level and message. Of an error, ports are not:
// each connection has another.
var (
	tellingApart = []string{"method", "status", "aliyun_code", "error", "panic", "reason"}
	port         = regexp.MustCompile(`:[0-9]+\b`)
)

// CallerHandler writes to next, with who makes the call that a line belongs to.
type CallerHandler struct{ slog.Handler }

// Handle implements slog.Handler.
func (h CallerHandler) Handle(ctx context.Context, r slog.Record) error {
	if name := CallerOf(ctx); name != "" {
		r.AddAttrs(slog.String("caller", name))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h CallerHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return CallerHandler{h.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (h CallerHandler) WithGroup(name string) slog.Handler {
	return CallerHandler{h.Handler.WithGroup(name)}
}

// SamplingHandler writes to next the first ten of equal warnings and errors in ten seconds,
// then how many more there were. All else it passes on.
type SamplingHandler struct {
	slog.Handler
	burst *burst
}

// NewSampled returns a handler that writes to next.
func NewSampled(next slog.Handler) SamplingHandler {
	return SamplingHandler{next, &burst{handler: next, lines: map[string]*equals{}}}
}

type burst struct {
	handler slog.Handler
	mu      sync.Mutex
	lines   map[string]*equals // of this window
}

type equals struct {
	first slog.Record
	count int
}

// Handle implements slog.Handler.
func (s SamplingHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn && s.burst.leavesOut(r) {
		return nil
	}
	return s.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (s SamplingHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return SamplingHandler{s.Handler.WithAttrs(attrs), s.burst}
}

// WithGroup implements slog.Handler.
func (s SamplingHandler) WithGroup(name string) slog.Handler {
	return SamplingHandler{s.Handler.WithGroup(name), s.burst}
}

// Flush tells at once what was left out.
func (s SamplingHandler) Flush() { s.burst.tell() }

func (b *burst) leavesOut(r slog.Record) bool {
	key := r.Level.String() + r.Message
	r.Attrs(func(a slog.Attr) bool {
		if tellsApart(a) {
			key += "\x00" + port.ReplaceAllString(a.Value.String(), "")
		}
		return true
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.lines) == 0 {
		time.AfterFunc(sampleWindow, b.tell)
	}
	if b.lines[key] == nil && len(b.lines) >= maxGroups {
		key = r.Level.String()
	}
	line := b.lines[key]
	if line == nil {
		line = &equals{first: r}
		b.lines[key] = line
	}
	line.count++
	return line.count > maxPerWindow
}

func tellsApart(a slog.Attr) bool { return slices.Contains(tellingApart, a.Key) }

// tell ends the window.
func (b *burst) tell() {
	b.mu.Lock()
	lines := b.lines
	b.lines = map[string]*equals{}
	b.mu.Unlock()
	for _, line := range lines {
		if line.count <= maxPerWindow {
			continue
		}
		r := slog.NewRecord(time.Now(), line.first.Level, "more lines like these were left out", 0)
		r.AddAttrs(slog.String("like", line.first.Message), slog.Int("count", line.count-maxPerWindow))
		line.first.Attrs(func(a slog.Attr) bool {
			if tellsApart(a) {
				r.AddAttrs(a)
			}
			return true
		})
		b.handler.Handle(context.Background(), r)
	}
}
