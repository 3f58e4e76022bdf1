package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A resultCode is an error with a result code of SQLite, extended or primary.
type resultCode int

func (c resultCode) Error() string { return fmt.Sprintf("SQLite result code %d", int(c)) }
func (c resultCode) Code() int     { return int(c) }

func TestSQLiteErrors_HaveTheirClass(t *testing.T) {
	cases := []errorCase{
		{resultCode(1), tableMissing, "ERROR"},
		{resultCode(5), notApplied | transient, "BUSY"},
		{resultCode(5 | 2<<8), notApplied | transient, "BUSY_SNAPSHOT"},
		{resultCode(6), notApplied | transient, "LOCKED"},
		{resultCode(8), notApplied, "READONLY"},
		{resultCode(8 | 4<<8), notApplied, "READONLY_DBMOVED"},
		{resultCode(9), 0, "INTERRUPT"},
		{resultCode(10), 0, "IOERR"},
		{resultCode(10 | 4<<8), 0, "IOERR_FSYNC"},
		{resultCode(11), 0, "CORRUPT"},
		{resultCode(13), notApplied, "FULL"},
		{resultCode(14), notApplied, "CANTOPEN"},
		{resultCode(19), notApplied, "CONSTRAINT"},
		{resultCode(19 | 5<<8), notApplied, "CONSTRAINT_NOTNULL"},
		{resultCode(21), 0, "MISUSE"},
		{context.DeadlineExceeded, 0, "the statement may be running"},
	}
	checkClasses(t, newDB(dialect{engine: sqliteEngine{}}, nil), cases)
	for code := range sqliteErrors {
		tested := false
		for _, c := range cases {
			tested = tested || errors.Is(c.err, resultCode(code))
		}
		if !tested {
			t.Errorf("SQLite result code %d of sqliteErrors: got no case here; want one", code)
		}
	}
}

// openFile returns a ready handle on an SQLite file.
func openFile(t testing.TB, path string) *DB {
	t.Helper()
	return openHere(t, "sqlite:"+path)
}

func openHere(t testing.TB, dsn string) *DB {
	t.Helper()
	db, err := Open(dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Prepare(t.Context()); err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	return db
}

func exec(t testing.TB, db *DB, statement string) {
	t.Helper()
	if _, err := db.pool.ExecContext(t.Context(), statement); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

func newRecord(first byte) verify.Record {
	return verify.Record{Version: verify.Version{first, 1}, State: []byte{first}, BegunAt: int64(first)}
}

// randomRecord returns a record with random bytes as version and state.
func randomRecord(begunAt int64) verify.Record {
	r := verify.Record{BegunAt: begunAt, State: make([]byte, 59)}
	rand.Read(r.Version[:])
	rand.Read(r.State)
	return r
}

func mustBeStored(t *testing.T, db *DB, n verify.Number, want verify.Record) {
	t.Helper()
	got, err := db.Load(t.Context(), n)
	if err != nil || got.Version != want.Version || got.BegunAt != want.BegunAt || string(got.State) != string(want.State) {
		t.Errorf("Load(%s) = %v, %v; want %v", n, got, err, want)
	}
}

func TestSQLiteFile_IsPrivateAndDurable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	db := openFile(t, path)
	if done, err := db.Swap(t.Context(), "+1", verify.Version{}, verify.Record{Version: verify.Version{1}}); !done || err != nil {
		t.Fatal(done, err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		info, err := os.Stat(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != 0o600 {
			t.Errorf("mode of the file%s = %v; want -rw-------", suffix, got)
		}
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "busy_timeout": "2000"} {
		var got string
		if err := db.pool.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s = %q, %v; want %q", pragma, got, err, want)
		}
	}
}

// A process loses its locks on a file when it closes any descriptor of that file. Then another
// process could treat the database as unused.
func TestSQLitePrepare_KeepsTheLocksOfTheProcess(t *testing.T) {
	if _, err := os.Stat("/proc/locks"); err != nil {
		t.Skip("this system does not show its locks in /proc/locks")
	}
	path := filepath.Join(t.TempDir(), "store.db")
	db := openFile(t, path)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	inode := reflect.ValueOf(info.Sys()).Elem().FieldByName("Ino").Uint()
	locks := func() int {
		text, _ := os.ReadFile("/proc/locks")
		return strings.Count(string(text), fmt.Sprintf(":%d ", inode))
	}
	before := locks()
	if before == 0 {
		t.Fatal("got no lock on a file in use; want one")
	}
	if err := db.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := locks(); got != before {
		t.Errorf("got %d locks on the file after Prepare; want %d as before", got, before)
	}
}

func TestSQLitePath_MayHaveAnyCharacter(t *testing.T) {
	for _, name := range []string{"a b.db", "what?.db", "#1.db", "100%41.db", "a&mode=memory.db", "a:b.db", "中文.db", "quote'\".db"} {
		path := filepath.Join(t.TempDir(), name)
		openFile(t, path)
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%q: got %v; want a file with this name", name, err)
		}
		entries, _ := os.ReadDir(filepath.Dir(path))
		for _, entry := range entries {
			if !strings.HasPrefix(entry.Name(), name) {
				t.Errorf("%q: got a file %q; want only its own files", name, entry.Name())
			}
		}
	}
}

func TestSQLitePrepare_ErrorDescribesTheFile(t *testing.T) {
	directory := t.TempDir()
	text := filepath.Join(directory, "text")
	os.WriteFile(text, []byte(strings.Repeat("no database", 100)), 0o600)
	for path, want := range map[string]string{
		filepath.Join(directory, "missing", "store.db"): "and its directory",
		directory: "and its directory",
		text:      "not a database",
	} {
		db, err := Open("sqlite:" + path)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.Prepare(t.Context()); err == nil || errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("Prepare(%s) = %v; want a final error with %q in it", path, err, want)
		}
	}
}

