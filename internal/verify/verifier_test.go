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
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

const (
	someone    = Number("+8618612345678")
	wrongGuess = "999999"
)

func accept(context.Context, Message) (Receipt, error) { return Receipt{BizID: "biz"}, nil }

func answer(err error) senderFunc {
	return func(context.Context, Message) (Receipt, error) { return Receipt{}, err }
}

var testKeys = Keys{bytes.Repeat([]byte{1}, minKeyBytes)}

// newVerifier is a Verifier in the time of a synctest bubble whose codes are
// 000001, 000002, … in turn.
func newVerifier(store Store, sender senderFunc) *Verifier {
	return &Verifier{
		Rules:      testRules,
		Keys:       testKeys,
		Store:      store,
		Sender:     sender,
		SMSTimeout: 5 * time.Second,
		Now:        time.Now,
		Random:     &counter{},
		Log:        slog.New(slog.DiscardHandler),
	}
}

// stored is what another replica would have of a code.
func stored(code string) MAC { return testKeys.sign(someone, code) }

func now() int64 { return time.Now().UnixMicro() }

// began is what another replica does at the beginning of a send, confirm at its
// end, and check for a caller of its own.
func began(t testing.TB, m *memory, code string) (ticket int64) {
	t.Helper()
	m.write(func(s State) State {
		s, got, err := testRules.Begin(s, stored(code), now())
		if err != nil {
			t.Fatalf("another replica's begin: %v", err)
		}
		ticket = got
		return s
	})
	return ticket
}

func sent(t testing.TB, m *memory, code string) (ticket int64) {
	t.Helper()
	ticket = began(t, m, code)
	m.write(func(s State) State { return testRules.Confirm(s, ticket, now()) })
	return ticket
}

func checked(m *memory, code string) (valid bool) {
	m.write(func(s State) State {
		s, valid, _ = testRules.Check(s, []MAC{stored(code)}, now())
		return s
	})
	return valid
}

// isValid returns what the caller of Check learns.
func isValid(ctx context.Context, v *Verifier, n Number, code string) (bool, error) {
	found, err := v.Check(ctx, n, code)
	return found.Valid(), err
}

// lives reports whether a code would be accepted now.
func lives(m *memory, code string) bool {
	_, valid, _ := testRules.Check(m.state(), []MAC{stored(code)}, now())
	return valid
}

func TestSend_StoresTheCodeFirstAndConfirmsItAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		var asked Message
		v := newVerifier(&m, func(_ context.Context, msg Message) (Receipt, error) {
			asked = msg
			if s := m.state(); len(s.Codes) != 1 || s.Codes[0].MAC != stored(msg.Code) || s.Codes[0].Confirmed {
				t.Errorf("when the provider is asked: got state %v, want the code there, not confirmed", s)
			}
			return Receipt{BizID: "biz", RequestID: "req"}, nil
		})
		receipt, err := v.Send(t.Context(), someone, "sign", "template")
		if err != nil || receipt != (Receipt{"biz", "req"}) {
			t.Errorf("got %v, %v, want the provider's receipt", receipt, err)
		}
		if want := (Message{someone, "sign", "template", "000001", m.state().LastSendID}); asked != want {
			t.Errorf("got message %v, want %v", asked, want)
		}
		if s := m.state(); len(s.Codes) != 1 || !s.Codes[0].Confirmed || m.record.BegunAt != now() {
			t.Errorf("got state %v, begun at %d, want the code confirmed, %d", s, m.record.BegunAt, now())
		}
	})
}

func TestInspect_ReturnsLiveCodesAndWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		v := newVerifier(&m, accept)
		inspect := func(want ...CodeStatus) {
			t.Helper()
			before := m.record
			got, err := v.Inspect(t.Context(), someone)
			if last := m.state().LastSendID; err != nil || !slices.Equal(got.Alive, want) || got.LastSendID != last {
				t.Errorf("got %v, %v, want %v, the last %d", got, err, want, last)
			}
			if !reflect.DeepEqual(m.record, before) {
				t.Error("it wrote")
			}
		}
		inspect()
		confirmed := sent(t, &m, "111111")
		expires := time.UnixMicro(now()).Add(testRules.CodeTTL)
		inspect(CodeStatus{confirmed, expires, testRules.AttemptLimit, true})
		checked(&m, wrongGuess)
		begun := began(t, &m, "222222")
		inspect(CodeStatus{confirmed, expires, testRules.AttemptLimit - 1, true}, CodeStatus{begun, expires, testRules.AttemptLimit, false})
		v.Rules.AttemptLimit = 1 // an operator lowered it: what is spent by it is not alive
		inspect(CodeStatus{begun, expires, 1, false})
		v.Now = func() time.Time { return time.Now().Add(-clockTolerance - time.Second) }
		inspect() // to a replica whose clock is that far behind
		v.Now = time.Now
		time.Sleep(testRules.CodeTTL)
		inspect()
		m.record.State = []byte{99}
		if _, err := v.Inspect(t.Context(), someone); !errors.Is(err, ErrStateUnreadable) {
			t.Errorf("a state of a later version: got %v, want ErrStateUnreadable", err)
		}
	})
}

