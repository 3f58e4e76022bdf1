package store

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

func TestFlushLoads_EachRequestGetsItsRecord(t *testing.T) {
	db := openHere(t, mysqltest.DSN(t))
	m := db.executor.(*multiRow)
	for i := range byte(3) {
		if done, err := db.Swap(t.Context(), verify.Number(fmt.Sprint("+", i)), verify.Version{}, newRecord(i)); !done || err != nil {
			t.Fatalf("Swap = %v, %v; want true", done, err)
		}
	}
	requests := func(numbers ...verify.Number) (all []*request[verify.Number]) {
		for _, n := range numbers {
			all = append(all, newRequest(n))
		}
		return all
	}
	all := requests("+2", "+missing", "+1", "+0", "+2")
	want := []verify.Record{newRecord(2), {}, {}, newRecord(0), newRecord(2)}
	gone := all[2]
	gone.claim()
	if err := m.runLoads(all); err != nil {
		t.Errorf("runLoads = %v, want nil", err)
	}
	for i, l := range all {
		if l == gone {
			if len(l.result) != 0 {
				t.Error("a request whose call gave up got a result; want none")
			}
			continue
		}
		got := <-l.result
		if got.outcome != outcomeApplied || got.err != nil {
			t.Errorf("%s: got outcome %d, %v; want applied", l.value, got.outcome, got.err)
		}
		if got := got.record; got.Version != want[i].Version || string(got.State) != string(want[i].State) {
			t.Errorf("%s: got %v, want %v", l.value, got, want[i])
		}
	}
	if err := m.runLoads([]*request[verify.Number]{gone}); err != nil {
		t.Errorf("runLoads without a request that waits = %v, want nil", err)
	}

	db.pool.Close()
	for _, all := range [][]*request[verify.Number]{requests("+0"), requests("+0", "+1")} {
		if err := m.runLoads(all); err == nil {
			t.Errorf("runLoads of %d on a closed database = nil; want an error, which pauses batching", len(all))
		}
	}
}

func TestFlushUpdates_AppliesAllOrNone(t *testing.T) {
	noUndo := func() {}
	for name, c := range map[string]struct {
		rows       int
		disturb    func(t *testing.T, db *DB, all []*request[swapRequest]) (undo func())
		want       outcome
		wantPaused bool
		unchanged  bool  // of unknown outcome, but not applied
		losers     []int // in conflict: run directly, with a few others
	}{
		"two":                         {rows: 2, want: outcomeApplied},
		"a small batch":               {rows: smallBatch, want: outcomeApplied},
		"one more than a small batch": {rows: smallBatch + 1, want: outcomeApplied},
		"a large batch":               {rows: largeBatch, want: outcomeApplied},
		"two conflicts": {rows: 21, want: outcomeApplied, losers: []int{7, 20}, disturb: func(_ *testing.T, _ *DB, all []*request[swapRequest]) func() {
			all[7].value.old[0]++
			all[20].value.old = verify.Version{1}
			return noUndo
		}},
		"versions of other numbers": {rows: 2, want: outcomeApplied, losers: []int{0, 1}, disturb: func(_ *testing.T, _ *DB, all []*request[swapRequest]) func() {
			all[0].value.old, all[1].value.old = all[1].value.old, all[0].value.old
			return noUndo
		}},
		"a row is locked": {rows: 3, want: outcomeRunDirect, wantPaused: true, disturb: func(t *testing.T, db *DB, all []*request[swapRequest]) func() {
			tx, err := db.pool.Begin()
			if err == nil {
				_, err = tx.Exec("SELECT state FROM phone_numbers WHERE phone_number = ? FOR UPDATE", string(all[1].value.number))
			}
			if err != nil {
				t.Fatal(err)
			}
			return func() { tx.Rollback() }
		}},
		"the table is missing": {rows: 3, want: outcomeRunDirect, wantPaused: true, disturb: func(t *testing.T, db *DB, _ []*request[swapRequest]) func() {
			exec(t, db, "RENAME TABLE phone_numbers TO hidden")
			return func() { exec(t, db, "RENAME TABLE hidden TO phone_numbers") }
		}},
		"a proxy made the session not strict": {rows: 20, want: outcomeUnknown, wantPaused: true, unchanged: true, disturb: func(t *testing.T, db *DB, all []*request[swapRequest]) func() {
			all[7].value.old[0]++
			db.pool.SetMaxOpenConns(1)
			exec(t, db, "SET sql_mode = ''")
			return noUndo
		}},
		"a row was deleted": {rows: 3, want: outcomeUnknown, wantPaused: true, disturb: func(t *testing.T, db *DB, all []*request[swapRequest]) func() {
			exec(t, db, "DELETE FROM phone_numbers WHERE phone_number = '"+string(all[1].value.number)+"'")
			return noUndo
		}},
	} {
		t.Run(name, func(t *testing.T) {
			db := openHere(t, mysqltest.DSN(t))
			var all []*request[swapRequest]
			before := map[verify.Number]verify.Record{}
			for i := range c.rows {
				n := verify.Number(fmt.Sprint("+86186", i))
				before[n] = randomRecord(int64(i))
				if got := db.direct.swap(t.Context(), swapRequest{n, verify.Version{}, before[n]}); got.outcome != outcomeApplied {
					t.Fatalf("swap: got outcome %d, %v; want applied", got.outcome, got.err)
				}
				all = append(all, newRequest(swapRequest{n, before[n].Version, randomRecord(int64(i))}))
			}
			undo := noUndo
			if c.disturb != nil {
				undo = c.disturb(t, db, all)
			}
			again, gone := newRequest(all[0].value), newRequest(all[1].value)
			gone.claim()
			err := db.executor.(*multiRow).runUpdates(slices.Concat([]*request[swapRequest]{gone}, all, []*request[swapRequest]{again}))
			undo()

			direct := 0
			for i, r := range all {
				got, want, s := <-r.result, c.want, r.value
				if c.losers != nil && (got.outcome == outcomeRunDirect || slices.Contains(c.losers, i)) {
					want = outcomeRunDirect
				}
				if got.outcome != want {
					t.Errorf("%s: got outcome %d, %v; want %d", s.number, got.outcome, got.err, want)
				}
				if (got.err != nil) != (want == outcomeUnknown) {
					t.Errorf("%s: got error %v with outcome %d; want one with unknown only", s.number, got.err, want)
				}
				switch {
				case want == outcomeApplied:
					mustBeStored(t, db, s.number, s.next)
				case want == outcomeRunDirect:
					direct++
					mustBeStored(t, db, s.number, before[s.number])
				case c.unchanged:
					mustBeStored(t, db, s.number, before[s.number])
				}
			}
			if c.losers != nil && direct > len(c.losers)*smallBatch/2 {
				t.Errorf("%d requests run directly for %d conflicts; want %d at most", direct, len(c.losers), len(c.losers)*smallBatch/2)
			}
			if got := <-again.result; got.outcome != outcomeRunDirect {
				t.Errorf("the same number again: got outcome %d, want to run directly", got.outcome)
			}
			if len(gone.result) != 0 {
				t.Error("a request whose call gave up got a result; want none")
			}
			if (err != nil) != c.wantPaused {
				t.Errorf("runUpdates = %v; want an error, which pauses batching: %v", err, c.wantPaused)
			}
		})
	}
}

