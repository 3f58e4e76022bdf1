package verify

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestCheck_AcceptsOnlyTheSentCodeAndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		for range 2 {
			if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range []struct {
			code string
			want bool
		}{{"000001", false}, {wrongGuess, false}, {"000002", true}, {"000002", false}} {
			if got, err := isValid(t.Context(), v, testNumber, c.code); err != nil || got != c.want {
				t.Errorf("check %s: got %v, %v, want %v", c.code, got, err, c.want)
			}
		}
		if got, err := isValid(t.Context(), v, "+8613900000000", "000002"); err != nil || got {
			t.Errorf("a number that was never sent to: got %v, %v, want false", got, err)
		}
	})
}

func TestCheck_InvalidCodeCountsAsAnAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		sent(t, &m, "123456")
		v := newVerifier(&m, accept)
		for i, code := range []string{"", "12345a", strings.Repeat("1", 2048)} {
			if got, err := isValid(t.Context(), v, testNumber, code); err != nil || got {
				t.Errorf("attempt %d: got %v, %v, want false", i+1, got, err)
			}
		}
		if got, err := isValid(t.Context(), v, testNumber, "123456"); err != nil || got {
			t.Errorf("the right code after three attempts: got %v, %v, want false", got, err)
		}
	})
}

// If a swap's reply is lost and the next load fails, the outcome stays unknown.
func TestCheck_UnknownOutcomeIsNeverUnavailable(t *testing.T) {
	for name, next := range map[string]error{
		"the store goes down":                   errNoEffect,
		"the store returns ErrStoreUnavailable": ErrStoreUnavailable,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store brokenStore
				sent(t, &store.fakeStore, "888888")
				store.swap = func(context.Context) error {
					store.load = func(context.Context) error { return next }
					return errUnknown
				}
				valid, err := isValid(t.Context(), newVerifier(&store, accept), testNumber, "888888")
				if valid || !isOnly(t, err, ErrOutcomeUnknown) {
					t.Errorf("got %v, %v, want false, %v", valid, err, ErrOutcomeUnknown)
				}
			})
		})
	}
}

func TestCheck_ResolvesUnknownOutcomeUntilItsTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		sent(t, &store.fakeStore, "888888")
		back := time.Now().Add(2 * time.Second)
		store.load = func(context.Context) error {
			if len(store.history) > 2 && time.Now().Before(back) {
				return errNoEffect
			}
			return nil
		}
		store.done = func() error { return errUnknown }
		if valid, err := isValid(t.Context(), newVerifier(&store, accept), testNumber, "888888"); !valid || err != nil {
			t.Errorf("swap applied, reply lost, store away for two seconds: got %v, %v, want true", valid, err)
		}
	})
}

// Each writer chooses its own version, so a replica never takes another's swap for its own.
func TestCheck_RacingReplicasWriteDistinctVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		sent(t, &m, "888888")
		// The same call on the same record, by two identical Verifiers.
		first, second := fakeStore{record: m.record}, fakeStore{record: m.record}
		for _, store := range []*fakeStore{&first, &second} {
			if valid, err := isValid(t.Context(), newVerifier(store, accept), testNumber, "888888"); !valid || err != nil {
				t.Fatalf("got %v, %v, want true", valid, err)
			}
		}
		if first.record.Version == second.record.Version || first.record.Version == m.record.Version {
			t.Error("got the same version twice, want each writer to choose another")
		}
	})
}

func TestCheck_OneOfManyConcurrentRightCodesWins(t *testing.T) {
	for range 20 {
		var m fakeStore
		sent(t, &m, "123456")
		v := newVerifier(&m, accept)
		var won atomic.Int32
		var all sync.WaitGroup
		for range 64 {
			all.Go(func() {
				valid, err := isValid(t.Context(), v, testNumber, "123456")
				if err != nil {
					t.Error(err)
				}
				if valid {
					won.Add(1)
				}
			})
		}
		all.Wait()
		if won.Load() != 1 {
			t.Fatalf("got %d winners of 64, want 1", won.Load())
		}
	}
}

func TestCheck_ConcurrentWrongCodesCountUpToTheLimit(t *testing.T) {
	var m fakeStore
	sent(t, &m, "123456")
	before := len(m.history)
	v := newVerifier(&m, accept)
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			if valid, err := isValid(t.Context(), v, testNumber, wrongGuess); valid || err != nil {
				t.Errorf("got %v, %v, want false", valid, err)
			}
		})
	}
	all.Wait()
	if got := len(m.history) - before; got != testRules.AttemptLimit || lives(&m, "123456") {
		t.Errorf("got %d attempts stored, the code live %v, want %d, false", got, lives(&m, "123456"), testRules.AttemptLimit)
	}
}