func TestCheck_AcceptsOnlyTheSentCodeAndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		v := newVerifier(&m, accept)
		for range 2 {
			if _, err := v.Send(t.Context(), someone, "", ""); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range []struct {
			code string
			want bool
		}{{"000001", false}, {wrongGuess, false}, {"000002", true}, {"000002", false}} {
			if got, err := isValid(t.Context(), v, someone, c.code); err != nil || got != c.want {
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
		var m memory
		sent(t, &m, "123456")
		v := newVerifier(&m, accept)
		for looks, code := range []string{"", "12345a", strings.Repeat("1", 2048)} {
			if got, err := isValid(t.Context(), v, someone, code); err != nil || got {
				t.Errorf("look %d: got %v, %v, want false", looks+1, got, err)
			}
		}
		if got, err := isValid(t.Context(), v, someone, "123456"); err != nil || got {
			t.Errorf("the right code after three looks: got %v, %v, want false", got, err)
		}
	})
}

// everyWay runs play along every way of the store's first operations, with every
// intruder before each of them.
func everyWay(t *testing.T, operations int, play func(t *testing.T, s *scripted)) {
	synctest.Test(t, func(t *testing.T) {
		way, ways := &script{}, 0
		for more := true; more; more = way.next() {
			ways++
			play(t, &scripted{script: way, left: operations, own: map[Version]int{}})
			if t.Failed() {
				t.Fatalf("on the way %v of %v", way.taken, way.of)
			}
		}
		t.Logf("%d ways", ways)
		if ways < 1000 {
			t.Errorf("got %d ways, want at least 1000", ways)
		}
	})
}

// isOnly reports whether err is want, and fails if it is two sentinels at once:
// whoever asks in another order would see another error. A nil want stands for
// none of them.
func isOnly(t *testing.T, err, want error) bool {
	t.Helper()
	var is []error
	for _, sentinel := range []error{ErrStoreUnavailable, ErrOutcomeUnknown, ErrSentNotConfirmed, ErrSendInProgress, ErrCallerGone, ErrStateUnreadable} {
		if errors.Is(err, sentinel) {
			is = append(is, sentinel)
		}
	}
	if len(is) > 1 {
		t.Errorf("got %v, which is each of %q, want one", err, is)
	}
	return want == nil && len(is) == 0 || errors.Is(err, want)
}

