package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// A Diagnosis is the result of Diagnose.
type Diagnosis struct {
	TableMissing bool // Prepare creates it, if the user may CREATE
	// ClockOffset is the time by which the database's clock is ahead of this machine's clock. Its error
	// is at most a second.
	ClockOffset time.Duration
	Warnings    []string
}

// Diagnose tests whether Prepare and the purge can use the database. It returns the errors of Prepare.
// It creates no table and changes no row. On SQLite, Prepare adds the index on begun_at if it is missing.
func (db *DB) Diagnose(ctx context.Context) (d Diagnosis, err error) {
	if e, ok := db.dialect.engine.(sqliteEngine); ok {
		if _, err := os.Stat(e.path); errors.Is(err, fs.ErrNotExist) {
			d.TableMissing = true
			if err := e.tryDirectory(); err != nil {
				return d, withHint(e.hint(err), err)
			}
			return d, nil
		}
	}
	err = db.tryStatement(ctx, "SELECT 1 FROM phone_numbers")
	if d.TableMissing = db.classify(err)&tableMissing != 0; d.TableMissing {
		// MariaDB and MySQL report a missing right when they prepare a statement, although the table is
		// missing too. A prepared CREATE TABLE creates nothing.
		for _, s := range append(db.executor.statements(), statement{text: schema}) {
			if err := db.tryStatement(ctx, s.text); db.classify(err)&denied != 0 {
				return d, fmt.Errorf("the table phone_numbers is not there: %w", withHint(db.dialect.hint(err), err))
			}
		}
	} else {
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

// tryDirectory creates a file in the directory of the database's file, and removes it.
func (e sqliteEngine) tryDirectory() error {
	file, err := os.CreateTemp(filepath.Dir(e.path), filepath.Base(e.path)+".check-*")
	if err != nil {
		return err
	}
	return errors.Join(file.Close(), os.Remove(file.Name()))
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
