package store_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var _ verify.Store = (*store.DB)(nil)

func TestMain(m *testing.M) { os.Exit(mariadbtest.Run(m)) }

const number = verify.Number("+8618612345678")

// engines lists the databases. fresh makes an empty one and returns its data source name.
var engines = []struct {
	name   string
	fresh  func(t testing.TB) string
	shared bool // several handles can open one database, which outlives them
}{
	{"SQLite file", func(t testing.TB) string { return "sqlite:" + filepath.Join(t.TempDir(), "store.db") }, true},
	{"SQLite memory", func(testing.TB) string { return "sqlite::memory:" }, false},
	{"MariaDB", mariadbtest.DSN, true},
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

func record(state string, begunAt int64) verify.Record {
	r := verify.Record{State: []byte(state), BegunAt: begunAt}
	rand.Read(r.Version[:])
	return r
}

var none verify.Version

func isUnknown(err error) bool { return errors.Is(err, verify.ErrOutcomeUnknown) }

func mustSwap(t testing.TB, db *store.DB, n verify.Number, old verify.Version, next verify.Record, want bool) {
	t.Helper()
	if done, err := db.Swap(t.Context(), n, old, next); done != want || err != nil {
		t.Fatalf("Swap = %v, %v; want %v", done, err, want)
	}
}

func mustLoad(t testing.TB, db *store.DB, n verify.Number, want verify.Record) {
	t.Helper()
	got, err := db.Load(t.Context(), n)
	if err != nil || got.Version != want.Version || got.BegunAt != want.BegunAt || !bytes.Equal(got.State, want.State) {
		t.Fatalf("Load = %+v, %v; want %+v", got, err, want)
	}
}

// TestStore_KeepsTheContract tests every engine against the contract of verify.Store, with a
// fresh database for each case.
func TestStore_KeepsTheContract(t *testing.T) {
	cases := []struct {
		name   string
		shared bool // needs a shared engine
		run    func(t *testing.T, dsn string, db *store.DB)
	}{
		{"a number without a row loads the zero record", false, func(t *testing.T, _ string, db *store.DB) {
			mustLoad(t, db, number, verify.Record{})
		}},
		{"the zero version swaps if there is no row", false, func(t *testing.T, _ string, db *store.DB) {
			first := record("first", 1)
			mustSwap(t, db, number, none, first, true)
			mustLoad(t, db, number, first)
			mustLoad(t, db, number+"9", verify.Record{})
		}},
		{"the zero version swaps nothing if there is a row", false, func(t *testing.T, _ string, db *store.DB) {
			first := record("first", 1)
			mustSwap(t, db, number, none, first, true)
			mustSwap(t, db, number, none, record("second", 2), false)
			mustLoad(t, db, number, first)
		}},
		{"the present version swaps, and only its number", false, func(t *testing.T, _ string, db *store.DB) {
			first, other, second := record("first", 1), record("other", 2), record("second", 3)
			other.Version = first.Version
			mustSwap(t, db, number, none, first, true)
			mustSwap(t, db, number+"9", none, other, true)
			mustSwap(t, db, number, first.Version, second, true)
			mustLoad(t, db, number, second)
			mustLoad(t, db, number+"9", other)
		}},
		{"a stale version swaps nothing", false, func(t *testing.T, _ string, db *store.DB) {
			first, second := record("first", 1), record("second", 2)
			mustSwap(t, db, number, none, first, true)
			mustSwap(t, db, number, first.Version, second, true)
			mustSwap(t, db, number, first.Version, record("third", 3), false)
			mustLoad(t, db, number, second)
		}},
		{"a version swaps nothing if there is no row", false, func(t *testing.T, _ string, db *store.DB) {
			mustSwap(t, db, number, record("", 0).Version, record("first", 1), false)
			mustLoad(t, db, number, verify.Record{})
		}},
		{"the same swap repeated takes effect once", false, func(t *testing.T, _ string, db *store.DB) {
			first, second := record("first", 1), record("second", 2)
			mustSwap(t, db, number, none, first, true)
			mustSwap(t, db, number, none, first, false)
			mustSwap(t, db, number, first.Version, second, true)
			mustSwap(t, db, number, first.Version, second, false)
			mustLoad(t, db, number, second)
		}},
		{"one of many swaps of one version is applied", false, func(t *testing.T, _ string, db *store.DB) { contend(t, db) }},
		{"one of many swaps of one version by two handles is applied", true, func(t *testing.T, dsn string, db *store.DB) {
			contend(t, db, open(t, dsn))
		}},
		{"a load sees every swap that returned to another handle", true, func(t *testing.T, dsn string, db *store.DB) {
			other, old := open(t, dsn), none
			for i := range 50 {
				next := record(fmt.Sprint(i), int64(i))
				mustSwap(t, db, number, old, next, true)
				mustLoad(t, other, number, next)
				old, db, other = next.Version, other, db
			}
		}},
		{"every byte comes back, in version and state, up to the largest state", false, func(t *testing.T, _ string, db *store.DB) {
			old := none
			for start := 0; start < 256; start += 16 {
				next := record("", 1)
				for i := range next.Version {
					next.Version[i] = byte(start + i)
				}
				for i := range verify.MaxStateBytes {
					next.State = append(next.State, byte(start+i))
				}
				mustSwap(t, db, number, old, next, true)
				mustLoad(t, db, number, next)
				old = next.Version
			}
		}},
		{"versions that end in zeros or spaces are distinct", false, func(t *testing.T, _ string, db *store.DB) {
			zeros, spaces := record("zeros", 1), record("spaces", 2)
			zeros.Version = verify.Version{1}
			copy(spaces.Version[:], "\x01               ")
			mustSwap(t, db, number, none, zeros, true)
			mustSwap(t, db, number, spaces.Version, spaces, false)
			mustSwap(t, db, number, zeros.Version, spaces, true)
			mustSwap(t, db, number, zeros.Version, zeros, false)
		}},
		{"an empty state and a state of NULs come back", false, func(t *testing.T, _ string, db *store.DB) {
			empty, nothing, nuls := record("", 1), record("", 2), record("\x00\x00", 3)
			nothing.State = nil
			mustSwap(t, db, number, none, empty, true)
			mustLoad(t, db, number, empty)
			mustSwap(t, db, number, empty.Version, nothing, true)
			mustLoad(t, db, number, nothing)
			mustSwap(t, db, number, nothing.Version, nuls, true)
			mustLoad(t, db, number, nuls)
		}},
		{"a state that is too large is rejected without effect", false, func(t *testing.T, _ string, db *store.DB) {
			big := record(string(make([]byte, verify.MaxStateBytes+1)), 1)
			if done, err := db.Swap(t.Context(), number, none, big); done || err == nil || isUnknown(err) {
				t.Errorf("Swap = %v, %v; want an error that is not unknown", done, err)
			}
			mustLoad(t, db, number, verify.Record{})
		}},
		{"the time of the last begin is stored to the microsecond", false, func(t *testing.T, dsn string, db *store.DB) {
			first := record("first", 1_790_000_000_123_457)
			mustSwap(t, db, number, none, first, true)
			mustLoad(t, db, number, first)
		}},
		{"numbers are compared as bytes", false, func(t *testing.T, _ string, db *store.DB) {
			for _, n := range []verify.Number{"+8618600000000", "8618600000000", "+861860000000", "A", "a"} {
				next := record(string(n), 1)
				mustSwap(t, db, n, none, next, true)
				mustLoad(t, db, n, next)
			}
		}},
		{"an ended context applies nothing, and the store still works", false, func(t *testing.T, _ string, db *store.DB) {
			first := record("first", 1)
			mustSwap(t, db, number, none, first, true)
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			if done, err := db.Swap(ended, number, first.Version, record("second", 2)); done || err == nil {
				t.Errorf("Swap = %v, %v; want an error", done, err)
			}
			if _, err := db.Load(ended, number); err == nil {
				t.Error("Load = nil; want an error")
			}
			mustLoad(t, db, number, first)
		}},
		{"a context that ends at any moment leaves the old or the new record", false, interrupt},
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
			if got := db.Warnings(t.Context()); len(got) != 0 {
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

// contend runs rounds in which many goroutines swap the same old version over all handles:
// first without a row, then with the record of the last winner.
func contend(t *testing.T, handles ...*store.DB) {
	old := none
	for round := range 20 {
		var winners atomic.Int64
		var winner verify.Record
		var group sync.WaitGroup
		start := make(chan struct{})
		for i := range 16 {
			group.Go(func() {
				next := record(fmt.Sprint(round, i), int64(i))
				<-start
				done, err := handles[i%len(handles)].Swap(t.Context(), number, old, next)
				if err != nil {
					t.Errorf("Swap: %v", err)
				}
				if done {
					winners.Add(1)
					winner = next // the race detector finds a second winner
				}
			})
		}
		close(start)
		group.Wait()
		if got := winners.Load(); got != 1 {
			t.Fatalf("round %d: got %d swaps of one version applied; want 1", round, got)
		}
		for _, db := range handles {
			mustLoad(t, db, number, winner)
		}
		old = winner.Version
	}
}

// interrupt ends contexts while swaps run. true means that the swap was applied, false that
// it was not; only an unknown outcome may be either.
func interrupt(t *testing.T, _ string, db *store.DB) {
	present := record("0", 0)
	mustSwap(t, db, number, none, present, true)
	for i := range 300 {
		ctx, cancel := context.WithCancel(t.Context())
		next := record(fmt.Sprint(i), int64(i))
		go func() {
			for range i * 20 { // ends the context at once up to long after the swap
				_ = ctx.Err()
			}
			cancel()
		}()
		done, err := db.Swap(ctx, number, present.Version, next)
		got, loadErr := db.Load(t.Context(), number)
		cancel()
		if loadErr != nil {
			t.Fatalf("Load after an ended context: %v", loadErr)
		}
		switch got.Version {
		case next.Version:
			if !done && !isUnknown(err) {
				t.Fatalf("Swap = %v, %v for an applied swap; want true or unknown", done, err)
			}
			present = next
		case present.Version:
			if done {
				t.Fatal("Swap = true for a swap that was not applied; want false or an error")
			}
			// A swap of unknown outcome may be applied later. Another swap of its old version
			// ends that.
			fence := record("fence", 0)
			if done, err := db.Swap(t.Context(), number, present.Version, fence); err != nil {
				t.Fatal(err)
			} else if done {
				present = fence
			} else {
				present = next
			}
			mustLoad(t, db, number, present)
		default:
			t.Fatalf("Load = %+v; want the old record or the new", got)
		}
	}
}
