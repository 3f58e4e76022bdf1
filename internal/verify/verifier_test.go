package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const (
	testNumber = Number("+8618612345678")
	wrongGuess = "999999"
)

func accept(context.Context, Message) (Receipt, error) { return Receipt{BizID: "biz"}, nil }

// failWith returns a Sender that fails with err.
func failWith(err error) senderFunc {
	return func(context.Context, Message) (Receipt, error) { return Receipt{}, err }
}

var testKeys = Keys{bytes.Repeat([]byte{1}, minKeyBytes)}

// newVerifier returns a Verifier with the clock of a synctest bubble. Its codes are
// 000001, 000002, …
func newVerifier(store Store, sender senderFunc) *Verifier {
	return New(Config{
		Rules:      testRules,
		Keys:       testKeys,
		Store:      store,
		Sender:     sender,
		SMSTimeout: 5 * time.Second,
		Now:        time.Now,
		Random:     &counter{},
		Log:        slog.New(slog.DiscardHandler),
	})
}

// stored returns the MAC of a code, as a replica stores it.
func stored(code string) MAC { return testKeys.sign(testNumber, code, "") }

func now() int64 { return time.Now().UnixMicro() }

// began begins a send as another replica would, sent also confirms it, and checked
// checks a code.
func began(t testing.TB, m *fakeStore, code string) (sendID int64) {
	t.Helper()
	m.write(func(s State) State {
		s, b, err := testRules.Begin(s, newSend(stored(code)), now())
		if err != nil {
			t.Fatalf("another replica's begin: %v", err)
		}
		sendID = b.SendID
		return s
	})
	return sendID
}

func sent(t testing.TB, m *fakeStore, code string) (sendID int64) {
	t.Helper()
	sendID = began(t, m, code)
	m.write(func(s State) State { return testRules.Confirm(s, sendID, nil, now()) })
	return sendID
}

func checked(m *fakeStore, code string) (valid bool) {
	m.write(func(s State) State {
		s, valid, _ = testRules.Check(s, []MAC{stored(code)}, nil, now())
		return s
	})
	return valid
}

// isValid calls Check and reports whether the code was valid.
func isValid(ctx context.Context, v *Verifier, n Number, code string) (bool, error) {
	found, err := v.Check(ctx, n, code, "")
	return found.Valid(), err
}

// lives reports whether a code would be accepted now.
func lives(m *fakeStore, code string) bool {
	_, valid, _ := testRules.Check(m.state(), []MAC{stored(code)}, nil, now())
	return valid
}

func TestInspect_ReturnsLiveCodesAndWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		inspect := func(want ...CodeStatus) {
			t.Helper()
			before := m.stored()
			got, err := v.Inspect(t.Context(), testNumber)
			if last := m.state().LastSendID; err != nil || !slices.Equal(got.Live, want) || got.LastSendID != last {
				t.Errorf("got %v, %v, want %v, the last %d", got, err, want, last)
			}
			if after := m.stored(); !reflect.DeepEqual(after, before) {
				t.Errorf("Inspect wrote: got record %v, want %v", after, before)
			}
		}
		inspect()
		v.Send(t.Context(), SendRequest{Number: testNumber})
		accepted := m.state().LastSendID
		expires := time.UnixMicro(now()).Add(testRules.CodeTTL)
		inspect(CodeStatus{accepted, expires, testRules.AttemptLimit, true})
		checked(&m, wrongGuess)
		begun := began(t, &m, "222222")
		inspect(CodeStatus{accepted, expires, testRules.AttemptLimit - 1, true}, CodeStatus{begun, expires, testRules.AttemptLimit, false})
		v = newVerifier(&m, accept)
		v.Rules.AttemptLimit = 1 // an operator lowered it: one attempt spends a code
		inspect(CodeStatus{begun, expires, 1, false})
		v.Now = func() time.Time { return time.Now().Add(-clockTolerance - time.Second) }
		inspect() // with a clock that is too far behind
		v.Now = time.Now
		time.Sleep(testRules.CodeTTL)
		synctest.Wait()
		inspect()
		m.record.State = []byte{99}
		if _, err := v.Inspect(t.Context(), testNumber); !errors.Is(err, ErrStateUnreadable) {
			t.Errorf("a state of a later version: got %v, want ErrStateUnreadable", err)
		}
	})
}

// isOnly reports whether err is want; a nil want stands for none of the sentinels. It
// fails if err is two sentinels: then its meaning depends on the order of errors.Is calls.
func isOnly(t *testing.T, err, want error) bool {
	t.Helper()
	var is []error
	for _, sentinel := range []error{
		ErrStoreUnavailable, ErrOutcomeUnknown, ErrSentNotConfirmed, ErrSendInProgress, ErrCallerGone,
		ErrStateUnreadable, ErrKeyInProgress, ErrKeyReused,
	} {
		if errors.Is(err, sentinel) {
			is = append(is, sentinel)
		}
	}
	if len(is) > 1 {
		t.Errorf("got %v, which matches %q, want one sentinel", err, is)
	}
	return want == nil && len(is) == 0 || errors.Is(err, want)
}