func TestSend_KeepsItsContractUnderStoreFaults(t *testing.T) {
	const old, theirs = "888888", "777777"
	refused := &SendError{Kind: SendLimited}
	for _, c := range []struct {
		name string
		says error // the provider
	}{
		{"the provider accepts", nil},
		{"the provider refuses", refused},
		{"the provider's answer is lost", errors.New("EOF")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			everyWay(t, 5, func(t *testing.T, s *scripted) {
				m := &s.memory
				sent(t, m, old)
				var theirTicket int64
				const looked, sentToo, begunToo = 1, 2, 3
				s.intruders = []func(){
					looked - 1:   func() { checked(m, wrongGuess) },
					sentToo - 1:  func() { theirTicket = sent(t, m, theirs) },
					begunToo - 1: func() { theirTicket = began(t, m, theirs) },
				}
				asked, ours := 0, ""
				v := newVerifier(s, func(_ context.Context, msg Message) (Receipt, error) {
					asked++
					ours = msg.Code
					if !slices.ContainsFunc(m.history, func(r Record) bool { return holds(r, msg.Code) }) {
						t.Errorf("asked for a code that was never stored")
					}
					return Receipt{BizID: "biz"}, c.says
				})
				began := time.Now()
				_, err := v.Send(t.Context(), someone, "", "")
				took := time.Since(began)
				v.Wait(t.Context())
				s.wakeAll()

				tickets := map[MAC]int64{}
				for _, r := range m.history {
					mine := 0
					for i, code := range mustDecode(r).Codes {
						if code.MAC != stored(old) && code.MAC != stored(theirs) {
							mine++
						}
						if before, known := tickets[code.MAC]; known && before != code.SendID {
							t.Errorf("one code was begun twice, with tickets %d and %d", before, code.SendID)
						}
						tickets[code.MAC] = code.SendID
						if i > 0 && mustDecode(r).Codes[i-1].SendID >= code.SendID {
							t.Errorf("got tickets out of order in %v", mustDecode(r))
						}
					}
					if mine > 1 {
						t.Errorf("one send has %d codes in the list, want one at most", mine)
					}
				}
				if asked > 1 {
					t.Errorf("the provider was asked %d times, want once at most", asked)
				}
				superseded := s.intruded == sentToo && (ours == "" || theirTicket > tickets[stored(ours)])
				switch {
				case asked == 0:
					if !isOnly(t, err, ErrStoreUnavailable) {
						t.Errorf("nothing was sent: got %v, want %v", err, ErrStoreUnavailable)
					}
					if got, want := lives(m, old), s.intruded != sentToo; got != want {
						t.Errorf("nothing was sent: the old code lives: got %v, want %v", got, want)
					}
				case c.says == nil:
					if err == nil && lives(m, old) {
						t.Error("Send returned nil: the old code lives, want it dead")
					}
					if err != nil && (!isOnly(t, err, ErrSentNotConfirmed) || took < storeTimeout) {
						t.Errorf("got %v after %v, want nil, or %v when the store took long", err, took, ErrSentNotConfirmed)
					}
					if got := lives(m, ours); got == superseded {
						t.Errorf("the code that was sent lives: got %v, want %v", got, !superseded)
					}
					if i := slices.IndexFunc(m.state().Codes, func(c Code) bool { return c.MAC == stored(ours) }); i >= 0 && !m.state().Codes[i].Confirmed {
						t.Error("the code that was sent is not confirmed in the end")
					}
				case errors.Is(c.says, refused):
					if !errors.Is(err, refused) {
						t.Errorf("got %v, want %v", err, refused)
					}
					if lives(m, ours) || lives(m, old) != (s.intruded != sentToo) {
						t.Errorf("a refused send: its code lives %v, the old one %v, want false, and the old one as it was", lives(m, ours), lives(m, old))
					}
				default:
					var unknown *SendError
					if !errors.As(err, &unknown) || unknown.Kind != SendUnknown {
						t.Errorf("got %v, want a SendError of an unknown outcome", err)
					}
					if lives(m, ours) == superseded || lives(m, old) != (s.intruded != sentToo) {
						t.Errorf("an unknown outcome: its code lives %v (superseded: %v), the old one %v", lives(m, ours), superseded, lives(m, old))
					}
				}
				if s.intruded == begunToo && !lives(m, theirs) && (c.says != nil || theirTicket > tickets[stored(ours)]) {
					t.Error("another replica's code in flight died, want it alive")
				}
			})
		})
	}
}

func holds(r Record, code string) bool { return ticketOf(mustDecode(r), code) != 0 }

func ticketOf(s State, code string) int64 {
	for _, c := range s.Codes {
		if c.MAC == stored(code) {
			return c.SendID
		}
	}
	return 0
}

