package verify

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A begin that returned an error may be stored nevertheless. If it stayed, eight of them
// would make every send fail for a while, and then push out a code that was delivered.
func TestSend_UnknownBeginLeavesNoCode(t *testing.T) {
	for _, c := range []struct {
		name string
		late bool // the swap arrives after the call returned
	}{{"stored, and the reply lost", false}, {"not stored yet", true}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store brokenStore
				sent(t, &store.fakeStore, "888888")
				var broken atomic.Bool
				broken.Store(true)
				before := store.record
				store.load = func(context.Context) error {
					if now, _ := store.fakeStore.Load(t.Context(), testNumber); broken.Load() && now.Version != before.Version {
						return errNoEffect
					}
					return nil
				}
				if c.late {
					store.swap = func(ctx context.Context) error {
						if broken.CompareAndSwap(true, false) { // the background's swap must not hang too
							<-ctx.Done()
							return errUnknown
						}
						return nil
					}
				} else {
					store.done = func() error {
						if broken.Load() {
							return errUnknown
						}
						return nil
					}
				}
				v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
					t.Error("the provider was called, want no call")
					return Receipt{}, nil
				})
				if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); !isOnly(t, err, ErrStoreUnavailable) {
					t.Errorf("got %v, want %v", err, ErrStoreUnavailable)
				}
				broken.Store(false)
				v.Wait(t.Context())
				if n := len(store.state().Codes); n != 1 {
					t.Errorf("got %d codes in the list, want 1: the one that was sent", n)
				}
				if done, _ := store.fakeStore.Swap(t.Context(), testNumber, before.Version, before); done {
					t.Error("a delayed swap: got it applied, want its old version gone")
				}
				if valid, err := isValid(t.Context(), v, testNumber, "888888"); !valid || err != nil {
					t.Errorf("the code that was sent before: got %v, %v, want true", valid, err)
				}
			})
		})
	}
}

func TestSend_OutcomeDoesNotQueueBehindNewCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		sent(t, &store.fakeStore, "888888")
		var saturated atomic.Bool
		var loads atomic.Int64
		store.load = func(ctx context.Context) error {
			if !saturated.Load() {
				return nil
			}
			loads.Add(1)
			<-ctx.Done()
			return ctx.Err()
		}
		var v *Verifier
		v = newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			saturated.Store(true)
			for range maxConcurrentUpdates + 10 {
				go isValid(t.Context(), v, testNumber, "000001")
			}
			synctest.Wait()
			saturated.Store(false) // the outcome's load passes, the calls still wait
			return Receipt{}, nil
		})
		start := time.Now()
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil || time.Since(start) > time.Second {
			t.Errorf("Send: got %v after %v, want its outcome stored before the waiting calls", err, time.Since(start))
		}
		if n := loads.Load(); n != maxConcurrentUpdates {
			t.Errorf("got %d waiting calls at the store, want %d", n, maxConcurrentUpdates)
		}
		time.Sleep(2 * storeTimeout) // the other calls end
	})
}

func TestSend_RecoversPanicWhileStoringTheOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		sent(t, &store.fakeStore, "888888")
		asked := false
		store.fail(func(context.Context) error {
			if asked {
				panic("888888")
			}
			return nil
		})
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) { asked = true; return Receipt{}, nil })
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); !isOnly(t, err, ErrSentNotConfirmed) {
			t.Errorf("got %v, want %v", err, ErrSentNotConfirmed)
		}
		v.Wait(t.Context())
	})
}

