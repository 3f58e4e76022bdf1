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
	purgeInterval      = time.Hour   // between purges, by any replica
	purgeCheckInterval = time.Minute // between a replica's checks of the lease
	// purgeLeaseTTL is the duration of the lease during a purge. If the replica stops during the
	// purge, the others must wait until the lease expires.
	purgeLeaseTTL = 2 * time.Minute
	purgeRows     = 25 // per transaction, so that locks are short
	// After each transaction the purge sleeps. The sleep is purgePauseFactor times as long as the
	// transaction, so that the purge uses at most a fifth of the time.
	purgePauseFactor = 4
	// purgeLeaseKey is the key of the row with the purge lease. A purge can start when the begun_at
	// of this row is past. No phone number has this form.
	purgeLeaseKey = verify.Number("purge")
)

// RunPurge calls Purge every minute until ctx ends, so that one of the replicas purges once an hour.
// It also updates the metric of the estimated number of rows.
func (db *DB) RunPurge(ctx context.Context, retention time.Duration, log *slog.Logger) {
	tick := time.NewTicker(purgeCheckInterval)
	defer tick.Stop()
	for {
		if err := db.estimateRows(ctx); err != nil && ctx.Err() == nil {
			log.Debug("failed to count rows", "error", db.dialect.redact(err))
		}
		purged, err := db.Purge(ctx, retention)
		if purged > 0 {
			log.Info("purged old numbers", "rows", purged, "retention", retention.String())
		}
		if err != nil && ctx.Err() == nil {
			log.Warn("failed to purge old numbers", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Purge deletes the rows whose last send is older than retention, and returns their number. The
// present time is the earlier one of this process's clock and the database's clock. Purge does nothing
// if a replica is purging or has purged within the last hour.
func (db *DB) Purge(ctx context.Context, retention time.Duration) (purged int64, err error) {
	purged, err = db.purgeIfDue(ctx, retention)
	if err != nil {
		hint := ""
		if db.classify(err)&denied != 0 {
			hint = db.dialect.hint(err)
		}
		err = fmt.Errorf("purge: %w", withHint(hint, db.dialect.redact(err)))
	}
	return purged, err
}

func (db *DB) purgeIfDue(ctx context.Context, retention time.Duration) (purged int64, err error) {
	lease, err := db.direct.load(ctx, purgeLeaseKey)
	if err != nil {
		return 0, err
	}
	wait := time.Until(time.UnixMicro(lease.BegunAt))
	if wait > 0 && wait <= purgeInterval+purgeLeaseTTL { // longer: the writer's clock was ahead
		return 0, nil
	}
	if held, err := db.renewLease(ctx, &lease, purgeLeaseTTL); !held {
		return 0, err
	}
	if purged, err = db.purge(ctx, retention, &lease); err != nil && db.classify(err)&denied == 0 {
		return purged, err // a replica retries after the lease expires
	}
	_, leaseErr := db.renewLease(ctx, &lease, purgeInterval)
	return purged, cmp.Or(err, leaseErr)
}

// renewLease takes or extends the lease until ttl from now, and updates *lease. It returns false if
// another replica has changed the lease first.
func (db *DB) renewLease(ctx context.Context, lease *verify.Record, ttl time.Duration) (held bool, err error) {
	next := verify.Record{BegunAt: time.Now().Add(ttl).UnixMicro(), State: []byte{}}
	rand.Read(next.Version[:])
	r := db.direct.swap(ctx, swapRequest{purgeLeaseKey, lease.Version, next})
	if held = r.outcome == outcomeApplied; held {
		*lease = next
	}
	return held, r.err
}

// deleteOld deletes one row. A statement with a list of keys could scan the whole of a small table,
// and wait for rows that other transactions have locked.
const deleteOld = "DELETE FROM phone_numbers WHERE phone_number = ? AND begun_at < ?"

func (db *DB) purge(ctx context.Context, retention time.Duration, lease *verify.Record) (purged int64, err error) {
	var seconds int64
	if err := db.pool.QueryRowContext(ctx, db.dialect.clockQuery).Scan(&seconds); err != nil {
		return 0, db.countError(err)
	}
	now := time.Now()
	if dbNow := time.Unix(seconds, 0); dbNow.Before(now) {
		now = dbNow
	}
	before := now.Add(-retention).UnixMicro()
	deleteStmt, err := db.pool.PrepareContext(ctx, deleteOld)
	if err != nil {
		return 0, db.countError(err)
	}
	defer deleteStmt.Close()
	var cursor int64 // begun_at of the last row read
	for {
		started := time.Now()
		old, next, err := db.oldest(ctx, cursor, before)
		if err != nil || len(old) == 0 {
			return purged, err
		}
		cursor = next
		rows, err := db.deleteRows(ctx, deleteStmt, old, before)
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

// deleteRows deletes the rows of the numbers in one transaction, unless a number has a newer send.
func (db *DB) deleteRows(ctx context.Context, deleteStmt *sql.Stmt, numbers []string, before int64) (rows int64, err error) {
	tx, err := db.pool.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	stmt := tx.StmtContext(ctx, deleteStmt) //nolint:sqlclosecheck // closes with its transaction
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

// oldest returns at most purgeRows numbers whose last send is not before cursor, but before the time
// before. It returns the oldest first, and the cursor for the next call.
func (db *DB) oldest(ctx context.Context, cursor, before int64) (numbers []string, next int64, err error) {
	rows, err := db.pool.QueryContext(ctx, "SELECT phone_number, begun_at FROM phone_numbers WHERE begun_at >= ? AND begun_at < ? ORDER BY begun_at LIMIT ?", cursor, before, purgeRows)
	if err != nil {
		return nil, 0, db.countError(err)
	}
	defer rows.Close()
	for rows.Next() {
		var n string
		if err := rows.Scan(&n, &next); err != nil {
			return nil, 0, err
		}
		numbers = append(numbers, n)
	}
	return numbers, next, db.countError(rows.Err())
}

func (db *DB) estimateRows(ctx context.Context) error {
	var n int64
	err := db.pool.QueryRowContext(ctx, db.dialect.rowCountQuery).Scan(&n)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err == nil {
		db.counters.rows.Set(float64(n))
	}
	return db.countError(err)
}
