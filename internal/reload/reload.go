// Package reload applies changes of files to the running service. It is a package because
// certificates, callers and secrets follow the same rules: wait until files are stable, apply all
// of them or nothing, and keep the previous version after an error.
package reload

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	pollInterval     = 2 * time.Second
	minStableReads   = 2 // related files are replaced one after the other
	logInterval      = time.Minute
	maxRetryInterval = time.Minute // between two attempts to apply the same contents
)

// Files are contents by the name of their file or setting.
type Files = map[string]string

// Watcher describes files that Run polls.
type Watcher struct {
	Kind  string // for log and metric
	Read  func() (Files, error)
	Apply func(ctx context.Context, before, now Files) error // applies all of now or nothing
	// StableReads returns how many identical reads a change needs, if more than minStableReads. It
	// may be nil.
	StableReads func(before, now Files) int
}

// NewMetric returns the gauge for Run, which is 1 for each of kinds.
func NewMetric(kinds ...string) *prometheus.GaugeVec {
	lastReload := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "phonenumber_config_last_reload_successful", Help: "1 if the last reload of the files succeeded, 0 while the service keeps a previous version.",
	}, []string{"files"})
	for _, kind := range kinds {
		lastReload.WithLabelValues(kind).Set(1)
	}
	return lastReload
}

// Run polls files until ctx is done, and applies changes. If the new contents are invalid, it
// keeps the old ones, sets the gauge to 0, and logs at most once in logInterval. It retries files
// that cannot be read on each poll. It retries contents that cannot be applied with a growing
// interval, up to maxRetryInterval, since a database may count attempts with a wrong password and
// lock the account. It applies, and logs, a further change at once.
func (w Watcher) Run(ctx context.Context, log *slog.Logger, lastReload *prometheus.GaugeVec, current Files) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	successful := lastReload.WithLabelValues(w.Kind)
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
		now, err := w.Read()
		if stableReads++; !maps.Equal(now, lastRead) {
			lastRead, stableReads, lastLogged, pause, retryAt = now, 1, "", 0, time.Time{}
		}
		needed := minStableReads
		if w.StableReads != nil {
			needed = max(needed, w.StableReads(current, now))
		}
		if stableReads < needed {
			continue
		}
		if err == nil && !maps.Equal(now, current) {
			if time.Now().Before(retryAt) {
				continue
			}
			if err = w.Apply(ctx, current, now); err == nil {
				changed := slices.DeleteFunc(slices.Sorted(maps.Keys(now)), func(name string) bool { return current[name] == now[name] })
				log.Info("reloaded "+w.Kind, "names", strings.Join(changed, " "))
				current = now
			} else {
				pause = min(max(2*pause, pollInterval), maxRetryInterval)
				retryAt = time.Now().Add(pause)
			}
		}
		if err == nil {
			successful.Set(1)
			lastLogged = ""
		} else if successful.Set(0); err.Error() != lastLogged || time.Since(loggedAt) >= logInterval {
			lastLogged, loggedAt = err.Error(), time.Now()
			log.Error("failed to reload "+w.Kind+"; keeping the previous version", "error", err)
		}
	}
}