func TestCheck_KeepsItsContractUnderStoreFaults(t *testing.T) {
	const right, newer = "888888", "777777"
	for _, c := range []struct{ name, code string }{{"the right code", right}, {"a wrong code", wrongGuess}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			everyWay(t, 6, func(t *testing.T, s *scripted) {
				m := &s.memory
				sent(t, m, right)
				theyWon := false
				const looked, usedToo, sentToo = 1, 2, 3
				s.intruders = []func(){
					looked - 1:  func() { checked(m, wrongGuess) },
					usedToo - 1: func() { theyWon = checked(m, right) },
					sentToo - 1: func() { sent(t, m, newer) },
				}
				v := newVerifier(s, accept)
				start := time.Now()
				valid, err := isValid(t.Context(), v, someone, c.code)
				took := time.Since(start)
				atReturn := len(s.own)
				s.wakeAll()

				dead := s.intruded == usedToo && theyWon || s.intruded == sentToo // by another's hand
				for version, times := range s.own {
					if times > 1 {
						t.Errorf("the swap %x was done %d times, want once", version, times)
					}
				}
				if len(s.own) > 1 {
					t.Errorf("one call was counted %d times, want once", len(s.own))
				}
				switch {
				case valid && (err != nil || atReturn != 1 || c.code != right || theyWon):
					t.Errorf("got true, %v, counted %d, of code %s, used by another %v", err, atReturn, c.code, theyWon)
				case err == nil && !valid && c.code == right && !dead:
					t.Error("got false for a code that lives")
				case err == nil && !valid && atReturn != 1 && len(m.state().Codes) > 0:
					t.Errorf("got false with %d looks stored, want 1", atReturn)
				case isOnly(t, err, ErrStoreUnavailable) && len(s.own) != 0:
					t.Errorf("got %v, and yet the call was counted", err)
				case isOnly(t, err, ErrOutcomeUnknown) && !s.unknown:
					t.Errorf("got %v, and yet every outcome was known", err)
				case isOnly(t, err, ErrOutcomeUnknown) && s.intruded == 0 && took < storeTimeout:
					t.Errorf("got %v after %v, and yet a load tells what became of the swap where nobody else writes", err, took)
				case err != nil && !errors.Is(err, ErrStoreUnavailable) && !errors.Is(err, ErrOutcomeUnknown):
					t.Errorf("got %v, want %v or %v", err, ErrStoreUnavailable, ErrOutcomeUnknown)
				}
				used := theyWon || c.code == right && len(s.own) == 1 && s.intruded != sentToo
				s.left = 0 // the store is well again
				again, err := isValid(t.Context(), v, someone, right)
				if want := !used && s.intruded != sentToo; err != nil || again != want {
					t.Errorf("the right code afterwards: got %v, %v, want %v", again, err, want)
				}
				if valid && again || theyWon && again {
					t.Error("one code was accepted twice")
				}
			})
		})
	}
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
		{"swaps hang, and surely had no effect", &brokenStore{swap: hangs}, storeTimeout, ErrStoreUnavailable},
		{"swaps hang, with unknown outcome", &brokenStore{swap: func(ctx context.Context) error { <-ctx.Done(); return errUnknown }}, storeTimeout, ErrOutcomeUnknown},
		{"every outcome is unknown", &brokenStore{swap: func(context.Context) error { return errUnknown }}, storeTimeout, ErrOutcomeUnknown},
		{"the store's own words are sentinels", &brokenStore{
			load: func(context.Context) error { return fmt.Errorf("%w, %w", ErrStoreUnavailable, ErrOutcomeUnknown) },
		}, time.Second, ErrStoreUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sent(t, &c.store.memory, "888888")
				v := newVerifier(c.store, func(context.Context, Message) (Receipt, error) {
					t.Error("the provider was asked, want nothing sent")
					return Receipt{}, nil
				})
				start := time.Now()
				_, err := v.Send(t.Context(), someone, "", "")
				if !isOnly(t, err, ErrStoreUnavailable) || time.Since(start) > c.atMost {
					t.Errorf("Send: got %v after %v, want %v within %v", err, time.Since(start), ErrStoreUnavailable, c.atMost)
				}
				start = time.Now()
				valid, err := isValid(t.Context(), v, someone, "888888")
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

// A begin that was answered "nothing was sent" may be stored all the same. Left
// there, eight of them would refuse every send for a while and then push out a
// code that was delivered.
func TestSend_UnknownBeginLeavesNoCode(t *testing.T) {
	for _, c := range []struct {
		name string
		late bool // the swap is done after the answer, if it still can be
	}{{"stored, and the answer lost", false}, {"not stored yet", true}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store brokenStore
				sent(t, &store.memory, "888888")
				var broken atomic.Bool
				broken.Store(true)
				before := store.record
				store.load = func(context.Context) error {
					if now, _ := store.memory.Load(t.Context(), someone); broken.Load() && now.Version != before.Version {
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
					t.Error("the provider was asked, want nothing sent")
					return Receipt{}, nil
				})
				if _, err := v.Send(t.Context(), someone, "", ""); !isOnly(t, err, ErrStoreUnavailable) {
					t.Errorf("got %v, want %v", err, ErrStoreUnavailable)
				}
				broken.Store(false)
				v.Wait(t.Context())
				if n := len(store.state().Codes); n != 1 {
					t.Errorf("%d codes are in the list, want the one that was sent", n)
				}
				if done, _ := store.memory.Swap(t.Context(), someone, before.Version, before); done {
					t.Error("a swap that stalled could still be done, want its old version gone")
				}
				if valid, err := isValid(t.Context(), v, someone, "888888"); !valid || err != nil {
					t.Errorf("the code that was sent before: got %v, %v, want true", valid, err)
				}
			})
		})
	}
}

func TestVerifier_GoneCallerCancelsNoStatement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		sent(t, &store.memory, "888888")
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
		if valid, err := isValid(ctx, v, someone, "000001"); valid || err != nil {
			t.Errorf("Check: got %v, %v, want false: the look was stored", valid, err)
		}
		if looks := store.state().Codes[0].Attempts; looks != 1 {
			t.Errorf("%d looks are stored, want 1", looks)
		}
		if _, err := v.Send(ctx, someone, "", ""); !isOnly(t, err, ErrCallerGone) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Send: got %v, want %v by its deadline", err, ErrCallerGone)
		}
	})
}

