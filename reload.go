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
	minStableReads    = 2 // related files are replaced one after the other
	reloadLogInterval = time.Minute
	maxRetryInterval  = time.Minute // between two attempts to apply the same content
)

// fromFiles is the constraint for the content of files. changed returns the names of the files
// or settings that differ from before.
type fromFiles[T any] interface {
	comparable
	changed(before T) (names []string)
}

// watchedFiles describes files that watchFiles polls.
type watchedFiles[T fromFiles[T]] struct {
	kind  string // for log and metric
	read  func(*configErrors) T
	apply func(before, now T) error // applies all of now or nothing
	// stableReads returns how many identical reads a change needs; nil means minStableReads.
	stableReads func(before, now T) int
}

// watchFiles polls files until ctx is done, and applies changes. If the new content is invalid,
// it keeps the old one, sets the gauge to 0, and logs at most once in reloadLogInterval. It retries
// files that cannot be read on each poll. It retries content that cannot be applied with a
// growing interval, up to maxRetryInterval, since a database may count attempts with a wrong
// password and lock the account. It applies, and logs, a further change at once.
func watchFiles[T fromFiles[T]](ctx context.Context, log *slog.Logger, lastReload *prometheus.GaugeVec, current T, f watchedFiles[T]) {
	tick := time.NewTicker(filePollInterval)
	defer tick.Stop()
	successful := lastReload.WithLabelValues(f.kind)
	lastRead, stableReads := current, 0
	var lastLogged string
	var loggedAt, retryAt time.Time
	var pause time.Duration
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		var errs configErrors
		now := f.read(&errs)
		if stableReads++; now != lastRead {
			lastRead, stableReads, lastLogged, pause, retryAt = now, 1, "", 0, time.Time{}
		}
		needed := minStableReads
		if f.stableReads != nil {
			needed = f.stableReads(current, now)
		}
		if stableReads < needed {
			continue
		}
		err := errs.err()
		if err == nil && now != current {
			if time.Now().Before(retryAt) {
				continue
			}
			if err = f.apply(current, now); err == nil {
				log.Info("reloaded "+f.kind, "names", strings.Join(now.changed(current), " "))
				current = now
			} else {
				pause = min(max(2*pause, filePollInterval), maxRetryInterval)
				retryAt = time.Now().Add(pause)
			}
		}
		if err == nil {
			successful.Set(1)
			lastLogged = ""
		} else if successful.Set(0); err.Error() != lastLogged || time.Since(loggedAt) >= reloadLogInterval {
			lastLogged, loggedAt = err.Error(), time.Now()
			log.Error("failed to reload "+f.kind+"; keeping the previous version", "error", err)
		}
	}
}
