package verify

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// A replica that wrote a number's last record does not load it. A cached record alone never
// decides a result.
func TestRecordCache_SavesALoadAndDecidesNothing(t *testing.T) {
	loadsOf := func(store *brokenStore, f func()) (loads int) {
		store.load = func(context.Context) error { loads++; return nil }
		f()
		return loads
	}
	type world struct {
		store brokenStore
		v     *Verifier
	}
	check := func(t *testing.T, w *world, code string, want bool) {
		t.Helper()
		if got, err := isValid(t.Context(), w.v, testNumber, code); got != want || err != nil {
			t.Errorf("check %s: got %v, %v, want %v", code, got, err, want)
		}
	}
	for _, c := range []struct {
		name  string
		then  func(t *testing.T, w *world) // after this replica sent 000001
		loads int
	}{
		{"wrong, wrong, right", func(t *testing.T, w *world) {
			check(t, w, wrongGuess, false)
			check(t, w, wrongGuess, false)
			check(t, w, "000001", true)
		}, 0},
		{"after the last code nothing is cached", func(t *testing.T, w *world) {
			check(t, w, "000001", true)
			if n := len(w.v.cache.current) + len(w.v.cache.previous); n != 0 {
				t.Errorf("got %d cached records, want none", n)
			}
			check(t, w, "000001", false)
		}, 1},
		{"another replica sent since", func(t *testing.T, w *world) {
			sent(t, &w.store.fakeStore, "888888")
			check(t, w, "000001", false)
			check(t, w, "888888", true)
		}, 1},
		{"another replica used the code", func(t *testing.T, w *world) {
			checked(&w.store.fakeStore, "000001")
			check(t, w, "000001", false)
		}, 1},
		{"the cached codes have expired: the next send loads, and swaps once", func(t *testing.T, w *world) {
			time.Sleep(testRules.CodeTTL)
			swaps := 0
			w.store.swap = func(context.Context) error { swaps++; return nil }
			checked(&w.store.fakeStore, "") // another replica wrote
			if _, err := w.v.Send(t.Context(), testNumber, "", ""); err != nil || swaps != 2 {
				t.Errorf("send: got %v and %d swaps, want nil and 2, a begin and a confirm", err, swaps)
			}
		}, 1},
		{"the cached codes have expired, and another replica sent since", func(t *testing.T, w *world) {
			time.Sleep(testRules.CodeTTL)
			sent(t, &w.store.fakeStore, "888888")
			check(t, w, "888888", true)
		}, 1},
		{"a cached full list is no longer full", func(t *testing.T, w *world) {
			full := w.store.state()
			for range maxCodes - 1 {
				full, _, _ = testRules.Begin(full, stored("777777"), now())
			}
			w.v.cache.put(testNumber, Record{Version: w.store.record.Version, State: full.encode(), BegunAt: full.LastSendID})
			if _, err := w.v.Send(t.Context(), testNumber, "", ""); err != nil {
				t.Errorf("send: got %v, want nil", err)
			}
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var w world
				w.v = newVerifier(&w.store, accept)
				if got := loadsOf(&w.store, func() { _, _ = w.v.Send(t.Context(), testNumber, "", "") }); got != 1 {
					t.Errorf("a send: got %d loads, want 1", got)
				}
				start := time.Now()
				if got := loadsOf(&w.store, func() { c.then(t, &w) }); got != c.loads {
					t.Errorf("got %d loads, want %d", got, c.loads)
				}
				if took := time.Since(start) % testRules.CodeTTL; took != 0 {
					t.Errorf("got %v of waiting before the load, want none", took)
				}
			})
		})
	}
}

func TestRecordCache_DropsTheOldestAtItsBound(t *testing.T) {
	var r recordCache
	number := func(i int) Number { return Number(fmt.Sprint("+", i)) }
	oneCode := State{Codes: make([]Code, 1)}.encode()
	record := func(i int) Record { return Record{BegunAt: int64(i), State: oneCode} }
	const last = 3*maxGeneration - 1
	for i := range last + 1 {
		r.put(number(i), record(i))
		if got := len(r.current) + len(r.previous); got > 2*maxGeneration {
			t.Fatalf("got %d cached records, want %d at most", got, 2*maxGeneration)
		}
	}
	for _, i := range []int{last, last - maxGeneration} {
		if got, ok := r.take(number(i)); !ok || got.BegunAt != int64(i) {
			t.Errorf("record %d of %d: got %v, %v, want it cached", i, last, got.BegunAt, ok)
		}
		if _, ok := r.take(number(i)); ok {
			t.Errorf("record %d: got it a second time, want it removed", i)
		}
	}
	if _, ok := r.take(number(0)); ok {
		t.Error("got the oldest record, want it dropped")
	}
	r.put(number(last-1), record(7)) // of the current generation
	r.previous[number(last-1)] = record(6)
	if got, _ := r.take(number(last - 1)); got.BegunAt != 7 {
		t.Errorf("got record %d, want the newer of two", got.BegunAt)
	}
}
