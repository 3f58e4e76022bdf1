package verify

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// withKey returns a request with an idempotency key.
func withKey(key string) SendRequest { return SendRequest{Number: testNumber, IdempotencyKey: key} }

func TestSend_KeyGetsTheOutcomeOfItsSend(t *testing.T) {
	for _, c := range []struct {
		name     string
		outcome  error // of the provider, for the first send
		replayed bool
		want     func(error) bool // of the second send
		asked    int
	}{
		{"accepted", nil, true, func(err error) bool { return err == nil }, 1},
		{"unknown", errors.New("EOF"), true, isKind(SendUnknown), 1},
		{"timed out", &SendError{Kind: SendTimedOut}, true, isKind(SendTimedOut), 1},
		{"limited", &SendError{Kind: SendLimited}, false, func(err error) bool { return err == nil }, 2},
		{"not attempted", &SendError{Kind: SendNotAttempted}, false, func(err error) bool { return err == nil }, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				asked := 0
				v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
					if asked++; asked == 1 {
						return Receipt{BizID: "biz"}, c.outcome
					}
					return Receipt{BizID: "biz"}, nil
				})
				first, firstErr := v.Send(t.Context(), withKey("k"))
				if first.Replayed || (firstErr == nil) != (c.outcome == nil) {
					t.Errorf("the first send: got %+v, %v", first, firstErr)
				}
				time.Sleep(time.Second)
				swaps := m.swaps()
				second, err := v.Send(t.Context(), withKey("k"))
				if second.Replayed != c.replayed || !c.want(err) || asked != c.asked {
					t.Errorf("the second send: got %+v, %v, %d calls to the provider, want replayed %v, %d calls", second, err, asked, c.replayed, c.asked)
				}
				if c.replayed && (m.swaps() != swaps || !second.BegunAt.Equal(first.BegunAt) || second.Receipt != (Receipt{})) {
					t.Errorf("a replay: got %d swaps, %+v, want none and the begin of %+v", m.swaps()-swaps, second, first)
				}
				if other, err := v.Send(t.Context(), withKey("another")); other.Replayed || err != nil || asked != c.asked+1 {
					t.Errorf("another key: got %+v, %v, %d calls to the provider, want a new send", other, err, asked)
				}
			})
		})
	}
}

func isKind(kind SendKind) func(error) bool {
	return func(err error) bool {
		var e *SendError
		return errors.As(err, &e) && e.Kind == kind
	}
}

func TestSend_KeyEndsWithTheLifeOfItsCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		send := func(want bool) {
			t.Helper()
			if got, err := v.Send(t.Context(), withKey("k")); got.Replayed != want || err != nil {
				t.Errorf("got replayed %v, %v, want %v", got.Replayed, err, want)
			}
		}
		send(false)
		if valid, err := isValid(t.Context(), v, testNumber, "000001"); !valid || err != nil {
			t.Fatalf("check: got %v, %v, want true", valid, err)
		}
		send(true) // the code is used
		time.Sleep(testRules.CodeTTL - time.Microsecond)
		send(true)
		time.Sleep(time.Microsecond)
		send(false)
	})
}

func TestSend_KeyIsOfOneCallerAndOneRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		first := withKey("k")
		first.SignName, first.TemplateCode, first.Context, first.Caller = "sign", "template", "login", "shop"
		for _, c := range []struct {
			name     string
			change   func(*SendRequest)
			replayed bool
			err      error
		}{
			{"the first", func(*SendRequest) {}, false, nil},
			{"the same", func(*SendRequest) {}, true, nil},
			{"another sign name", func(q *SendRequest) { q.SignName = "other" }, false, ErrKeyReused},
			{"another template", func(q *SendRequest) { q.TemplateCode = "other" }, false, ErrKeyReused},
			{"another context", func(q *SendRequest) { q.Context = "reset" }, false, ErrKeyReused},
			{"no context", func(q *SendRequest) { q.Context = "" }, false, ErrKeyReused},
			{"another caller", func(q *SendRequest) { q.Caller = "bank" }, false, nil},
			{"another number", func(q *SendRequest) { q.Number = "+8613900000000" }, false, nil},
			{"no key", func(q *SendRequest) { q.IdempotencyKey = "" }, false, nil},
		} {
			q := first
			c.change(&q)
			if got, err := v.Send(t.Context(), q); got.Replayed != c.replayed || !errors.Is(err, c.err) {
				t.Errorf("%s: got replayed %v, %v, want %v, %v", c.name, got.Replayed, err, c.replayed, c.err)
			}
		}
	})
}

