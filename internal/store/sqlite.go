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
	"slices"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// sqliteErrors classifies the primary result codes of SQLite. After an unlisted code the outcome is
// unknown.
var sqliteErrors = map[int]errorClass{
	sqlite3.SQLITE_ERROR:      tableMissing, // or any other error in the statement's text
	sqlite3.SQLITE_BUSY:       notApplied | transient,
	sqlite3.SQLITE_LOCKED:     notApplied | transient,
	sqlite3.SQLITE_READONLY:   notApplied,
	sqlite3.SQLITE_FULL:       notApplied,
	sqlite3.SQLITE_CANTOPEN:   notApplied,
	sqlite3.SQLITE_CONSTRAINT: notApplied, // insertSuffix handles the primary key
}

type sqliteEngine struct{ path string } // "" for a database in memory

func openSQLite(path string) (*DB, error) {
	if path == "" {
		return nil, errors.New("the data source name has no file; want sqlite:/path/to/file.db")
	}
	name, file, files := "file::memory:?mode=memory", "", map[string]fs.FileInfo(nil)
	if path != ":memory:" {
		var err error
		if file, err = filepath.Abs(path); err != nil {
			return nil, err
		}
		name = "file:" + (&url.URL{Path: file}).EscapedPath() + "?mode=rw" // only createFile creates the file
		files = map[string]fs.FileInfo{file: nil, file + "-wal": nil}
	}
	// The busy timeout is shorter than storeTimeout of package verify. So a statement that waits for
	// the lock gets SQLITE_BUSY, whose outcome is "not applied", before the context of its call ends.
	inner, err := sqlite.NewConnector(name + "&_busy_timeout=2000&_journal_mode=WAL&_synchronous=FULL&_txlock=immediate&_error_rc=1")
	if err != nil {
		return nil, err
	}
	pool := sql.OpenDB(connector{inner})
	// The pool has exactly one connection. So writers wait in a queue and do not poll for the
	// lock. Also, each connection to a database in memory would have its own database.
	pool.SetMaxOpenConns(1)
	pool.SetMaxIdleConns(1)
	db := newDB(dialect{
		insertSuffix:  " ON CONFLICT (phone_number) DO NOTHING",
		clockQuery:    "SELECT unixepoch()",
		rowCountQuery: "SELECT COUNT(*) FROM phone_numbers",
		engine:        sqliteEngine{file},
	}, pool)
	db.executor, db.files = newGroupCommit(&db.direct), files
	return db, nil
}

// prepare implements engine. It also creates the index that schema.sql defines only for MySQL, and
// stores the identities of the files in db.files. It tests the table with tryTable. SQLite derives the
// affinity of a column from the name of its type. So the declaration of a table does not show which
// values a column can store.
func (e sqliteEngine) prepare(ctx context.Context, db *DB) error {
	err := e.createFile()
	if err == nil {
		err = db.prepareStatements(ctx)
	}
	if err == nil {
		err = db.tryTable(ctx)
	}
	if errors.Is(err, errOtherTable) ||
		slices.Contains([]int{sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}, sqliteCode(err)) {
		return fmt.Errorf("the table phone_numbers cannot be used: %w; rename it, so that the service creates a new one, and Valid then rejects the codes of the last ten minutes: ALTER TABLE phone_numbers RENAME TO phone_numbers_before; DROP INDEX IF EXISTS phone_numbers_begun_at", err)
	}
	if err == nil {
		_, err = db.pool.ExecContext(ctx, "CREATE INDEX IF NOT EXISTS phone_numbers_begun_at ON phone_numbers (begun_at)")
	}
	for name, opened := range db.files {
		if err == nil && opened == nil {
			db.files[name], err = os.Stat(name)
		}
	}
	return err
}

// createFile creates the file with access only for its owner. SQLite creates the write-ahead log and
// its index with the same mode. createFile does not open an existing file, because closing it would
// release all locks of this process on the file (POSIX advisory locks).
func (e sqliteEngine) createFile() error {
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

func (sqliteEngine) classify(err error) errorClass { return sqliteErrors[sqliteCode(err)] }

// sqliteCode returns the primary result code of an error of SQLite, 0 for any other error.
func sqliteCode(err error) int {
	if result, ok := errors.AsType[interface { // *sqlite.Error
		error
		Code() int
	}](err); ok {
		return result.Code() & 0xff
	}
	return 0
}

// redact implements engine. The errors of SQLite contain names of tables and columns, and no values.
func (sqliteEngine) redact(err error) error { return err }

func (e sqliteEngine) hint(err error) string {
	if _, ok := errors.AsType[*fs.PathError](err); !ok && sqliteCode(err) != sqlite3.SQLITE_CANTOPEN {
		return ""
	}
	return "this user must be able to read and write " + e.path + " and its directory"
}

// unchanged returns an error if one of the files was removed or replaced. SQLite continues to use the
// removed file, whose content is lost when this process ends.
func unchanged(files map[string]fs.FileInfo) error {
	for name, opened := range files {
		if now, err := os.Stat(name); err != nil || !os.SameFile(now, opened) {
			return fmt.Errorf("%s was removed or replaced while it was open; writes since then are lost when the service stops: restart it", name)
		}
	}
	return nil
}
