package store_test

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	"github.com/liulinhuai/phone-number-service/internal/verify/storetest"
)

var _ verify.Store = (*store.DB)(nil)

func TestMain(m *testing.M) { os.Exit(mysqltest.Run(m)) }

const number = storetest.Number

// engines lists the databases. fresh makes an empty one and returns its data source name.
var engines = []struct {
	name   string
	fresh  func(t testing.TB) string
	shared bool // several handles can open one database, which outlives them
}{
	{"SQLite file", func(t testing.TB) string { return "sqlite:" + filepath.Join(t.TempDir(), "store.db") }, true},
	{"SQLite memory", func(testing.TB) string { return "sqlite::memory:" }, false},
	{"server", mysqltest.DSN, true},
}

// open returns a handle that is ready. The end of the test closes it.
func open(t testing.TB, dsn string) *store.DB {
	t.Helper()
	db, err := store.Open(dsn)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Prepare(t.Context()); err != nil {
		t.Fatalf("Prepare: %v", err)
	}
	return db
}

var (
	record   = storetest.NewRecord
	mustSwap = storetest.MustSwap
	mustLoad = storetest.MustLoad
	contend  = storetest.Contend
	none     verify.Version
)

func isUnknown(err error) bool { return errors.Is(err, verify.ErrOutcomeUnknown) }

// TestStore_KeepsTheContract runs the suite of the contract on every engine.
func TestStore_KeepsTheContract(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) {
			storetest.Run(t, func(t *testing.T) func() verify.Store {
				dsn := engine.fresh(t)
				if engine.shared {
					return func() verify.Store { return open(t, dsn) }
				}
				db := open(t, dsn)
				return func() verify.Store { return db }
			})
		})
	}
}

// TestDB_IsDurableAndReady tests the promises of a DB beyond the contract of verify.Store.
func TestDB_IsDurableAndReady(t *testing.T) {
	cases := []struct {
		name   string
		shared bool // needs a shared engine
		run    func(t *testing.T, dsn string, db *store.DB)
	}{
		{"applied swaps are there after the database is opened again", true, func(t *testing.T, dsn string, db *store.DB) {
			first := record("first", 1)
			mustSwap(t, db, number, none, first, true)
			db.Close()
			mustLoad(t, open(t, dsn), number, first)
		}},
		{"a database that is ready has no warnings", false, func(t *testing.T, _ string, db *store.DB) {
			if err := db.Ready(t.Context()); err != nil {
				t.Errorf("Ready = %v; want nil", err)
			}
			if got := db.Warnings(); len(got) != 0 {
				t.Errorf("Warnings = %q; want none", got)
			}
		}},
		{"a closed database is not ready", false, func(t *testing.T, _ string, db *store.DB) {
			db.Close()
			if err := db.Ready(t.Context()); err == nil {
				t.Error("Ready = nil; want an error")
			}
		}},
	}
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) {
			for _, c := range cases {
				if c.shared && !engine.shared {
					continue
				}
				t.Run(c.name, func(t *testing.T) {
					dsn := engine.fresh(t)
					c.run(t, dsn, open(t, dsn))
				})
			}
		})
	}
}

func TestPrepare_IsSafeForConcurrentReplicas(t *testing.T) {
	for _, engine := range engines {
		if !engine.shared {
			continue
		}
		t.Run(engine.name, func(t *testing.T) {
			dsn := engine.fresh(t)
			var group sync.WaitGroup
			for range 10 {
				group.Go(func() {
					db, err := store.Open(dsn)
					if err != nil {
						t.Errorf("Open: %v", err)
						return
					}
					defer db.Close()
					// SQLite lets only one handle at a time turn on a new file's WAL.
					for err = store.ErrUnavailable; errors.Is(err, store.ErrUnavailable) && t.Context().Err() == nil; {
						err = db.Prepare(t.Context())
					}
					if err != nil {
						t.Errorf("Prepare = %v; want nil or %v, then nil", err, store.ErrUnavailable)
					}
				})
			}
			group.Wait()
		})
	}
}
