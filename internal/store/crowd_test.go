package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

func newRecord(first byte) verify.Record {
	return verify.Record{Version: verify.Version{first, 1}, State: []byte{first}, BegunAt: int64(first)}
}

func mustBeStored(t *testing.T, db *DB, n verify.Number, want verify.Record) {
	t.Helper()
	got, err := db.Load(t.Context(), n)
	if err != nil || got.Version != want.Version || got.BegunAt != want.BegunAt || string(got.State) != string(want.State) {
		t.Errorf("Load(%s) = %v, %v; want %v", n, got, err, want)
	}
}

func TestLoadsThatAreServedTogetherGetEachItsOwn(t *testing.T) {
	db := openHere(t, mariadbtest.DSN(t))
	db.loads.end() // to serve by hand
	for i := range byte(3) {
		if done, err := db.Swap(t.Context(), verify.Number(fmt.Sprint("+", i)), verify.Version{}, newRecord(i)); !done || err != nil {
			t.Fatalf("Swap = %v, %v", done, err)
		}
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	ask := func(ctx context.Context, n verify.Number) loading { return loading{ctx, n, make(chan loaded, 1)} }
	all := []loading{
		ask(t.Context(), "+2"), ask(t.Context(), "+missing"), ask(gone, "+1"), ask(t.Context(), "+0"), ask(t.Context(), "+2"),
	}
	want := []verify.Record{newRecord(2), {}, {}, newRecord(0), newRecord(2)}
	db.serveLoads(append([]loading{}, all...))
	for i, l := range all {
		if l.ctx.Err() != nil {
			if len(l.answer) != 0 {
				t.Error("who had gone was served")
			}
			continue
		}
		if a := <-l.answer; a.err != nil || a.record.Version != want[i].Version || string(a.record.State) != string(want[i].State) {
			t.Errorf("%s: got %v, %v; want %v", l.number, a.record, a.err, want[i])
		}
	}
	db.serveLoads([]loading{ask(gone, "+1")})

	db.pool.Close()
	all = []loading{ask(t.Context(), "+0"), ask(t.Context(), "+1")}
	db.serveLoads(append([]loading{}, all...))
	for _, l := range all {
		if a := <-l.answer; a.err == nil {
			t.Errorf("%s: got no error from a database that is closed", l.number)
		}
	}
}

// A caller who gave up before the transaction began was told "no effect", for good.
func TestASwapIsNotDoneOnceItsCallerGaveUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	db, other := openFile(t, path), openFile(t, path)
	exec(t, other, "BEGIN IMMEDIATE")
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if done, err := db.Swap(soon, "+1", verify.Version{}, newRecord(1)); done || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, verify.ErrOutcomeUnknown) {
		t.Errorf("Swap = %v, %v; want the deadline, and no effect", done, err)
	}
	exec(t, other, "ROLLBACK")
	if done, err := db.Swap(t.Context(), "+2", verify.Version{}, newRecord(2)); !done || err != nil { // after it in the queue
		t.Errorf("Swap = %v, %v; want true", done, err)
	}
	mustBeStored(t, db, "+1", verify.Record{})
}

// Swaps that wait for one lock are done together: what fails among them fails for
// all, and nothing of it is stored.
func TestATransactionOfManyIsDoneAsAWholeOrNotAtAll(t *testing.T) {
	for name, c := range map[string]struct {
		before string // makes the transaction fail at its fifth swap
		after  string
		fails  bool
	}{
		"done":  {before: "SELECT 1", after: "SELECT 1"},
		"fails": {before: "CREATE TRIGGER breaks BEFORE INSERT ON phone_numbers WHEN NEW.begun_at = 5 BEGIN SELECT abs(-9223372036854775807 - 1); END", after: "DROP TRIGGER breaks", fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			db := openFile(t, filepath.Join(t.TempDir(), "store.db"))
			db.swaps.end() // to serve by hand
			exec(t, db, c.before)
			var all []*swapping
			for i := range byte(8) {
				all = append(all, &swapping{number: verify.Number(fmt.Sprint("+", i)), next: newRecord(i), answer: make(chan error, 1)})
			}
			loser := &swapping{number: all[0].number, next: all[0].next, answer: make(chan error, 1)}
			gone := &swapping{number: "+gone", next: newRecord(9), answer: make(chan error, 1)}
			gone.claimed.Store(true)
			db.serveSwaps(append(append([]*swapping{}, all...), loser, gone))
			exec(t, db, c.after)
			db.engine.form(db) // a crowd again
			for _, s := range all {
				err, want := <-s.answer, s.next
				if c.fails {
					want = verify.Record{}
				}
				if (err != nil) != c.fails || c.fails && db.judge(err)&noEffect == 0 || !c.fails && !s.done {
					t.Errorf("%s: got %v, %v", s.number, s.done, err)
				}
				mustBeStored(t, db, s.number, want)
			}
			if err := <-loser.answer; loser.done && err == nil {
				t.Error("two swaps of one version were done")
			}
			if len(gone.answer) != 0 {
				t.Error("who had gone was answered")
			}
			mustBeStored(t, db, "+gone", verify.Record{})
			if done, err := db.Swap(t.Context(), "+after", verify.Version{}, newRecord(7)); !done || err != nil {
				t.Errorf("Swap after it = %v, %v; want true", done, err)
			}
		})
	}
}

func TestCloseTellsWhoWaits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	db, other := openFile(t, path), openFile(t, path)
	exec(t, other, "BEGIN IMMEDIATE")
	const callers = 2 * swapsAtOnce
	var group sync.WaitGroup
	told := make(chan error, callers)
	for i := range callers {
		group.Go(func() {
			_, err := db.Swap(t.Context(), verify.Number(fmt.Sprint("+", i)), verify.Version{}, newRecord(byte(i)))
			told <- err
		})
	}
	for len(db.swaps.asked) == 0 { // the worker waits for the lock, and others for it
		time.Sleep(time.Millisecond)
	}
	db.Close()
	group.Wait()
	for range callers {
		if err := <-told; err == nil || errors.Is(err, verify.ErrOutcomeUnknown) {
			t.Errorf("got %v; want an error without effect", err)
		}
	}
	exec(t, other, "ROLLBACK")
	mustBeStored(t, other, "+1", verify.Record{})
}
