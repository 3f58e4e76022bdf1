package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// sqliteErrors is what is known of SQLite's primary result codes; a code that is
// not here leaves the outcome unknown.
var sqliteErrors = map[int]errorClass{
	sqlite3.SQLITE_ERROR:      tableMissing, // or any other fault of the statement's text
	sqlite3.SQLITE_BUSY:       notApplied | transient,
	sqlite3.SQLITE_LOCKED:     notApplied | transient,
	sqlite3.SQLITE_READONLY:   notApplied,
	sqlite3.SQLITE_FULL:       notApplied,
	sqlite3.SQLITE_CANTOPEN:   notApplied,
	sqlite3.SQLITE_CONSTRAINT: notApplied, // not the key's: that one does nothing, see doNothing
}

// path is "" for a database in memory.
type sqliteDialect struct {
	path   string
	opened map[string]fs.FileInfo // by name: the files that hold what is stored
}

func openSQLite(path string) (*DB, error) {
	if path == "" {
		return nil, errors.New("the data source name has no file; want sqlite:/path/to/file.db")
	}
	name, mode := "file::memory:", "memory"
	if path == ":memory:" {
		path = ""
	} else {
		absolute, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		path = absolute
		name = "file:" + (&url.URL{Path: path}).EscapedPath()
		mode = "rw" // provide creates it, where that is wanted
	}
	// A wait for another process's lock ends before a call's patience does, since
	// BUSY says more than a context that ended.
	inner, err := sqlite.NewConnector(name + "?mode=" + mode + "&_busy_timeout=2000&_journal_mode=WAL&_synchronous=FULL&_txlock=immediate&_error_rc=1")
	if err != nil {
		return nil, err
	}
	pool := sql.OpenDB(connector{inner})
	// One connection, for ever: writers queue in turn rather than poll for the
	// lock, and a database in memory is its connection.
	pool.SetMaxOpenConns(1)
	pool.SetMaxIdleConns(1)
	return &DB{dialect: sqliteDialect{path, map[string]fs.FileInfo{}}, pool: pool, counters: newCounters()}, nil
}

func (sqliteDialect) limit(int) {} // one connection, always

func (sqliteDialect) replaceDSN(context.Context, string) error { return errOtherDatabase }

// createFile creates the file for its owner alone; SQLite gives the files beside it
// the same mode. One that exists is not opened: to close it would drop the locks
// that this process holds on it.
func (e sqliteDialect) createFile() error {
	if e.path == "" {
		return nil
	}
	file, err := os.OpenFile(e.path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		err = file.Close()
	}
	return err
}

func (sqliteDialect) batchStatements(*DB) []statement { return nil }

func (sqliteDialect) startBatching(db *DB) {
	db.swaps, db.inserts = newBatcher(1, maxTxSwaps, db.flushSwapsTx), true
}

func (sqliteDialect) insertSuffix() string { return " ON CONFLICT (phone_number) DO NOTHING" }

func (sqliteDialect) classify(err error) errorClass {
	var result interface{ Code() int } // *sqlite.Error
	if errors.As(err, &result) {
		return sqliteErrors[result.Code()&0xff]
	}
	return 0
}

// SQLite's texts name tables and columns, never values.
func (sqliteDialect) redact(err error) error { return err }

func (e sqliteDialect) hint(err error) string {
	var result interface{ Code() int }
	var file *fs.PathError
	if !errors.As(err, &file) && (!errors.As(err, &result) || result.Code()&0xff != sqlite3.SQLITE_CANTOPEN) {
		return ""
	}
	return "this user must be able to read and write " + e.path + " and its directory"
}

func (e sqliteDialect) createIndexes(ctx context.Context, pool *sql.DB) error {
	_, err := pool.ExecContext(ctx, "CREATE INDEX IF NOT EXISTS phone_numbers_begun_at ON phone_numbers (begun_at)")
	if err != nil || e.path == "" {
		return err
	}
	for _, name := range []string{e.path, e.path + "-wal"} {
		if e.opened[name] == nil {
			if e.opened[name], err = os.Stat(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// inPlace finds a file that was removed or replaced. SQLite goes on with the one that it
// opened, which ends with this process.
func (e sqliteDialect) inPlace() error {
	for name, opened := range e.opened {
		if now, err := os.Stat(name); err != nil || !os.SameFile(now, opened) {
			return fmt.Errorf("%s was removed or replaced while it was open; what is stored now is lost when the service stops: restart it", name)
		}
	}
	return nil
}

func (sqliteDialect) metaQueries() (clock, rows string) {
	return "SELECT unixepoch()", "SELECT COUNT(*) FROM phone_numbers"
}

func (sqliteDialect) warnings(context.Context, *sql.DB) []string { return nil }
