package main

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	filePollInterval  = 2 * time.Second
	minStableReads    = 2 // files change one after the other
	reloadLogInterval = time.Minute
	longestPause      = time.Minute // between two attempts to take over the same
)

// What was read from files, and can tell what changed in it.
type fromFiles[T any] interface {
	comparable
	changed(before T) (names []string)
}

// files are what follow reads again and again.
type files[T fromFiles[T]] struct {
	what     string // for people
	read     func(*configErrors) T
	takeOver func(before, now T) error // all of now, or nothing of it
	alike    func(before, now T) int   // how many times it must be read alike; nil is readsAlike
}

// watchFiles has what changed taken over until ctx ends. What cannot be used is an alarm,
// and is tried again: what cannot be read each time; what cannot be taken over less and
// less often, down to once a minute, since a database may count each attempt with a wrong
// password and lock the account. A further change is tried, and told, at once.
func watchFiles[T fromFiles[T]](ctx context.Context, log *slog.Logger, unusable *prometheus.GaugeVec, current T, f files[T]) {
	tick := time.NewTicker(filePollInterval)
	defer tick.Stop()
	alarm := unusable.WithLabelValues(f.what)
	seen, alike := current, 0
	var told string
	var toldAt, tryAt time.Time
	var pause time.Duration
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		var wrong configErrors
		now := f.read(&wrong)
		if alike++; now != seen {
			seen, alike, told, pause, tryAt = now, 1, "", 0, time.Time{}
		}
		needed := minStableReads
		if f.alike != nil {
			needed = f.alike(current, now)
		}
		if alike < needed {
			continue
		}
		err := wrong.err()
		if err == nil && now != current {
			if time.Now().Before(tryAt) {
				continue
			}
			if err = f.takeOver(current, now); err == nil {
				log.Info("took over "+f.what+" that changed", "names", strings.Join(now.changed(current), " "))
				current = now
			} else {
				pause = min(max(2*pause, filePollInterval), longestPause)
				tryAt = time.Now().Add(pause)
			}
		}
		if err == nil {
			alarm.Set(0)
			told = ""
		} else if alarm.Set(1); err.Error() != told || time.Since(toldAt) >= reloadLogInterval {
			told, toldAt = err.Error(), time.Now()
			log.Error(f.what+" changed and cannot be used; the old ones stay", "error", err)
		}
	}
}
