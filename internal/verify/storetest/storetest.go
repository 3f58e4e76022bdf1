// Package storetest tests implementations of verify.Store against its contract. It is a separate
// package, so that the tests of each implementation can import it.
package storetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Number is the phone number in most cases.
const Number = verify.Number("+8618612345678")

// NewRecord returns a record with a random version.
func NewRecord(state string, begunAt int64) verify.Record {
	r := verify.Record{State: []byte(state), BegunAt: begunAt}
	rand.Read(r.Version[:])
	return r
}

var none verify.Version

func isUnknown(err error) bool { return errors.Is(err, verify.ErrOutcomeUnknown) }

// MustSwap fails the test unless the swap returns want without an error.
func MustSwap(t testing.TB, db verify.Store, n verify.Number, old verify.Version, next verify.Record, want bool) {
	t.Helper()
	if done, err := db.Swap(t.Context(), n, old, next); done != want || err != nil {
		t.Fatalf("Swap = %v, %v; want %v", done, err, want)
	}
}

// MustLoad fails the test unless the number has the record want.
func MustLoad(t testing.TB, db verify.Store, n verify.Number, want verify.Record) {
	t.Helper()
	got, err := db.Load(t.Context(), n)
	if err != nil || got.Version != want.Version || got.BegunAt != want.BegunAt || !bytes.Equal(got.State, want.State) {
		t.Fatalf("Load = %+v, %v; want %+v", got, err, want)
	}
}

// Run tests the sentences of the contract, each on an empty store. newStore makes the store, and
// returns a function that opens it. If several replicas can share the store, each call of open
// returns another handle.
func Run(t *testing.T, newStore func(t *testing.T) (open func() verify.Store)) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, db verify.Store, open func() verify.Store)
	}{
		{"a number without a row loads the zero record", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			MustLoad(t, db, Number, verify.Record{})
		}},
		{"the zero version swaps if there is no row", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			first := NewRecord("first", 1)
			MustSwap(t, db, Number, none, first, true)
			MustLoad(t, db, Number, first)
			MustLoad(t, db, Number+"9", verify.Record{})
		}},
		{"the zero version swaps nothing if there is a row", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			first := NewRecord("first", 1)
			MustSwap(t, db, Number, none, first, true)
			MustSwap(t, db, Number, none, NewRecord("second", 2), false)
			MustLoad(t, db, Number, first)
		}},
		{"the present version swaps, and only its number", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			first, other, second := NewRecord("first", 1), NewRecord("other", 2), NewRecord("second", 3)
			other.Version = first.Version
			MustSwap(t, db, Number, none, first, true)
			MustSwap(t, db, Number+"9", none, other, true)
			MustSwap(t, db, Number, first.Version, second, true)
			MustLoad(t, db, Number, second)
			MustLoad(t, db, Number+"9", other)
		}},
		{"a stale version swaps nothing", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			first, second := NewRecord("first", 1), NewRecord("second", 2)
			MustSwap(t, db, Number, none, first, true)
			MustSwap(t, db, Number, first.Version, second, true)
			MustSwap(t, db, Number, first.Version, NewRecord("third", 3), false)
			MustLoad(t, db, Number, second)
		}},
		{"a version swaps nothing if there is no row", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			MustSwap(t, db, Number, NewRecord("", 0).Version, NewRecord("first", 1), false)
			MustLoad(t, db, Number, verify.Record{})
		}},
		{"the same swap repeated takes effect once", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			first, second := NewRecord("first", 1), NewRecord("second", 2)
			MustSwap(t, db, Number, none, first, true)
			MustSwap(t, db, Number, none, first, false)
			MustSwap(t, db, Number, first.Version, second, true)
			MustSwap(t, db, Number, first.Version, second, false)
			MustLoad(t, db, Number, second)
		}},
		{"one of many swaps of one version is applied", func(t *testing.T, db verify.Store, _ func() verify.Store) { Contend(t, db) }},
		{"one of many swaps of one version by two handles is applied", func(t *testing.T, db verify.Store, open func() verify.Store) {
			Contend(t, db, open())
		}},
		{"a load sees every swap that returned to another handle", func(t *testing.T, db verify.Store, open func() verify.Store) {
			other, old := open(), none
			for i := range 50 {
				next := NewRecord(fmt.Sprint(i), int64(i))
				MustSwap(t, db, Number, old, next, true)
				MustLoad(t, other, Number, next)
				old, db, other = next.Version, other, db
			}
		}},
		{"every byte comes back, in version and state, up to the largest state", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			old := none
			for start := 0; start < 256; start += 16 {
				next := NewRecord("", 1)
				for i := range next.Version {
					next.Version[i] = byte(start + i)
				}
				for i := range verify.MaxStateBytes {
					next.State = append(next.State, byte(start+i))
				}
				MustSwap(t, db, Number, old, next, true)
				MustLoad(t, db, Number, next)
				old = next.Version
			}
		}},
		{"versions that end in zeros or spaces are distinct", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			zeros, spaces := NewRecord("zeros", 1), NewRecord("spaces", 2)
			zeros.Version = verify.Version{1}
			copy(spaces.Version[:], "\x01               ")
			MustSwap(t, db, Number, none, zeros, true)
			MustSwap(t, db, Number, spaces.Version, spaces, false)
			MustSwap(t, db, Number, zeros.Version, spaces, true)
			MustSwap(t, db, Number, zeros.Version, zeros, false)
		}},
		{"an empty state and a state of NULs come back", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			empty, nothing, nuls := NewRecord("", 1), NewRecord("", 2), NewRecord("\x00\x00", 3)
			nothing.State = nil
			MustSwap(t, db, Number, none, empty, true)
			MustLoad(t, db, Number, empty)
			MustSwap(t, db, Number, empty.Version, nothing, true)
			MustLoad(t, db, Number, nothing)
			MustSwap(t, db, Number, nothing.Version, nuls, true)
			MustLoad(t, db, Number, nuls)
		}},
		{"a state that is too large is rejected without effect", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			big := NewRecord(string(make([]byte, verify.MaxStateBytes+1)), 1)
			if done, err := db.Swap(t.Context(), Number, none, big); done || err == nil || isUnknown(err) {
				t.Errorf("Swap = %v, %v; want an error that is not unknown", done, err)
			}
			MustLoad(t, db, Number, verify.Record{})
		}},
		{"the time of the last begin is stored to the microsecond", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			first := NewRecord("first", 1_790_000_000_123_457)
			MustSwap(t, db, Number, none, first, true)
			MustLoad(t, db, Number, first)
		}},
		{"numbers are compared as bytes", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			for _, n := range []verify.Number{"+8618600000000", "8618600000000", "+861860000000", "A", "a"} {
				next := NewRecord(string(n), 1)
				MustSwap(t, db, n, none, next, true)
				MustLoad(t, db, n, next)
			}
		}},
		{"an ended context applies nothing, and the store still works", func(t *testing.T, db verify.Store, _ func() verify.Store) {
			first := NewRecord("first", 1)
			MustSwap(t, db, Number, none, first, true)
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			if done, err := db.Swap(ended, Number, first.Version, NewRecord("second", 2)); done || err == nil {
				t.Errorf("Swap = %v, %v; want an error", done, err)
			}
			if _, err := db.Load(ended, Number); err == nil {
				t.Error("Load = nil; want an error")
			}
			MustLoad(t, db, Number, first)
		}},
		{"a context that ends at any moment leaves the old or the new record", interrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			open := newStore(t)
			c.run(t, open(), open)
		})
	}
}

