package store

import (
	"context"
	"errors"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// counters contains the metrics that only the store can measure.
type counters struct {
	errors                 *prometheus.CounterVec
	batchingPaused, purged prometheus.Counter
	rows                   prometheus.Gauge
}

func newCounters() counters {
	return counters{
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "phonenumber_database_errors_total", Help: "Statements that the database rejected or did not confirm, by MySQL's error number, sqlite_ and SQLite's code, or one of the words connection, timeout, other. Some version conflicts are such errors. The service repeats the statements of a call, so the call can still succeed.",
		}, []string{"error"}),
		batchingPaused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "phonenumber_database_batching_paused_total", Help: "Times that a failed or hanging statement paused batching: for ten seconds each call runs its own statement.",
		}),
		rows: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "phonenumber_database_rows", Help: "Estimated rows of the table phone_numbers, read once a minute.",
		}),
		purged: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "phonenumber_database_purged_rows_total", Help: "Rows that this replica purged.",
		}),
	}
}

// Collectors returns the store's metrics.
func (db *DB) Collectors() []prometheus.Collector {
	return []prometheus.Collector{
		db.counters.errors, db.counters.batchingPaused, db.counters.rows, db.counters.purged,
		collectors.NewDBStatsCollector(db.pool, "codes"),
	}
}

// countError counts err, the error of a statement, and returns it. It does not count nil.
func (db *DB) countError(err error) error {
	if err != nil {
		db.counters.errors.WithLabelValues(db.errorName(err)).Inc()
	}
	return err
}

// errorName returns the value of the label "error". The set of values is bounded: numbers of errors, and
// three words.
func (db *DB) errorName(err error) string {
	switch server, sqlite := mysqlNumber(err), sqliteCode(err); {
	case server != 0:
		return strconv.Itoa(int(server))
	case sqlite != 0:
		return "sqlite_" + strconv.Itoa(sqlite)
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	// If an error has a class but no number, the connection failed.
	case db.classify(err) != 0:
		return "connection"
	}
	return "other"
}