func TestSend_OutcomeDoesNotQueueBehindNewCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		var crowded atomic.Bool
		var loads atomic.Int64
		store.load = func(ctx context.Context) error {
			if !crowded.Load() {
				return nil
			}
			loads.Add(1)
			<-ctx.Done()
			return ctx.Err()
		}
		var v *Verifier
		v = newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			crowded.Store(true)
			for range maxConcurrentUpdates + 10 {
				go isValid(t.Context(), v, someone, "000001")
			}
			synctest.Wait()
			crowded.Store(false) // for the outcome's load: the other calls stay
			return Receipt{}, nil
		})
		start := time.Now()
		if _, err := v.Send(t.Context(), someone, "", ""); err != nil || time.Since(start) > time.Second {
			t.Errorf("Send: got %v after %v, want its outcome stored in front of the crowd", err, time.Since(start))
		}
		if n := loads.Load(); n != maxConcurrentUpdates {
			t.Errorf("%d calls of the crowd were at the store, want %d", n, maxConcurrentUpdates)
		}
		time.Sleep(2 * storeTimeout) // for the other calls to end, in the test's own time
	})
}

func TestSend_RecoversPanicWhileStoringTheOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		asked := false
		store.fail(func(context.Context) error {
			if asked {
				panic("888888")
			}
			return nil
		})
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) { asked = true; return Receipt{}, nil })
		if _, err := v.Send(t.Context(), someone, "", ""); !isOnly(t, err, ErrSentNotConfirmed) {
			t.Errorf("got %v, want %v", err, ErrSentNotConfirmed)
		}
		v.Wait(t.Context())
	})
}

// The store may lose an answer first and its nerve afterwards: what was unknown
// stays unknown, whatever is said later.
func TestCheck_UnknownOutcomeIsNeverUnavailable(t *testing.T) {
	for name, next := range map[string]error{"the store goes down": errNoEffect, "and says so in our words": ErrStoreUnavailable} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store brokenStore
				sent(t, &store.memory, "888888")
				store.swap = func(context.Context) error {
					store.load = func(context.Context) error { return next }
					return errUnknown
				}
				valid, err := isValid(t.Context(), newVerifier(&store, accept), someone, "888888")
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
		sent(t, &store.memory, "888888")
		back := time.Now().Add(2 * time.Second)
		store.load = func(context.Context) error {
			if len(store.history) > 2 && time.Now().Before(back) {
				return errNoEffect
			}
			return nil
		}
		store.done = func() error { return errUnknown }
		if valid, err := isValid(t.Context(), newVerifier(&store, accept), someone, "888888"); !valid || err != nil {
			t.Errorf("the store does it, loses the answer and is away for two seconds: got %v, %v, want true", valid, err)
		}
	})
}

func TestCheck_RacingReplicasWriteDistinctVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		sent(t, &m, "888888")
		// The same call on the same record, by two identical Verifiers.
		first, second := memory{record: m.record}, memory{record: m.record}
		for _, store := range []*memory{&first, &second} {
			if valid, err := isValid(t.Context(), newVerifier(store, accept), someone, "888888"); !valid || err != nil {
				t.Fatalf("got %v, %v, want true", valid, err)
			}
		}
		if first.record.Version == second.record.Version || first.record.Version == m.record.Version {
			t.Error("got one version from two writers, want each its own")
		}
	})
}

// repeating is a proxy that sends every swap twice, and passes the second answer on.
type repeating struct{ *memory }

func (r repeating) Swap(ctx context.Context, n Number, old Version, next Record) (bool, error) {
	r.memory.Swap(ctx, n, old, next)
	return r.memory.Swap(ctx, n, old, next)
}

func TestVerifier_SwapRepeatedByAProxyCountsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		v := newVerifier(repeating{&m}, accept)
		if _, err := v.Send(t.Context(), someone, "", ""); err != nil {
			t.Fatal(err)
		}
		if got, err := isValid(t.Context(), v, someone, wrongGuess); got || err != nil || m.state().Codes[0].Attempts != 1 {
			t.Errorf("a wrong code: got %v, %v and %v; want false and one look", got, err, m.state())
		}
		if got, err := isValid(t.Context(), v, someone, "000001"); !got || err != nil {
			t.Errorf("the right code: got %v, %v; want true", got, err)
		}
	})
}

func TestSend_CallerGoneBeforeTheProviderCallGetsNoSMS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		ctx, leave := context.WithCancel(t.Context())
		store.swap = func(context.Context) error { leave(); return nil }
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was asked, want nothing sent")
			return Receipt{}, nil
		})
		_, err := v.Send(ctx, someone, "", "")
		if !isOnly(t, err, ErrCallerGone) || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, ErrCallerGone)
		}
		v.Wait(t.Context())
		if len(store.history) != 2 || len(store.state().Codes) != 0 {
			t.Errorf("got %d swaps and %v, want the code stored and withdrawn", len(store.history), store.state())
		}
	})
}

func TestVerifier_CallerGoneAtTheStartWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := brokenStore{load: func(ctx context.Context) error { return ctx.Err() }}
		ctx, leave := context.WithCancel(t.Context())
		leave()
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was asked, want nothing sent")
			return Receipt{}, nil
		})
		if _, err := v.Send(ctx, someone, "", ""); !isOnly(t, err, ErrCallerGone) {
			t.Errorf("Send: got %v, want %v", err, ErrCallerGone)
		}
		if valid, err := isValid(ctx, v, someone, "000001"); valid || !isOnly(t, err, ErrCallerGone) {
			t.Errorf("Check: got %v, %v, want false, %v", valid, err, ErrCallerGone)
		}
		if len(store.history) != 0 {
			t.Errorf("got %d swaps, want none", len(store.history))
		}
	})
}

func TestSend_OnlySMSTimeoutEndsTheProviderCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		type key struct{}
		v := newVerifier(&m, func(ctx context.Context, _ Message) (Receipt, error) {
			if got := ctx.Value(key{}); got != "trace" {
				t.Errorf("got the caller's value %v, want it kept", got)
			}
			<-ctx.Done()
			return Receipt{}, &SendError{Kind: SendTimedOut}
		})
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "trace"), time.Second)
		defer cancel()
		start := time.Now()
		_, err := v.Send(ctx, someone, "", "")
		var timedOut *SendError
		if took := time.Since(start); took != v.SMSTimeout || !errors.As(err, &timedOut) || timedOut.Kind != SendTimedOut {
			t.Errorf("got %v after %v, want a time-out after %v", err, took, v.SMSTimeout)
		}
		if !lives(&m, "000001") {
			t.Error("the code is dead, want it alive: the SMS may arrive")
		}
	})
}

func TestSend_ProviderResultDecidesIfTheCodeLives(t *testing.T) {
	for _, c := range []struct {
		name  string
		says  error
		kind  SendKind
		lives bool
	}{
		{"unknown", &SendError{Kind: SendUnknown}, SendUnknown, true},
		{"timed out", &SendError{Kind: SendTimedOut}, SendTimedOut, true},
		{"not asked", &SendError{Kind: SendNotAttempted}, SendNotAttempted, false},
		{"limited", &SendError{Kind: SendLimited}, SendLimited, false},
		{"bad number", &SendError{Kind: SendBadNumber}, SendBadNumber, false},
		{"precondition", &SendError{Kind: SendRejected}, SendRejected, false},
		{"bad request", &SendError{Kind: SendBadRequest}, SendBadRequest, false},
		{"a refusal, wrapped", fmt.Errorf("aliyun: %w", &SendError{Kind: SendLimited}), SendLimited, false},
		{"no SendError", errors.New("EOF"), SendUnknown, true},
		{"a bare deadline", context.DeadlineExceeded, SendUnknown, true},
		{"the zero SendError", &SendError{}, SendUnknown, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m memory
				sent(t, &m, "888888")
				v := newVerifier(&m, answer(c.says))
				_, err := v.Send(t.Context(), someone, "", "")
				var got *SendError
				if !errors.As(err, &got) || got.Kind != c.kind {
					t.Errorf("got %v, want a SendError of kind %d", err, c.kind)
				}
				if got := lives(&m, "000001"); got != c.lives {
					t.Errorf("its code lives: got %v, want %v", got, c.lives)
				}
				if !lives(&m, "888888") {
					t.Error("the code of the last success is dead, want it alive: a send that failed invalidates nothing")
				}
			})
		})
	}
}

func TestSend_SenderPanicKeepsTheCodeAndPropagates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) { panic("in the sender") })
		func() {
			defer func() {
				if got := recover(); got != "in the sender" {
					t.Errorf("got panic %v, want the sender's", got)
				}
			}()
			_, _ = v.Send(t.Context(), someone, "", "")
		}()
		if !lives(&m, "000001") {
			t.Error("the code is dead, want it alive: the SMS may have gone out")
		}
	})
}

func TestSend_StoresTheOutcomeAfterTheCallerLeft(t *testing.T) {
	for _, c := range []struct {
		name  string
		says  error
		want  func(error) bool
		state func(*memory) bool
	}{
		{
			"confirm", nil,
			func(err error) bool { return errors.Is(err, ErrSentNotConfirmed) },
			func(m *memory) bool { return lives(m, "000001") && !lives(m, "888888") && m.state().Codes[0].Confirmed },
		},
		{
			"withdraw", &SendError{Kind: SendLimited},
			func(err error) bool { var e *SendError; return errors.As(err, &e) && e.Kind == SendLimited },
			func(m *memory) bool { return !lives(m, "000001") && lives(m, "888888") },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store brokenStore
				sent(t, &store.memory, "888888")
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
					return Receipt{BizID: "biz"}, c.says
				})
				start := time.Now()
				_, err := v.Send(ctx, someone, "", "")
				if took := time.Since(start); !c.want(err) || took != storeTimeout {
					t.Errorf("got %v after %v, want the answer after %v", err, took, storeTimeout)
				}
				if !lives(&store.memory, "000001") {
					t.Error("before the outcome is stored: the code is dead, want it alive")
				}
				v.Wait(t.Context())
				if took := time.Since(start); took < 40*time.Second || took > 41*time.Second || !c.state(&store.memory) {
					t.Errorf("after %v: got %v, want the outcome stored when the store is back after 40 s", took, store.state())
				}
			})
		})
	}
}

