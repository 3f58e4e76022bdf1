package main

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	filesReadEvery = 2 * time.Second
	readsAlike     = 2 // files change one after the other
	faultToldEvery = time.Minute
)

// What was read from files, and can tell what changed in it.
type fromFiles[T any] interface {
	comparable
	changed(before T) (names []string)
}

// files are what follow reads again and again.
type files[T fromFiles[T]] struct {
	what     string // for people
	read     func(*faults) T
	takeOver func(before, now T) error // all of now, or nothing of it
	alike    func(before, now T) int   // how many times it must be read alike; nil is readsAlike
}

// follow has what changed taken over until ctx ends. What cannot be used is tried
// again each time, and an alarm.
func follow[T fromFiles[T]](ctx context.Context, log *slog.Logger, unusable *prometheus.GaugeVec, current T, f files[T]) {
	tick := time.NewTicker(filesReadEvery)
	defer tick.Stop()
	alarm := unusable.WithLabelValues(f.what)
	seen, alike := current, 0
	var told string
	var toldAt time.Time
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		var wrong faults
		now := f.read(&wrong)
		if alike++; now != seen {
			seen, alike = now, 1
		}
		needed := readsAlike
		if f.alike != nil {
			needed = f.alike(current, now)
		}
		if alike < needed {
			continue
		}
		err := wrong.err()
		if err == nil && now != current {
			if err = f.takeOver(current, now); err == nil {
				log.Info("took over "+f.what+" that changed", "names", strings.Join(now.changed(current), " "))
				current = now
			}
		}
		if err == nil {
			alarm.Set(0)
			told = ""
		} else if alarm.Set(1); err.Error() != told || time.Since(toldAt) >= faultToldEvery {
			told, toldAt = err.Error(), time.Now()
			log.Error(f.what+" changed and cannot be used; the old ones stay", "error", err)
		}
	}
}
