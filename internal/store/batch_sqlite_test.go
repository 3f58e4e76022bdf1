package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

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
func TestGroupCommit_AppliesAllOrNone(t *testing.T) {
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
			exec(t, db, c.before)
			var all []*request[swapRequest]
			for i := range byte(8) {
				all = append(all, newRequest(swapRequest{number: verify.Number(fmt.Sprint("+", i)), next: newRecord(i)}))
			}
			loser := newRequest(all[0].value)
			gone := newRequest(swapRequest{number: "+gone", next: newRecord(9)})
			gone.claim()
			if err := db.executor.(*groupCommit).runSwaps(slices.Concat(all, []*request[swapRequest]{loser, gone})); err != nil {
				t.Errorf("flush = %v; want nil, which pauses nothing", err)
			}
			exec(t, db, c.after)
			for _, r := range all {
				got, want, stored := <-r.result, outcomeApplied, r.value.next
				if c.fails {
					want, stored = outcomeNotApplied, verify.Record{}
				}
				if got.outcome != want {
					t.Errorf("%s: got outcome %d, %v; want %d", r.value.number, got.outcome, got.err, want)
				}
				mustBeStored(t, db, r.value.number, stored)
			}
			if got := <-loser.result; got.outcome == outcomeApplied {
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
	testutil.Eventually(t, "the worker waits for the lock, and requests for the worker", func() bool {
		return len(db.executor.(*groupCommit).swaps.queue) > 0
	})
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