func TestSend_LogsAnOutcomeNotStoredWithinAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		var log bytes.Buffer
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			store.fail(func(context.Context) error { return errNoEffect })
			return Receipt{BizID: "biz"}, nil
		})
		v.Log = slog.New(slog.NewTextHandler(&log, nil))
		start := time.Now()
		if _, err := v.Send(t.Context(), someone, "", ""); !isOnly(t, err, ErrSentNotConfirmed) {
			t.Errorf("got %v, want %v", err, ErrSentNotConfirmed)
		}
		v.Wait(t.Context())
		if took := time.Since(start); took.Round(time.Second) != outcomeTimeout {
			t.Errorf("gave up after %v, want %v", took, outcomeTimeout)
		}
		if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, someone.Masked()) || strings.Contains(got, string(someone)) || strings.Contains(got, "000001") {
			t.Errorf("got log %q, want one line with the masked number and without the code", got)
		}
		if !lives(&store.memory, "000001") {
			t.Error("the code is dead, want it alive")
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
		_, _ = v.Send(t.Context(), someone, "", "")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if v.Wait(ctx); time.Since(start) != time.Second {
			t.Errorf("waited %v, want 1s", time.Since(start))
		}
		v.Wait(t.Context()) // for the rest of the background
	})
}

func TestSend_WithoutRandomnessStoresAndSendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was asked, want nothing sent")
			return Receipt{}, nil
		})
		v.Random = iotest.ErrReader(errors.New("no entropy"))
		if _, err := v.Send(t.Context(), someone, "", ""); err == nil || !isOnly(t, err, nil) {
			t.Errorf("got %v, want an error of its own", err)
		}
		if len(m.history) != 0 {
			t.Errorf("got %d swaps, want none", len(m.history))
		}
	})
}

func TestVerifier_KeepsTheStateOfALaterVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memory{record: Record{Version: Version{1}, State: []byte{99, 1, 2, 3}}}
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was asked, want nothing sent")
			return Receipt{}, nil
		})
		if _, err := v.Send(t.Context(), someone, "", ""); !isOnly(t, err, ErrStateUnreadable) {
			t.Errorf("Send: got %v, want %v", err, ErrStateUnreadable)
		}
		if valid, err := isValid(t.Context(), v, someone, "000001"); valid || !isOnly(t, err, ErrStateUnreadable) {
			t.Errorf("Check: got %v, %v, want false, %v", valid, err, ErrStateUnreadable)
		}
		if m.record.Version != (Version{1}) {
			t.Error("the record was written over, want it left alone")
		}
	})
}

func TestSend_FullListIsRejectedBeforeTheProviderCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m memory
		for i := range maxCodes {
			began(t, &m, fmt.Sprintf("%06d", 100+i))
		}
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was asked, want nothing sent")
			return Receipt{}, nil
		})
		if _, err := v.Send(t.Context(), someone, "", ""); !isOnly(t, err, ErrSendInProgress) {
			t.Errorf("got %v, want %v", err, ErrSendInProgress)
		}
	})
}

// Real goroutines from here on, and as many as they like.

func TestCheck_OneOfManyConcurrentRightCodesWins(t *testing.T) {
	for range 20 {
		var m memory
		sent(t, &m, "123456")
		v := newVerifier(&m, accept)
		var won atomic.Int32
		var all sync.WaitGroup
		for range 64 {
			all.Go(func() {
				valid, err := isValid(t.Context(), v, someone, "123456")
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
	var m memory
	sent(t, &m, "123456")
	before := len(m.history)
	v := newVerifier(&m, accept)
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			if valid, err := isValid(t.Context(), v, someone, wrongGuess); valid || err != nil {
				t.Errorf("got %v, %v, want false", valid, err)
			}
		})
	}
	all.Wait()
	if got := len(m.history) - before; got != testRules.AttemptLimit || lives(&m, "123456") {
		t.Errorf("got %d looks stored, the code alive %v, want %d, false", got, lives(&m, "123456"), testRules.AttemptLimit)
	}
}

func TestSend_ManyRejectedSendsKeepTheLiveCode(t *testing.T) {
	var m memory
	sent(t, &m, "123456")
	var asked atomic.Int32
	v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
		asked.Add(1)
		return Receipt{}, &SendError{Kind: SendLimited}
	})
	var all sync.WaitGroup
	for range 30 {
		all.Go(func() {
			_, err := v.Send(t.Context(), someone, "", "")
			var refused *SendError
			if !errors.As(err, &refused) && !errors.Is(err, ErrSendInProgress) {
				t.Errorf("got %v, want the refusal or %v", err, ErrSendInProgress)
			}
		})
	}
	all.Wait()
	if asked.Load() == 0 || !lives(&m, "123456") || len(m.state().Codes) != 1 {
		t.Errorf("asked %d times, the live code lives %v, %d codes in the list, want some, true, 1", asked.Load(), lives(&m, "123456"), len(m.state().Codes))
	}
}

