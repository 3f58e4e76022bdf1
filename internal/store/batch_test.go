package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
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

func TestFlushLoads_EachRequestGetsItsRecord(t *testing.T) {
	db := openHere(t, mariadbtest.DSN(t))
	db.loads.close() // the test flushes
	for i := range byte(3) {
		if done, err := db.Swap(t.Context(), verify.Number(fmt.Sprint("+", i)), verify.Version{}, newRecord(i)); !done || err != nil {
			t.Fatalf("Swap = %v, %v; want true", done, err)
		}
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	request := func(ctx context.Context, n verify.Number) loadRequest {
		return loadRequest{ctx, n, make(chan loadResult, 1)}
	}
	all := []loadRequest{
		request(t.Context(), "+2"), request(t.Context(), "+missing"), request(gone, "+1"), request(t.Context(), "+0"), request(t.Context(), "+2"),
	}
	want := []verify.Record{newRecord(2), {}, {}, newRecord(0), newRecord(2)}
	db.flushLoads(append([]loadRequest{}, all...))
	for i, l := range all {
		if l.ctx.Err() != nil {
			if len(l.result) != 0 {
				t.Error("a request whose call gave up got a result; want none")
			}
			continue
		}
		if a := <-l.result; a.err != nil || a.record.Version != want[i].Version || string(a.record.State) != string(want[i].State) {
			t.Errorf("%s: got %v, %v; want %v", l.number, a.record, a.err, want[i])
		}
	}
	db.flushLoads([]loadRequest{request(gone, "+1")})

	db.pool.Close()
	all = []loadRequest{request(t.Context(), "+0"), request(t.Context(), "+1")}
	db.flushLoads(append([]loadRequest{}, all...))
	for _, l := range all {
		if a := <-l.result; a.err == nil {
			t.Errorf("%s on a closed database: got nil; want an error", l.number)
		}
	}
}

// randomRecord returns a record with random bytes as version and state.
func randomRecord(begunAt int64) verify.Record {
	r := verify.Record{BegunAt: begunAt, State: make([]byte, 59)}
	rand.Read(r.Version[:])
	rand.Read(r.State)
	return r
}

func TestFlushUpdates_AppliesAllOrNone(t *testing.T) {
	noUndo := func() {}
	for name, c := range map[string]struct {
		rows                 int
		disturb              func(t *testing.T, db *DB, all []*swapRequest) (undo func())
		done, direct, pauses bool  // neither done nor direct: unknown
		unchanged            bool  // of unknown outcome, but not applied
		losers               []int // in conflict: run directly, with a few others
	}{
		"two":                         {rows: 2, done: true},
		"a small batch":               {rows: smallBatch, done: true},
		"one more than a small batch": {rows: smallBatch + 1, done: true},
		"a large batch":               {rows: largeBatch, done: true},
		"two conflicts": {rows: 21, losers: []int{7, 20}, disturb: func(_ *testing.T, _ *DB, all []*swapRequest) func() {
			all[7].old[0]++
			all[20].old = verify.Version{1}
			return noUndo
		}},
		"versions of other numbers": {rows: 2, losers: []int{0, 1}, disturb: func(_ *testing.T, _ *DB, all []*swapRequest) func() {
			all[0].old, all[1].old = all[1].old, all[0].old
			return noUndo
		}},
		"a row is locked": {rows: 3, direct: true, pauses: true, disturb: func(t *testing.T, db *DB, all []*swapRequest) func() {
			tx, err := db.pool.Begin()
			if err == nil {
				_, err = tx.Exec("SELECT state FROM phone_numbers WHERE phone_number = ? FOR UPDATE", string(all[1].number))
			}
			if err != nil {
				t.Fatal(err)
			}
			return func() { tx.Rollback() }
		}},
		"the table is missing": {rows: 3, direct: true, pauses: true, disturb: func(t *testing.T, db *DB, _ []*swapRequest) func() {
			exec(t, db, "RENAME TABLE phone_numbers TO hidden")
			return func() { exec(t, db, "RENAME TABLE hidden TO phone_numbers") }
		}},
		"a proxy made the session not strict": {rows: 20, pauses: true, unchanged: true, disturb: func(t *testing.T, db *DB, all []*swapRequest) func() {
			all[7].old[0]++
			db.pool.SetMaxOpenConns(1)
			exec(t, db, "SET sql_mode = ''")
			return noUndo
		}},
		"a row was deleted": {rows: 3, pauses: true, disturb: func(t *testing.T, db *DB, all []*swapRequest) func() {
			exec(t, db, "DELETE FROM phone_numbers WHERE phone_number = '"+string(all[1].number)+"'")
			return noUndo
		}},
	} {
		t.Run(name, func(t *testing.T) {
			db := openHere(t, mariadbtest.DSN(t))
			db.swaps.close() // the test flushes
			request := func(n verify.Number, old verify.Version) *swapRequest {
				return &swapRequest{number: n, old: old, next: randomRecord(int64(len(n))), result: make(chan error, 1)}
			}
			var all []*swapRequest
			before := map[verify.Number]verify.Record{}
			for i := range c.rows {
				n := verify.Number(fmt.Sprint("+86186", i))
				before[n] = randomRecord(int64(i))
				if done, err := swap(t.Context(), db.insert, db.update, n, verify.Version{}, before[n]); !done || err != nil {
					t.Fatalf("swap = %v, %v; want true", done, err)
				}
				all = append(all, request(n, before[n].Version))
			}
			undo := noUndo
			if c.disturb != nil {
				undo = c.disturb(t, db, all)
			}
			again, gone := request(all[0].number, all[0].old), request(all[1].number, all[1].old)
			gone.claimed.Store(true)
			db.flushUpdates(append(append([]*swapRequest{gone}, all...), again))
			undo()

			direct := 0
			for i, s := range all {
				err := <-s.result
				done, runsDirect := c.done, c.direct
				if c.losers != nil {
					runsDirect = errors.Is(err, errRunDirect) || slices.Contains(c.losers, i)
					done = !runsDirect
				}
				if s.done != done || (err == nil) != done || errors.Is(err, errRunDirect) != runsDirect {
					t.Errorf("%s: got done %v, %v; want done %v, to run directly %v", s.number, s.done, err, done, runsDirect)
				}
				switch {
				case done:
					mustBeStored(t, db, s.number, s.next)
				case runsDirect:
					direct++
					mustBeStored(t, db, s.number, before[s.number])
				case c.unchanged:
					mustBeStored(t, db, s.number, before[s.number])
				}
				if !done && !runsDirect && db.classify(err) != 0 {
					t.Errorf("%s: got class %04b of %v, want unknown", s.number, db.classify(err), err)
				}
			}
			if c.losers != nil && direct > len(c.losers)*smallBatch/2 {
				t.Errorf("%d requests run directly for %d conflicts; want %d at most", direct, len(c.losers), len(c.losers)*smallBatch/2)
			}
			if err := <-again.result; !errors.Is(err, errRunDirect) {
				t.Errorf("the same number again: got %v, want errRunDirect", err)
			}
			if len(gone.result) != 0 {
				t.Error("a request whose call gave up got a result; want none")
			}
			if got := db.batchingPaused(); got != c.pauses {
				t.Errorf("batching paused: got %v, want %v", got, c.pauses)
			}
		})
	}
}

func TestBatcher_PanicFailsItsOwnBatchOnly(t *testing.T) {
	c := newBatcher(1, 8, func(all []*swapRequest) {
		if all[0].number == "+1" {
			panic("a statement with +8618612345678")
		}
		all[0].result <- nil
	})
	defer c.close()
	for _, n := range []verify.Number{"+1", "+2"} { // a later batch succeeds
		s := &swapRequest{number: n, result: make(chan error, 1)}
		if err := c.submit(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if err := <-s.result; (err != nil) != (n == "+1") || err != nil && err.Error() != "panic with a string" {
			t.Errorf("%s: got %v; want \"panic with a string\" for +1 alone", n, err)
		}
	}
}

// A request in a batch reports only its own conflict.
func TestSwap_BatchedRacesHaveOneWinnerEach(t *testing.T) {
	db := openHere(t, mariadbtest.DSN(t))
	const numbers, racers, rounds = 40, 3, 5
	var group sync.WaitGroup
	for i := range numbers {
		n := verify.Number(fmt.Sprint("+86186", i))
		group.Go(func() {
			var old verify.Record
			for round := range rounds {
				var (
					race    sync.WaitGroup
					won     = make([]bool, racers)
					records = make([]verify.Record, racers)
				)
				for racer := range racers {
					records[racer] = randomRecord(int64(round))
					race.Go(func() {
						var err error
						if won[racer], err = db.Swap(t.Context(), n, old.Version, records[racer]); err != nil {
							t.Errorf("%s: Swap: %v", n, err)
						}
					})
				}
				race.Wait()
				winner := slices.Index(won, true)
				if winner < 0 || slices.Contains(won[winner+1:], true) {
					t.Errorf("%s: got the winners %v, want one", n, won)
					return
				}
				old = records[winner]
				mustBeStored(t, db, n, old)
			}
		})
	}
	group.Wait()
}

// A call that gave up before the transaction began returned "not applied", so its swap must
// not be applied later.
func TestSwap_IsNotAppliedAfterItsCallGaveUp(t *testing.T) {
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

// Swaps that wait for one lock are one transaction. If one statement fails, all swaps fail
// and none is applied.
func TestFlushSwapsTx_AppliesAllOrNone(t *testing.T) {
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
			db.swaps.close() // the test flushes
			exec(t, db, c.before)
			var all []*swapRequest
			for i := range byte(8) {
				all = append(all, &swapRequest{number: verify.Number(fmt.Sprint("+", i)), next: newRecord(i), result: make(chan error, 1)})
			}
			loser := &swapRequest{number: all[0].number, next: all[0].next, result: make(chan error, 1)}
			gone := &swapRequest{number: "+gone", next: newRecord(9), result: make(chan error, 1)}
			gone.claimed.Store(true)
			db.flushSwapsTx(append(append([]*swapRequest{}, all...), loser, gone))
			exec(t, db, c.after)
			db.dialect.startBatching(db) // new batchers
			for _, s := range all {
				err, want := <-s.result, s.next
				if c.fails {
					want = verify.Record{}
				}
				if (err != nil) != c.fails || c.fails && db.classify(err)&notApplied == 0 || !c.fails && !s.done {
					t.Errorf("%s: got done %v, %v; want failed %v", s.number, s.done, err, c.fails)
				}
				mustBeStored(t, db, s.number, want)
			}
			if err := <-loser.result; loser.done && err == nil {
				t.Error("got two swaps of one version applied; want one")
			}
			if len(gone.result) != 0 {
				t.Error("a request whose call gave up got a result; want none")
			}
			mustBeStored(t, db, "+gone", verify.Record{})
			if done, err := db.Swap(t.Context(), "+after", verify.Version{}, newRecord(7)); !done || err != nil {
				t.Errorf("Swap after it = %v, %v; want true", done, err)
			}
		})
	}
}

func TestClose_FailsWaitingRequests(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store.db")
	db, other := openFile(t, path), openFile(t, path)
	exec(t, other, "BEGIN IMMEDIATE")
	const requests = 2 * maxTxSwaps
	var group sync.WaitGroup
	results := make(chan error, requests)
	for i := range requests {
		group.Go(func() {
			_, err := db.Swap(t.Context(), verify.Number(fmt.Sprint("+", i)), verify.Version{}, newRecord(byte(i)))
			results <- err
		})
	}
	for len(db.swaps.queue) == 0 { // the worker waits for the lock, requests for the worker
		time.Sleep(time.Millisecond)
	}
	db.Close()
	group.Wait()
	for range requests {
		if err := <-results; err == nil || errors.Is(err, verify.ErrOutcomeUnknown) {
			t.Errorf("got %v; want an error that is not unknown", err)
		}
	}
	exec(t, other, "ROLLBACK")
	mustBeStored(t, other, "+1", verify.Record{})
}
