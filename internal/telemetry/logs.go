package telemetry

import (
	"context"
	"log/slog"
	"regexp"
	"slices"
	"sync"
	"time"
)

// At most maxPerWindow similar warnings or errors are logged in each sampleWindow.
const (
	maxPerWindow = 10
	sampleWindow = 10 * time.Second
	maxGroups    = 1000 // per window; further groups share one for each level
)

// Two records are similar if level, message and these attributes match. Port numbers are
// ignored, since every connection has its own.
var (
	groupKeys = []string{"method", "status", "aliyun_code", "error_code", "error", "panic", "reason"}
	port      = regexp.MustCompile(`:[0-9]+\b`)
)

// LogHandler adds the caller's name to each record of a call. It passes on the first maxPerWindow
// similar warnings and errors of a sampleWindow, then one record with the number of the others. It passes
// on all records of lower levels.
type LogHandler struct {
	slog.Handler
	*sampler // shared by the handlers of WithAttrs and WithGroup
}

// NewLogHandler returns a handler that writes to next.
func NewLogHandler(next slog.Handler) LogHandler {
	return LogHandler{next, &sampler{next: next, groups: map[string]*group{}}}
}

// sampler counts the warnings and errors of the current window by group.
type sampler struct {
	next slog.Handler // of the records with the numbers of others

	mu     sync.Mutex
	groups map[string]*group // of this window
}

// group is the first of similar records, and their number.
type group struct {
	first slog.Record
	count int
}

// Handle implements slog.Handler.
func (h LogHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn && h.suppress(r) {
		return nil
	}
	if name := CallerOf(ctx); name != "" {
		r.AddAttrs(slog.String("caller", name))
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h LogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return LogHandler{h.Handler.WithAttrs(attrs), h.sampler}
}

// WithGroup implements slog.Handler.
func (h LogHandler) WithGroup(name string) slog.Handler {
	return LogHandler{h.Handler.WithGroup(name), h.sampler}
}

// suppress counts r, and reports whether it is beyond maxPerWindow.
func (s *sampler) suppress(r slog.Record) bool {
	key := r.Level.String() + r.Message
	r.Attrs(func(a slog.Attr) bool {
		if isGroupKey(a) {
			key += "\x00" + port.ReplaceAllString(a.Value.String(), "")
		}
		return true
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.groups) == 0 {
		time.AfterFunc(sampleWindow, s.Flush)
	}
	if s.groups[key] == nil && len(s.groups) >= maxGroups {
		key = r.Level.String()
	}
	g := s.groups[key]
	if g == nil {
		g = &group{first: r}
		s.groups[key] = g
	}
	g.count++
	return g.count > maxPerWindow
}

func isGroupKey(a slog.Attr) bool { return slices.Contains(groupKeys, a.Key) }

// Flush ends the window, and logs the number of suppressed records of each group.
func (s *sampler) Flush() {
	s.mu.Lock()
	groups := s.groups
	s.groups = map[string]*group{}
	s.mu.Unlock()
	for _, g := range groups {
		if g.count <= maxPerWindow {
			continue
		}
		r := slog.NewRecord(time.Now(), g.first.Level, "similar log lines suppressed", 0)
		r.AddAttrs(slog.String("message", g.first.Message), slog.Int("count", g.count-maxPerWindow))
		g.first.Attrs(func(a slog.Attr) bool {
			if isGroupKey(a) {
				r.AddAttrs(a)
			}
			return true
		})
		s.next.Handle(context.Background(), r)
	}
}