func TestWait_IsSafeDuringSends(t *testing.T) {
	var m memory
	v := newVerifier(&m, answer(&SendError{Kind: SendLimited}))
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 100 {
				_, _ = v.Send(t.Context(), someone, "", "")
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

// A replica that swapped a number's last record need not load it; what it remembers
// is never an answer by itself.
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
		if got, err := isValid(t.Context(), w.v, someone, code); got != want || err != nil {
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
		{"after the last code nothing is remembered", func(t *testing.T, w *world) {
			check(t, w, "000001", true)
			if n := len(w.v.cache.current) + len(w.v.cache.previous); n != 0 {
				t.Errorf("%d records are remembered, want none", n)
			}
			check(t, w, "000001", false)
		}, 1},
		{"another replica sent since", func(t *testing.T, w *world) {
			sent(t, &w.store.memory, "888888")
			check(t, w, "000001", false)
			check(t, w, "888888", true)
		}, 1},
		{"another replica used the code", func(t *testing.T, w *world) {
			checked(&w.store.memory, "000001")
			check(t, w, "000001", false)
		}, 1},
		{"all that is remembered has expired: the next send loads, and swaps once", func(t *testing.T, w *world) {
			time.Sleep(testRules.CodeTTL)
			swaps := 0
			w.store.swap = func(context.Context) error { swaps++; return nil }
			checked(&w.store.memory, "") // another replica wrote
			if _, err := w.v.Send(t.Context(), someone, "", ""); err != nil || swaps != 2 {
				t.Errorf("send: got %v and %d swaps, want nil and 2, a begin and a confirm", err, swaps)
			}
		}, 1},
		{"all that is remembered has expired, and another replica sent since", func(t *testing.T, w *world) {
			time.Sleep(testRules.CodeTTL)
			sent(t, &w.store.memory, "888888")
			check(t, w, "888888", true)
		}, 1},
		{"a list that is remembered full is full no more", func(t *testing.T, w *world) {
			full := w.store.state()
			for range maxCodes - 1 {
				full, _, _ = testRules.Begin(full, stored("777777"), now())
			}
			w.v.cache.put(someone, Record{Version: w.store.record.Version, State: full.encode(), BegunAt: full.LastSendID})
			if _, err := w.v.Send(t.Context(), someone, "", ""); err != nil {
				t.Errorf("send: got %v, want nil", err)
			}
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var w world
				w.v = newVerifier(&w.store, accept)
				if got := loadsOf(&w.store, func() { _, _ = w.v.Send(t.Context(), someone, "", "") }); got != 1 {
					t.Errorf("a send: got %d loads, want 1", got)
				}
				start := time.Now()
				if got := loadsOf(&w.store, func() { c.then(t, &w) }); got != c.loads {
					t.Errorf("got %d loads, want %d", got, c.loads)
				}
				if took := time.Since(start) % testRules.CodeTTL; took != 0 {
					t.Errorf("waited %v before it looked again, want at once", took)
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
			t.Fatalf("%d records are remembered, want %d at most", got, 2*maxGeneration)
		}
	}
	for _, i := range []int{last, last - maxGeneration} {
		if got, ok := r.take(number(i)); !ok || got.BegunAt != int64(i) {
			t.Errorf("record %d of %d: got %v, %v, want it remembered", i, last, got.BegunAt, ok)
		}
		if _, ok := r.take(number(i)); ok {
			t.Errorf("record %d was given twice", i)
		}
	}
	if _, ok := r.take(number(0)); ok {
		t.Error("the oldest record is remembered, want it forgotten")
	}
	r.put(number(last-1), record(7)) // it is young; this one is newer
	r.previous[number(last-1)] = record(6)
	if got, _ := r.take(number(last - 1)); got.BegunAt != 7 {
		t.Errorf("got record %d, want the newer of two", got.BegunAt)
	}
}