func TestSend_StoresTheOutcomeAfterTheCallerLeft(t *testing.T) {
	for _, c := range []struct {
		name   string
		result error
		took   time.Duration
		want   func(error) bool
		state  func(*fakeStore) bool
	}{
		{
			"confirm", nil, storeTimeout,
			func(err error) bool { return errors.Is(err, ErrSentNotConfirmed) },
			func(m *fakeStore) bool {
				return lives(m, "000001") && !lives(m, "888888")
			},
		},
		{
			"withdraw", &SendError{Kind: SendLimited}, 0,
			func(err error) bool { var e *SendError; return errors.As(err, &e) && e.Kind == SendLimited },
			func(m *fakeStore) bool { return !lives(m, "000001") && lives(m, "888888") },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store brokenStore
				sent(t, &store.fakeStore, "888888")
				ctx, leave := context.WithCancel(t.Context())
				v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
					back := time.Now().Add(40 * time.Second)
					store.fail(func(context.Context) error {
						if time.Now().Before(back) {
							return errNoEffect
						}
						return nil
					})
					leave()
					return Receipt{BizID: "biz"}, c.result
				})
				start := time.Now()
				_, err := v.Send(ctx, SendRequest{Number: testNumber})
				if took := time.Since(start); !c.want(err) || took != c.took {
					t.Errorf("got %v after %v, want its result after %v", err, took, c.took)
				}
				if !lives(&store.fakeStore, "000001") {
					t.Error("before the outcome is stored: got the code dead, want it live")
				}
				v.Wait(t.Context())
				if took := time.Since(start); took < 40*time.Second || took > 41*time.Second || !c.state(&store.fakeStore) {
					t.Errorf("after %v: got %v, want the outcome stored after 40 s, when the store is back", took, store.state())
				}
			})
		})
	}
}

func TestSend_LogsAnOutcomeNotStoredWithinAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		sent(t, &store.fakeStore, "888888")
		var log bytes.Buffer
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			store.fail(func(context.Context) error { return errNoEffect })
			return Receipt{BizID: "biz"}, nil
		})
		v.Log = slog.New(slog.NewTextHandler(&log, nil))
		start := time.Now()
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); !isOnly(t, err, ErrSentNotConfirmed) {
			t.Errorf("got %v, want %v", err, ErrSentNotConfirmed)
		}
		v.Wait(t.Context())
		if took := time.Since(start); took.Round(time.Second) != outcomeTimeout {
			t.Errorf("gave up after %v, want %v", took, outcomeTimeout)
		}
		if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, testNumber.Masked()) || strings.Contains(got, string(testNumber)) || strings.Contains(got, "000001") {
			t.Errorf("got log %q, want one line with the masked number and without the code", got)
		}
		if !lives(&store.fakeStore, "000001") {
			t.Error("got the code dead, want it live")
		}
	})
}

func TestWait_EndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			store.fail(func(context.Context) error { return errNoEffect })
			return Receipt{}, nil
		})
		_, _ = v.Send(t.Context(), SendRequest{Number: testNumber})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if v.Wait(ctx); time.Since(start).Round(100*time.Millisecond) != time.Second {
			t.Errorf("waited %v, want 1s", time.Since(start))
		}
		v.Wait(t.Context()) // for the background update to end
	})
}

func TestWait_IsSafeDuringSends(t *testing.T) {
	var m fakeStore
	v := newVerifier(&m, failWith(&SendError{Kind: SendLimited}))
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 100 {
				_, _ = v.Send(t.Context(), SendRequest{Number: testNumber})
			}
		})
		all.Go(func() {
			for range 1000 {
				v.Wait(t.Context())
			}
		})
	}
	all.Wait()
}

// The outcome's first swap replaces the record that begin wrote, without a load. If another
// replica wrote in between, that swap conflicts, and the outcome is stored after a load.
func TestSend_HandsTheBegunRecordToTheOutcome(t *testing.T) {
	for _, c := range []struct {
		name         string
		meanwhile    func(m *fakeStore) // during the call to the provider
		loads, swaps int
	}{
		{"no other writer", func(*fakeStore) {}, 1, 2},
		{"another replica wrote", func(m *fakeStore) { checked(m, wrongGuess) }, 2, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				loads, swaps := 0, 0
				store := brokenStore{
					load: func(context.Context) error { loads++; return nil },
					swap: func(context.Context) error { swaps++; return nil },
				}
				sent(t, &store.fakeStore, "888888")
				v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
					c.meanwhile(&store.fakeStore)
					return Receipt{}, nil
				})
				if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil {
					t.Errorf("got %v, want nil", err)
				}
				if loads != c.loads || swaps != c.swaps {
					t.Errorf("got %d loads and %d swaps, want %d and %d", loads, swaps, c.loads, c.swaps)
				}
				if codes := store.state().Codes; len(codes) != 1 || codes[0].MAC != stored("000001") {
					t.Errorf("got codes %v, want the new one alone", codes)
				}
			})
		})
	}
}