func TestSQLiteSwap_FailedWriteIsNotApplied(t *testing.T) {
	wantNotApplied := func(t *testing.T, db *DB, ctx context.Context) {
		t.Helper()
		next := verify.Record{Version: verify.Version{1}, State: make([]byte, verify.MaxStateBytes)}
		if done, err := db.Swap(ctx, "+1", verify.Version{}, next); done || err == nil || errors.Is(err, verify.ErrOutcomeUnknown) {
			t.Errorf("Swap = %v, %v; want an error that is not unknown", done, err)
		}
	}
	works := func(t *testing.T, db *DB) {
		t.Helper()
		next := verify.Record{Version: verify.Version{2}, State: make([]byte, verify.MaxStateBytes)}
		if done, err := db.Swap(t.Context(), "+1", verify.Version{}, next); !done || err != nil {
			t.Errorf("Swap after it = %v, %v; want true", done, err)
		}
	}
	t.Run("another process holds the lock", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "store.db")
		db, other := openFile(t, path), openFile(t, path)
		exec(t, other, "BEGIN IMMEDIATE")
		wantNotApplied(t, db, t.Context())
		soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		wantNotApplied(t, db, soon)
		exec(t, other, "ROLLBACK")
		works(t, db)
	})
	t.Run("the database is full", func(t *testing.T) {
		db := openFile(t, filepath.Join(t.TempDir(), "store.db"))
		exec(t, db, "CREATE TABLE filler (b BLOB)")
		exec(t, db, "PRAGMA max_page_count = 1")
		for err := error(nil); err == nil; {
			_, err = db.pool.Exec("INSERT INTO phone_numbers VALUES (hex(randomblob(7)), zeroblob(16), 0, zeroblob(1000))")
		}
		wantNotApplied(t, db, t.Context())
		exec(t, db, "PRAGMA max_page_count = 1000000")
		works(t, db)
	})
	t.Run("the database is read-only", func(t *testing.T) {
		db := openFile(t, filepath.Join(t.TempDir(), "store.db"))
		exec(t, db, "PRAGMA query_only = 1")
		wantNotApplied(t, db, t.Context())
		exec(t, db, "PRAGMA query_only = 0")
		works(t, db)
	})
}