// A trigger fails with the error numbers of TiDB. A conflict must not end in an unknown outcome: it
// is common, and a check of unknown outcome is UNKNOWN for its caller.
func TestSwap_ErrorsOfTiDBHaveTheirOutcome(t *testing.T) {
	mysqltest.SkipOnExisting(t, "triggers")
	db := openHere(t, mysqltest.DSN(t))
	exec(t, db, "CREATE TRIGGER fails BEFORE INSERT ON phone_numbers FOR EACH ROW BEGIN"+
		" DECLARE n INT DEFAULT NEW.begun_at; SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = n; END")
	for want, numbers := range map[outcome][]int64{
		outcomeConflict:   {8005, 8022, 9007},
		outcomeNotApplied: {8027, 8028, 8113},
		outcomeUnknown:    {9001, 9002, 9003, 9004, 9005},
	} {
		for _, n := range numbers {
			got := db.executor.swap(t.Context(), swapRequest{number: "+1", next: randomRecord(n)})
			if got.outcome != want {
				t.Errorf("%d: got outcome %d, %v; want %d", n, got.outcome, got.err, want)
			}
		}
	}
}

// TestReady_FailsIfTheSessionConvertsBytes has a session with two character sets, as a proxy can make
// one. MySQL rejects bytes that it cannot convert. MariaDB replaces them without an error.
func TestReady_FailsIfTheSessionConvertsBytes(t *testing.T) {
	db := openHere(t, mysqltest.DSN(t))
	var version string
	if err := db.pool.QueryRow("SELECT VERSION()").Scan(&version); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(version, "MariaDB") {
		t.Skip("MariaDB replaces the bytes without an error")
	}
	db.pool.SetMaxOpenConns(1)
	exec(t, db, "SET character_set_connection = latin1")
	if err := db.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "3988") {
		t.Errorf("Ready = %v; want MySQL error 3988", err)
	}
}

// A failed statement of any batcher pauses both, since they share the connections.
func TestMultiRow_AFailedLoadPausesSwapsToo(t *testing.T) {
	db := openHere(t, mysqltest.DSN(t))
	m := db.executor.(*multiRow)
	exec(t, db, "RENAME TABLE phone_numbers TO hidden")
	if _, err := db.Load(t.Context(), "+1"); err == nil {
		t.Error("Load without a table = nil; want an error")
	}
	exec(t, db, "RENAME TABLE hidden TO phone_numbers")
	db.executor.close() // waits until the worker has paused batching
	if !m.swaps.breaker.paused() {
		t.Error("batching of swaps: got no pause, want one")
	}
	if got := counted(t, db.counters.batchingPaused); got != 1 {
		t.Errorf("the metric: got %v pauses, want 1", got)
	}
	if done, err := db.Swap(t.Context(), "+1", verify.Version{1}, newRecord(1)); done || err != nil { // runs directly
		t.Errorf("Swap while batching is paused = %v, %v; want false", done, err)
	}
}

// A request in a batch reports only its own conflict.
func TestSwap_BatchedRacesHaveOneWinnerEach(t *testing.T) {
	db := openHere(t, mysqltest.DSN(t))
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
