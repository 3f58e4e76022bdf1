package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// A Diagnosis is the result of Diagnose.
type Diagnosis struct {
	TableMissing bool          // Prepare creates it, if the user may CREATE
	ClockOffset  time.Duration // how far the database's clock is ahead of this machine's, within a second
	Warnings     []string
}

// Diagnose checks all that Prepare and the purge need, and creates nothing. Its errors are those of
// Prepare.
func (db *DB) Diagnose(ctx context.Context) (d Diagnosis, err error) {
	if e, ok := db.dialect.engine.(sqliteEngine); ok {
		if _, err := os.Stat(e.path); errors.Is(err, fs.ErrNotExist) {
			d.TableMissing = true
			return d, nil
		}
	}
	err = db.tryStatement(ctx, "SELECT 1 FROM phone_numbers")
	if d.TableMissing = db.classify(err)&tableMissing != 0; !d.TableMissing {
		if err := db.Prepare(ctx); err != nil {
			return d, err
		}
		d.Warnings = db.Warnings()
		if err := db.tryStatement(ctx, "DELETE FROM phone_numbers WHERE phone_number = ?"); err != nil {
			err = withHint(db.dialect.hint(err), db.dialect.redact(err))
			d.Warnings = append(d.Warnings, fmt.Sprintf("old numbers cannot be purged: %v", err))
		}
	}
	var seconds int64
	asked := time.Now()
	if err := db.pool.QueryRowContext(ctx, db.dialect.clockQuery).Scan(&seconds); err != nil {
		return d, withHint(db.dialect.hint(err), db.dialect.redact(err))
	}
	middle := asked.Add(time.Since(asked) / 2)
	d.ClockOffset = time.Unix(seconds, int64(time.Second/2)).Sub(middle).Round(time.Second)
	return d, nil
}

// tryStatement prepares a statement, so that the database checks the table and the user's rights.
func (db *DB) tryStatement(ctx context.Context, text string) error {
	stmt, err := db.pool.PrepareContext(ctx, text)
	if err != nil {
		return err
	}
	defer stmt.Close()
	return nil
}
