package store

import (
	"cmp"
	"context"
	"crypto/rand"
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
	// purgeLeaseKey is the key of the row with the purge lease. A purge can start when the begun_at
	// of this row is in the past. No phone number is equal to this key.
	purgeLeaseKey = verify.Number("purge")
)

// RunPurge calls Purge every minute until ctx ends. So one of the replicas purges once an hour.
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

// Purge deletes the rows whose last send is older than retention, and returns their number. It takes
// the earlier of two times as the present: this process's clock and the database's clock. Purge does
// nothing if a replica is purging or has purged within the last hour.
func (db *DB) Purge(ctx context.Context, retention time.Duration) (purged int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("purge: %w", withHint(db.dialect.hint(err), db.dialect.redact(err)))
		}
	}()
	lease, err := db.direct.load(ctx, purgeLeaseKey)
	if err != nil {
		return 0, err
	}
	wait := time.Until(time.UnixMicro(lease.BegunAt))
	if wait > 0 && wait <= purgeInterval+purgeLeaseTTL { // if wait is longer, the writer's clock was ahead
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

// purge deletes the rows in batches, oldest first, and renews the lease. It ends if another replica has
// taken the lease.
func (db *DB) purge(ctx context.Context, retention time.Duration, lease *verify.Record) (purged int64, err error) {
	var seconds int64
	if err := db.pool.QueryRowContext(ctx, db.dialect.clockQuery).Scan(&seconds); err != nil {
		return 0, db.countError(err)
	}
	cutoff := time.Unix(min(seconds, time.Now().Unix()), 0).Add(-retention).UnixMicro()
	var cursor int64 // begun_at of the last row read (keyset pagination)
	for {
		started := time.Now()
		old, next, err := db.oldest(ctx, cursor, cutoff)
		if err != nil || len(old) == 0 {
			return purged, err
		}
		cursor = next
		rows, err := db.deleteRows(ctx, old, cutoff)
		if db.countError(err) != nil && db.classify(err)&conflict == 0 {
			return purged, err
		}
		purged += rows
		db.counters.purged.Add(float64(rows))
		select {
		case <-time.After(4 * time.Since(started)): // so that the purge uses a fifth of the time
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

// deleteRows deletes the rows of the numbers in one transaction, unless a number has a newer send. A
// statement with a list of keys could scan a small table completely, and wait for rows that other
// transactions have locked.
func (db *DB) deleteRows(ctx context.Context, numbers []string, cutoff int64) (deleted int64, err error) {
	tx, err := db.pool.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	stmt, err := tx.PrepareContext(ctx, "DELETE FROM phone_numbers WHERE phone_number = ? AND begun_at < ?")
	if err != nil {
		return 0, err
	}
	defer stmt.Close()
	for _, n := range numbers {
		result, err := stmt.ExecContext(ctx, n, cutoff)
		if err != nil {
			return 0, err
		}
		rows, _ := result.RowsAffected() // neither driver returns an error
		deleted += rows
	}
	return deleted, tx.Commit()
}

// oldest returns at most purgeRows numbers whose last send is at cursor or later, and before cutoff.
// It returns the oldest first, and the cursor for the next call.
func (db *DB) oldest(ctx context.Context, cursor, cutoff int64) (numbers []string, next int64, err error) {
	var n string
	err = eachRow(ctx, db.pool, []any{&n, &next}, func() { numbers = append(numbers, n) },
		"SELECT phone_number, begun_at FROM phone_numbers WHERE begun_at >= ? AND begun_at < ? ORDER BY begun_at LIMIT ?", cursor, cutoff, purgeRows)
	return numbers, next, db.countError(err)
}

func (db *DB) estimateRows(ctx context.Context) error {
	conn, err := db.pool.Conn(ctx) // beforeRowCount changes its session
	if err != nil {
		return db.countError(err)
	}
	defer conn.Close()
	_, _ = conn.ExecContext(ctx, db.dialect.beforeRowCount)
	var n int64
	return db.countError(eachRow(ctx, conn, []any{&n}, func() { db.counters.rows.Set(float64(n)) }, db.dialect.rowCountQuery))
}