func TestVerifier_StoreDownFailsCallsAndSendsNothing(t *testing.T) {
	down := func(context.Context) error { return errNoEffect }
	hangs := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	for _, c := range []struct {
		name     string
		store    *brokenStore
		atMost   time.Duration
		forCheck error
	}{
		{"loads fail", &brokenStore{load: down}, time.Second, ErrStoreUnavailable},
		{"swaps fail", &brokenStore{swap: down}, time.Second, ErrStoreUnavailable},
		{"loads hang", &brokenStore{load: hangs}, storeTimeout, ErrStoreUnavailable},
		{"swaps hang, and were not applied", &brokenStore{swap: hangs}, storeTimeout, ErrStoreUnavailable},
		{"swaps hang, with unknown outcome", &brokenStore{swap: func(ctx context.Context) error { <-ctx.Done(); return errUnknown }}, storeTimeout, ErrOutcomeUnknown},
		{"every outcome is unknown", &brokenStore{swap: func(context.Context) error { return errUnknown }}, storeTimeout, ErrOutcomeUnknown},
		{"the store's error is two sentinels", &brokenStore{
			load: func(context.Context) error { return fmt.Errorf("%w, %w", ErrStoreUnavailable, ErrOutcomeUnknown) },
		}, time.Second, ErrStoreUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sent(t, &c.store.fakeStore, "888888")
				v := newVerifier(c.store, func(context.Context, Message) (Receipt, error) {
					t.Error("the provider was called, want no call")
					return Receipt{}, nil
				})
				start := time.Now()
				_, err := v.Send(t.Context(), SendRequest{Number: testNumber})
				if !isOnly(t, err, ErrStoreUnavailable) || time.Since(start) > c.atMost {
					t.Errorf("Send: got %v after %v, want %v within %v", err, time.Since(start), ErrStoreUnavailable, c.atMost)
				}
				start = time.Now()
				valid, err := isValid(t.Context(), v, testNumber, "888888")
				if valid || !isOnly(t, err, c.forCheck) || time.Since(start) > c.atMost {
					t.Errorf("Check: got %v, %v after %v, want false, %v within %v", valid, err, time.Since(start), c.forCheck, c.atMost)
				}
				if strings.Contains(fmt.Sprint(err), "888888") {
					t.Errorf("got %v, want an error without the code", err)
				}
				v.Wait(t.Context())
			})
		})
	}
}

// A caller that disconnects while the store works cancels no statement: the attempt is stored.
func TestVerifier_GoneCallerCancelsNoStatement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		sent(t, &store.fakeStore, "888888")
		store.swap = func(ctx context.Context) error {
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return errUnknown
			}
		}
		v := newVerifier(&store, accept)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if valid, err := isValid(ctx, v, testNumber, "000001"); valid || err != nil {
			t.Errorf("Check: got %v, %v, want false: the attempt was stored", valid, err)
		}
		if got := store.state().Codes[0].Attempts; got != 1 {
			t.Errorf("got %d attempts stored, want 1", got)
		}
		if _, err := v.Send(ctx, SendRequest{Number: testNumber}); !isOnly(t, err, ErrCallerGone) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Send: got %v, want %v with the caller's deadline", err, ErrCallerGone)
		}
	})
}

// repeating is a proxy that sends every swap twice and returns the second reply.
type repeating struct{ *fakeStore }

func (r repeating) Swap(ctx context.Context, n Number, old Version, next Record) (bool, error) {
	r.fakeStore.Swap(ctx, n, old, next)
	return r.fakeStore.Swap(ctx, n, old, next)
}

func TestVerifier_SwapRepeatedByAProxyCountsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(repeating{&m}, accept)
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil {
			t.Fatal(err)
		}
		if got, err := isValid(t.Context(), v, testNumber, wrongGuess); got || err != nil || m.state().Codes[0].Attempts != 1 {
			t.Errorf("a wrong code: got %v, %v and %v; want false and one attempt", got, err, m.state())
		}
		if got, err := isValid(t.Context(), v, testNumber, "000001"); !got || err != nil {
			t.Errorf("the right code: got %v, %v; want true", got, err)
		}
	})
}

func TestVerifier_CallerGoneAtTheStartWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := brokenStore{load: func(ctx context.Context) error { return ctx.Err() }}
		ctx, leave := context.WithCancel(t.Context())
		leave()
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		if _, err := v.Send(ctx, SendRequest{Number: testNumber}); !isOnly(t, err, ErrCallerGone) {
			t.Errorf("Send: got %v, want %v", err, ErrCallerGone)
		}
		if valid, err := isValid(ctx, v, testNumber, "000001"); valid || !isOnly(t, err, ErrCallerGone) {
			t.Errorf("Check: got %v, %v, want false, %v", valid, err, ErrCallerGone)
		}
		if len(store.history) != 0 {
			t.Errorf("got %d swaps, want none", len(store.history))
		}
	})
}

func TestVerifier_KeepsTheStateOfALaterVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := fakeStore{record: Record{Version: Version{1}, State: []byte{99, 1, 2, 3}}}
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); !isOnly(t, err, ErrStateUnreadable) {
			t.Errorf("Send: got %v, want %v", err, ErrStateUnreadable)
		}
		if valid, err := isValid(t.Context(), v, testNumber, "000001"); valid || !isOnly(t, err, ErrStateUnreadable) {
			t.Errorf("Check: got %v, %v, want false, %v", valid, err, ErrStateUnreadable)
		}
		if m.record.Version != (Version{1}) {
			t.Errorf("got version %x, want the record unchanged", m.record.Version)
		}
	})
}