// Contend runs rounds in which many goroutines swap the same old version over all handles. The first
// round begins without a row, and each later one with the record of the last winner.
func Contend(t *testing.T, handles ...verify.Store) {
	old := none
	for round := range 20 {
		var winners atomic.Int64
		var winner verify.Record
		var group sync.WaitGroup
		start := make(chan struct{})
		for i := range 16 {
			group.Go(func() {
				next := NewRecord(fmt.Sprint(round, i), int64(i))
				<-start
				done, err := handles[i%len(handles)].Swap(t.Context(), Number, old, next)
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
			MustLoad(t, db, Number, winner)
		}
		old = winner.Version
	}
}

// interrupt ends contexts while swaps run. true means that the swap was applied, false that
// it was not; only an unknown outcome may be either.
func interrupt(t *testing.T, db verify.Store, _ func() verify.Store) {
	present := NewRecord("0", 0)
	MustSwap(t, db, Number, none, present, true)
	for i := range 300 {
		ctx, cancel := context.WithCancel(t.Context())
		next := NewRecord(fmt.Sprint(i), int64(i))
		go func() {
			for range i * 20 { // ends the context at once up to long after the swap
				_ = ctx.Err()
			}
			cancel()
		}()
		done, err := db.Swap(ctx, Number, present.Version, next)
		got, loadErr := db.Load(t.Context(), Number)
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
			fence := NewRecord("fence", 0)
			if done, err := db.Swap(t.Context(), Number, present.Version, fence); err != nil {
				t.Fatal(err)
			} else if done {
				present = fence
			} else {
				present = next
			}
			MustLoad(t, db, Number, present)
		default:
			t.Fatalf("Load = %+v; want the old record or the new", got)
		}
	}
}
