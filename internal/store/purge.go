package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const (
	purgeInterval      = time.Hour   // by one of all replicas
	purgeCheckInterval = time.Minute // whether it is time
	// How long a replica that stopped in the middle keeps others from going on.
	purgeLeaseTTL = 2 * time.Minute
	purgeRows     = 25 // of one transaction: its locks are held for a moment
	// A purge waits so many times as long as its statements took: calls have the
	// database for the rest.
	purgePauseFactor = 4
	// Whose row is the lease: its begun_at is when the next purge may begin. No
	// number reads like this.
	purgeLeaseKey = verify.Number("purge")
)

// RunPurge purges the rows of numbers that were last sent to longer ago than
// retention, now and then, until ctx ends. One replica at a time does it.
func (db *DB) RunPurge(ctx context.Context, retention time.Duration, log *slog.Logger) {
	tick := time.NewTicker(purgeCheckInterval)
	defer tick.Stop()
	for {
		if err := db.estimateRows(ctx); err != nil && ctx.Err() == nil {
			log.Debug("rows could not be counted", "error", db.dialect.redact(err))
		}
		purged, err := db.Purge(ctx, retention)
		if purged > 0 {
			log.Info("purged numbers that were last sent to long ago", "rows", purged, "retention", retention.String())
		}
		if err != nil && ctx.Err() == nil {
			log.Warn("old numbers could not be purged", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Purge deletes rows begun longer ago than retention, by this process's clock and by
// the database's, and reports how many. It does nothing where a replica is at it, or
// was within the hour.
func (db *DB) Purge(ctx context.Context, retention time.Duration) (purged int64, err error) {
	purged, err = db.purgeIfDue(ctx, retention)
	if err != nil {
		advice := ""
		if db.classify(err)&denied != 0 {
			advice = db.dialect.hint(err)
		}
		err = fmt.Errorf("purge: %w", withHint(advice, db.dialect.redact(err)))
	}
	return purged, err
}

func (db *DB) purgeIfDue(ctx context.Context, retention time.Duration) (purged int64, err error) {
	lease, err := db.loadDirect(ctx, purgeLeaseKey)
	if err != nil {
		return 0, err
	}
	wait := time.Until(time.UnixMicro(lease.BegunAt))
	if wait > 0 && wait <= purgeInterval+purgeLeaseTTL { // a longer one was written by a clock that was ahead
		return 0, nil
	}
	if held, err := db.renewLease(ctx, &lease, purgeLeaseTTL); !held {
		return 0, err
	}
	if purged, err = db.purge(ctx, retention, &lease); err != nil && db.classify(err)&denied == 0 {
		return purged, err // the lease runs out, and somebody tries again
	}
	_, later := db.renewLease(ctx, &lease, purgeInterval)
	return purged, cmp.Or(err, later)
}

// renewLease makes the lease ours for a while, where nobody came first.
func (db *DB) renewLease(ctx context.Context, lease *verify.Record, by time.Duration) (held bool, err error) {
	next := verify.Record{BegunAt: time.Now().Add(by).UnixMicro(), State: []byte{}}
	rand.Read(next.Version[:])
	held, err = db.swapDirect(ctx, purgeLeaseKey, lease.Version, next)
	if held {
		*lease = next
	}
	if db.classify(err)&conflict != 0 {
		err = nil
	}
	return held, err
}

// Each by its key alone: of many at once, the engine may rather read a small table
// through, and wait for whoever holds any of its rows.
const deleteOld = "DELETE FROM phone_numbers WHERE phone_number = ? AND begun_at < ?"

func (db *DB) purge(ctx context.Context, retention time.Duration, lease *verify.Record) (purged int64, err error) {
	clock, _ := db.dialect.metaQueries()
	var seconds int64
	if err := db.pool.QueryRowContext(ctx, clock).Scan(&seconds); err != nil {
		return 0, db.countError(err)
	}
	now := time.Now()
	if theirs := time.Unix(seconds, 0); theirs.Before(now) {
		now = theirs
	}
	before := now.Add(-retention).UnixMicro()
	remove, err := db.pool.PrepareContext(ctx, deleteOld)
	if err != nil {
		return 0, db.countError(err)
	}
	defer remove.Close()
	var from int64 // what is older is gone: not to be looked for again
	for {
		started := time.Now()
		old, err := db.oldest(ctx, &from, before)
		if err != nil || len(old) == 0 {
			return purged, err
		}
		rows, err := db.remove(ctx, remove, old, before)
		if db.countError(err) != nil && db.classify(err)&conflict == 0 {
			return purged, err
		}
		purged += rows
		db.counters.purged.Add(float64(rows))
		select {
		case <-time.After(purgePauseFactor * time.Since(started)):
		case <-ctx.Done():
			return purged, ctx.Err()
		}
		if time.Until(time.UnixMicro(lease.BegunAt)) < purgeLeaseTTL/2 {
			if held, err := db.renewLease(ctx, lease, purgeLeaseTTL); !held {
				return purged, err
			}
		}
	}
}

// remove deletes these numbers in one transaction, but for those that were sent to
// since.
func (db *DB) remove(ctx context.Context, remove *sql.Stmt, numbers []string, before int64) (rows int64, err error) {
	tx, err := db.pool.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	stmt := tx.StmtContext(ctx, remove) //nolint:sqlclosecheck // closes with its transaction
	for _, n := range numbers {
		result, err := stmt.ExecContext(ctx, n, before)
		if err != nil {
			return 0, err
		}
		removed, err := result.RowsAffected()
		if err != nil {
			return 0, err
		}
		rows += removed
	}
	return rows, tx.Commit()
}

// oldest returns the numbers that were begun first, of those from on and before, and
// moves from on.
func (db *DB) oldest(ctx context.Context, from *int64, before int64) (numbers []string, err error) {
	rows, err := db.pool.QueryContext(ctx, "SELECT phone_number, begun_at FROM phone_numbers WHERE begun_at >= ? AND begun_at < ? ORDER BY begun_at LIMIT ?", *from, before, purgeRows)
	if err != nil {
		return nil, db.countError(err)
	}
	defer rows.Close()
	for rows.Next() {
		var n string
		if err := rows.Scan(&n, from); err != nil {
			return nil, err
		}
		numbers = append(numbers, n)
	}
	return numbers, db.countError(rows.Err())
}

func (db *DB) estimateRows(ctx context.Context) error {
	_, rows := db.dialect.metaQueries()
	var n int64
	err := db.pool.QueryRowContext(ctx, rows).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err == nil {
		db.counters.rows.Set(float64(n))
	}
	return db.countError(err)
}