// A process that died during a send leaves its key in flight. Its outcome is unknown.
func TestSend_KeyInFlightIsInProgressThenUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) { panic("the process died") })
		func() {
			defer func() { _ = recover() }()
			v.Send(t.Context(), withKey("k"))
		}()
		other := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		time.Sleep(longestInFlight)
		if _, err := other.Send(t.Context(), withKey("k")); !isOnly(t, err, ErrKeyInProgress) {
			t.Errorf("after half a minute: got %v, want %v", err, ErrKeyInProgress)
		}
		time.Sleep(time.Microsecond)
		if got, err := other.Send(t.Context(), withKey("k")); !isKind(SendUnknown)(err) || !got.Replayed {
			t.Errorf("later: got %v, %v, want an unknown outcome", got, err)
		}
	})
}

func TestSend_KeyAndContextSurviveAKeyRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		q := SendRequest{Number: testNumber, Context: "login", IdempotencyKey: "k"}
		if _, err := v.Send(t.Context(), q); err != nil {
			t.Fatal(err)
		}
		v.ReplaceKeys(Keys{bytes.Repeat([]byte{2}, minKeyBytes), testKeys[0]})
		if got, err := v.Send(t.Context(), q); !got.Replayed || err != nil {
			t.Errorf("the same key: got %v, %v, want a replay", got, err)
		}
		q.IdempotencyKey = ""
		if _, err := v.Send(t.Context(), q); err != nil { // its code, 000003, is under the new key
			t.Fatal(err)
		}
		if n := len(m.state().Codes); n != 1 {
			t.Errorf("got %d codes, want 1: the new one replaced the one under the old key", n)
		}
		for _, c := range []struct { // in this order: a match leaves no live code
			code string
			want CheckResult
		}{{"000001", Mismatch}, {"000003", Match}} {
			if got, err := v.Check(t.Context(), testNumber, c.code, "login"); got.Result != c.want || err != nil {
				t.Errorf("check %s: got %v, %v, want %v", c.code, got.Result, err, c.want)
			}
		}
	})
}

func TestSend_OneKeyInParallelOnTwoReplicasIsOneSMS(t *testing.T) {
	var m fakeStore
	var asked, accepted atomic.Int64
	sender := func(context.Context, Message) (Receipt, error) {
		asked.Add(1)
		time.Sleep(20 * time.Millisecond)
		return Receipt{BizID: "biz"}, nil
	}
	replicas := []*Verifier{newVerifier(&m, sender), newVerifier(&m, sender)}
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			switch _, err := replicas[i%2].Send(t.Context(), withKey("k")); {
			case err == nil:
				accepted.Add(1)
			case !errors.Is(err, ErrKeyInProgress):
				t.Errorf("got %v, want nil or %v", err, ErrKeyInProgress)
			}
		})
	}
	all.Wait()
	if asked.Load() != 1 || accepted.Load() == 0 {
		t.Errorf("got %d calls to the provider and %d accepted, want one call", asked.Load(), accepted.Load())
	}
}

// With any combination of store faults and any other writer, a key is one SMS, and a call that
// repeats the send gets its outcome.
func TestSend_KeyIsOneSMSUnderStoreFaults(t *testing.T) {
	for name, outcome := range map[string]error{"accepted": nil, "rejected": &SendError{Kind: SendLimited}, "unknown": errors.New("EOF")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			forEachInterleaving(t, 4, func(t *testing.T, s *scriptedStore) {
				m, asked := &s.fakeStore, 0
				s.otherWriters = []otherWriter{
					{otherChecked, func() { checked(m, wrongGuess) }},
					{otherSent, func() { sent(t, m, "777777") }},
				}
				v := newVerifier(s, func(context.Context, Message) (Receipt, error) {
					asked++
					return Receipt{BizID: "biz"}, outcome
				})
				_, first := v.Send(t.Context(), withKey("k"))
				v.Wait(t.Context())
				s.applyDelayed()
				s.left = 0 // no more faults
				sentFirst := asked
				second, err := v.Send(t.Context(), withKey("k"))
				v.Wait(t.Context())
				if sentFirst > 1 || asked > 1 && name != "rejected" {
					t.Errorf("got %d calls to the provider, then %d, want one", sentFirst, asked)
				}
				switch {
				case sentFirst == 1 && name != "rejected":
					if want := first == nil || errors.Is(first, ErrSentNotConfirmed); !second.Replayed || (err == nil) != want {
						t.Errorf("after %v: got replayed %v, %v, want the same outcome", first, second.Replayed, err)
					}
				case second.Replayed:
					t.Errorf("after %v without an SMS: got a replay, want a new send", first)
				}
			})
		})
	}
}

func TestSend_CallerGoneLeavesNoKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		ctx, leave := context.WithCancel(t.Context())
		store.swap = func(context.Context) error { leave(); return nil }
		v := newVerifier(&store, accept)
		if _, err := v.Send(ctx, withKey("k")); !isOnly(t, err, ErrCallerGone) {
			t.Errorf("got %v, want %v", err, ErrCallerGone)
		}
		if got, err := v.Send(t.Context(), withKey("k")); got.Replayed || err != nil {
			t.Errorf("the next send: got %v, %v, want a new one", got, err)
		}
	})
}

// Every replica must know that a send with a key was accepted, so its call returns OK after a confirm.
func TestSend_WithKeyConfirmsASoleCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		if _, err := v.Send(t.Context(), withKey("k")); err != nil || m.swaps() != 2 {
			t.Errorf("got %v after %d swaps, want nil after 2", err, m.swaps())
		}
		var store brokenStore
		v = newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			store.fail(func(context.Context) error { return errNoEffect })
			return Receipt{}, nil
		})
		if _, err := v.Send(t.Context(), withKey("k")); !isOnly(t, err, ErrSentNotConfirmed) {
			t.Errorf("without the store: got %v, want %v", err, ErrSentNotConfirmed)
		}
		v.Wait(t.Context())
	})
}

func TestRules_FullListOfKeysIsRejectedUntilOneExpires(t *testing.T) {
	s, now := State{}, testNow
	for i := range maxKeyed {
		var b Begun
		var err error
		if s, b, err = testRules.Begin(s, newSend(modelMAC(i), KeyTag{ID: [12]byte{byte(i)}}), now); err != nil {
			t.Fatal(err)
		}
		s = testRules.Confirm(s, b.SendID, nil, now)
		now += time.Minute.Microseconds()
	}
	var full *FullError
	_, _, err := testRules.Begin(s, newSend(MAC{99}, KeyTag{ID: [12]byte{99}}), now)
	if want := testRules.CodeTTL - maxKeyed*time.Minute; !errors.As(err, &full) || full.RetryAfter != want {
		t.Errorf("got %v, %+v, want a FullError with %v", err, full, want)
	}
	if _, _, err := testRules.Begin(s, newSend(MAC{99}), now); err != nil {
		t.Errorf("without a key: got %v, want nil", err)
	}
	s, _, err = testRules.Begin(s, newSend(MAC{99}, KeyTag{ID: [12]byte{99}}), now+full.RetryAfter.Microseconds())
	if err != nil || len(s.Keyed) != maxKeyed {
		t.Errorf("after RetryAfter: got %v and %d keyed sends, want nil and %d", err, len(s.Keyed), maxKeyed)
	}
}
