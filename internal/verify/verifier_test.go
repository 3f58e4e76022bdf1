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
func stored(code string) MAC { return testKeys.sign(testNumber, code) }

func now() int64 { return time.Now().UnixMicro() }

// began begins a send as another replica would, sent also confirms it, and checked
// checks a code.
func began(t testing.TB, m *fakeStore, code string) (sendID int64) {
	t.Helper()
	m.write(func(s State) State {
		s, got, err := testRules.Begin(s, stored(code), now())
		if err != nil {
			t.Fatalf("another replica's begin: %v", err)
		}
		sendID = got
		return s
	})
	return sendID
}

func sent(t testing.TB, m *fakeStore, code string) (sendID int64) {
	t.Helper()
	sendID = began(t, m, code)
	m.write(func(s State) State { return testRules.Confirm(s, sendID, now()) })
	return sendID
}

func checked(m *fakeStore, code string) (valid bool) {
	m.write(func(s State) State {
		s, valid, _ = testRules.Check(s, []MAC{stored(code)}, now())
		return s
	})
	return valid
}

// isValid calls Check and reports whether the code was valid.
func isValid(ctx context.Context, v *Verifier, n Number, code string) (bool, error) {
	found, err := v.Check(ctx, n, code)
	return found.Valid(), err
}

// lives reports whether a code would be accepted now.
func lives(m *fakeStore, code string) bool {
	_, valid, _ := testRules.Check(m.state(), []MAC{stored(code)}, now())
	return valid
}

func TestSend_StoresTheCodeFirstAndConfirmsItAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		var asked Message
		v := newVerifier(&m, func(_ context.Context, msg Message) (Receipt, error) {
			asked = msg
			if s := m.state(); len(s.Codes) != 1 || s.Codes[0].MAC != stored(msg.Code) || s.Codes[0].Confirmed {
				t.Errorf("at the call to the provider: got state %v, want the code in it, not confirmed", s)
			}
			return Receipt{BizID: "biz", RequestID: "req"}, nil
		})
		receipt, err := v.Send(t.Context(), testNumber, "sign", "template")
		if err != nil || receipt != (Receipt{"biz", "req"}) {
			t.Errorf("got %v, %v, want the provider's receipt", receipt, err)
		}
		if want := (Message{testNumber, "sign", "template", "000001", m.state().LastSendID}); asked != want {
			t.Errorf("got message %v, want %v", asked, want)
		}
		if s := m.state(); len(s.Codes) != 1 || !s.Codes[0].Confirmed || m.record.BegunAt != now() {
			t.Errorf("got state %v, begun at %d, want the code confirmed, %d", s, m.record.BegunAt, now())
		}
	})
}

func TestInspect_ReturnsLiveCodesAndWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		inspect := func(want ...CodeStatus) {
			t.Helper()
			before := m.record
			got, err := v.Inspect(t.Context(), testNumber)
			if last := m.state().LastSendID; err != nil || !slices.Equal(got.Live, want) || got.LastSendID != last {
				t.Errorf("got %v, %v, want %v, the last %d", got, err, want, last)
			}
			if !reflect.DeepEqual(m.record, before) {
				t.Errorf("Inspect wrote: got record %v, want %v", m.record, before)
			}
		}
		inspect()
		confirmed := sent(t, &m, "111111")
		expires := time.UnixMicro(now()).Add(testRules.CodeTTL)
		inspect(CodeStatus{confirmed, expires, testRules.AttemptLimit, true})
		checked(&m, wrongGuess)
		begun := began(t, &m, "222222")
		inspect(CodeStatus{confirmed, expires, testRules.AttemptLimit - 1, true}, CodeStatus{begun, expires, testRules.AttemptLimit, false})
		v.Rules.AttemptLimit = 1 // an operator lowered it: one attempt spends a code
		inspect(CodeStatus{begun, expires, 1, false})
		v.Now = func() time.Time { return time.Now().Add(-clockTolerance - time.Second) }
		inspect() // with a clock that is too far behind
		v.Now = time.Now
		time.Sleep(testRules.CodeTTL)
		inspect()
		m.record.State = []byte{99}
		if _, err := v.Inspect(t.Context(), testNumber); !errors.Is(err, ErrStateUnreadable) {
			t.Errorf("a state of a later version: got %v, want ErrStateUnreadable", err)
		}
	})
}

func TestCheck_AcceptsOnlyTheSentCodeAndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		for range 2 {
			if _, err := v.Send(t.Context(), testNumber, "", ""); err != nil {
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

// forEachInterleaving runs test with every combination of results of the store's first
// operations, and with each other writer before each of them.
func forEachInterleaving(t *testing.T, operations int, test func(t *testing.T, s *scriptedStore)) {
	synctest.Test(t, func(t *testing.T) {
		schedule, count := &schedule{}, 0
		for more := true; more; more = schedule.next() {
			count++
			test(t, &scriptedStore{schedule: schedule, left: operations, ownSwaps: map[Version]int{}})
			if t.Failed() {
				t.Fatalf("failed with choices %v of %v", schedule.taken, schedule.of)
			}
		}
		t.Logf("%d schedules", count)
		if count < 1000 {
			t.Errorf("got %d schedules, want at least 1000", count)
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
		ErrStateUnreadable,
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

// With any combination of store faults and any other writer, the error of Send matches the
// state: nothing was sent, the code is live, or the outcome is unknown.
func TestSend_KeepsItsContractUnderStoreFaults(t *testing.T) {
	const old, theirs = "888888", "777777"
	rejected := &SendError{Kind: SendLimited}
	for _, c := range []struct {
		name   string
		result error // of the provider
	}{
		{"the provider accepts", nil},
		{"the provider rejects", rejected},
		{"the provider's reply is lost", errors.New("EOF")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			forEachInterleaving(t, 5, func(t *testing.T, s *scriptedStore) {
				m := &s.fakeStore
				sent(t, m, old)
				var theirSendID int64
				const otherChecked, otherSent, otherBegan = 1, 2, 3
				s.otherWriters = []func(){
					otherChecked - 1: func() { checked(m, wrongGuess) },
					otherSent - 1:    func() { theirSendID = sent(t, m, theirs) },
					otherBegan - 1:   func() { theirSendID = began(t, m, theirs) },
				}
				asked, ours := 0, ""
				v := newVerifier(s, func(_ context.Context, msg Message) (Receipt, error) {
					asked++
					ours = msg.Code
					if !slices.ContainsFunc(m.history, func(r Record) bool { return holds(r, msg.Code) }) {
						t.Error("sent a code that was never stored, want it stored first")
					}
					return Receipt{BizID: "biz"}, c.result
				})
				began := time.Now()
				_, err := v.Send(t.Context(), testNumber, "", "")
				took := time.Since(began)
				v.Wait(t.Context())
				s.applyDelayed()

				sendIDs := map[MAC]int64{}
				for _, r := range m.history {
					mine := 0
					for i, code := range mustDecode(r).Codes {
						if code.MAC != stored(old) && code.MAC != stored(theirs) {
							mine++
						}
						if before, known := sendIDs[code.MAC]; known && before != code.SendID {
							t.Errorf("one code was begun twice: got send IDs %d and %d, want one", before, code.SendID)
						}
						sendIDs[code.MAC] = code.SendID
						if i > 0 && mustDecode(r).Codes[i-1].SendID >= code.SendID {
							t.Errorf("got send IDs out of order in %v, want them increasing", mustDecode(r))
						}
					}
					if mine > 1 {
						t.Errorf("got %d codes of one send in the list, want one at most", mine)
					}
				}
				if asked > 1 {
					t.Errorf("got %d calls to the provider, want one at most", asked)
				}
				superseded := s.otherWriter == otherSent && (ours == "" || theirSendID > sendIDs[stored(ours)])
				switch {
				case asked == 0:
					if !isOnly(t, err, ErrStoreUnavailable) {
						t.Errorf("nothing was sent: got %v, want %v", err, ErrStoreUnavailable)
					}
					if got, want := lives(m, old), s.otherWriter != otherSent; got != want {
						t.Errorf("nothing was sent: got old code live %v, want %v", got, want)
					}
				case c.result == nil:
					if err == nil && lives(m, old) {
						t.Error("Send returned nil: got the old code live, want it dead")
					}
					if err != nil && (!isOnly(t, err, ErrSentNotConfirmed) || took < storeTimeout) {
						t.Errorf("got %v after %v, want nil, or %v if the store took long", err, took, ErrSentNotConfirmed)
					}
					if got := lives(m, ours); got == superseded {
						t.Errorf("the sent code: got live %v, want %v", got, !superseded)
					}
					if i := slices.IndexFunc(m.state().Codes, func(c Code) bool { return c.MAC == stored(ours) }); i >= 0 &&
						!m.state().Codes[i].Confirmed {
						t.Error("the sent code: got not confirmed at the end, want confirmed")
					}
				case errors.Is(c.result, rejected):
					if !errors.Is(err, rejected) {
						t.Errorf("got %v, want %v", err, rejected)
					}
					if lives(m, ours) {
						t.Error("a rejected send: got its code live, want it dead")
					}
					if got, want := lives(m, old), s.otherWriter != otherSent; got != want {
						t.Errorf("a rejected send: got old code live %v, want %v", got, want)
					}
				default:
					var unknown *SendError
					if !errors.As(err, &unknown) || unknown.Kind != SendUnknown {
						t.Errorf("got %v, want a SendError of an unknown outcome", err)
					}
					if got := lives(m, ours); got == superseded {
						t.Errorf("an unknown outcome: got its code live %v, want %v", got, !superseded)
					}
					if got, want := lives(m, old), s.otherWriter != otherSent; got != want {
						t.Errorf("an unknown outcome: got old code live %v, want %v", got, want)
					}
				}
				if s.otherWriter == otherBegan && !lives(m, theirs) && (c.result != nil || theirSendID > sendIDs[stored(ours)]) {
					t.Error("got another replica's code in flight dead, want it live")
				}
			})
		})
	}
}

func holds(r Record, code string) bool { return sendIDOf(mustDecode(r), code) != 0 }

func sendIDOf(s State, code string) int64 {
	for _, c := range s.Codes {
		if c.MAC == stored(code) {
			return c.SendID
		}
	}
	return 0
}

// With any combination of store faults and any other writer, a check counts at most once, and
// its result matches the state.
func TestCheck_KeepsItsContractUnderStoreFaults(t *testing.T) {
	const right, newer = "888888", "777777"
	for _, c := range []struct{ name, code string }{{"the right code", right}, {"a wrong code", wrongGuess}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			forEachInterleaving(t, 6, func(t *testing.T, s *scriptedStore) {
				m := &s.fakeStore
				sent(t, m, right)
				theyWon := false
				const otherChecked, otherUsed, otherSent = 1, 2, 3
				s.otherWriters = []func(){
					otherChecked - 1: func() { checked(m, wrongGuess) },
					otherUsed - 1:    func() { theyWon = checked(m, right) },
					otherSent - 1:    func() { sent(t, m, newer) },
				}
				v := newVerifier(s, accept)
				start := time.Now()
				valid, err := isValid(t.Context(), v, testNumber, c.code)
				took := time.Since(start)
				atReturn := len(s.ownSwaps)
				s.applyDelayed()

				dead := s.otherWriter == otherUsed && theyWon || s.otherWriter == otherSent // by the other writer
				for version, times := range s.ownSwaps {
					if times > 1 {
						t.Errorf("swap %x: got applied %d times, want once", version, times)
					}
				}
				if len(s.ownSwaps) > 1 {
					t.Errorf("one call: got counted %d times, want once", len(s.ownSwaps))
				}
				switch {
				case valid && (err != nil || atReturn != 1 || c.code != right || theyWon):
					t.Errorf("got true, %v with %d swaps for code %s, used by the other writer: %v; want true only for the right code, unused, with one swap", err, atReturn, c.code, theyWon)
				case err == nil && !valid && c.code == right && !dead:
					t.Error("the right code, live: got false, want true")
				case err == nil && !valid && atReturn != 1 && len(m.state().Codes) > 0:
					t.Errorf("got false with %d attempts stored, want 1", atReturn)
				case isOnly(t, err, ErrStoreUnavailable) && len(s.ownSwaps) != 0:
					t.Errorf("got %v for a call that was counted, want another error", err)
				case isOnly(t, err, ErrOutcomeUnknown) && !s.unknown:
					t.Errorf("got %v with every outcome known, want another result", err)
				case isOnly(t, err, ErrOutcomeUnknown) && s.otherWriter == 0 && took < storeTimeout:
					t.Errorf("got %v after %v without another writer, want the outcome found by a load", err, took)
				case err != nil && !errors.Is(err, ErrStoreUnavailable) && !errors.Is(err, ErrOutcomeUnknown):
					t.Errorf("got %v, want %v or %v", err, ErrStoreUnavailable, ErrOutcomeUnknown)
				}
				used := theyWon || c.code == right && len(s.ownSwaps) == 1 && s.otherWriter != otherSent
				s.left = 0 // no more faults
				again, err := isValid(t.Context(), v, testNumber, right)
				if want := !used && s.otherWriter != otherSent; err != nil || again != want {
					t.Errorf("the right code afterwards: got %v, %v, want %v", again, err, want)
				}
				if valid && again || theyWon && again {
					t.Error("got one code accepted twice, want once")
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
				_, err := v.Send(t.Context(), testNumber, "", "")
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
				if _, err := v.Send(t.Context(), testNumber, "", ""); !isOnly(t, err, ErrStoreUnavailable) {
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
		if _, err := v.Send(ctx, testNumber, "", ""); !isOnly(t, err, ErrCallerGone) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Send: got %v, want %v with the caller's deadline", err, ErrCallerGone)
		}
	})
}

func TestSend_OutcomeDoesNotQueueBehindNewCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
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
		if _, err := v.Send(t.Context(), testNumber, "", ""); err != nil || time.Since(start) > time.Second {
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
		asked := false
		store.fail(func(context.Context) error {
			if asked {
				panic("888888")
			}
			return nil
		})
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) { asked = true; return Receipt{}, nil })
		if _, err := v.Send(t.Context(), testNumber, "", ""); !isOnly(t, err, ErrSentNotConfirmed) {
			t.Errorf("got %v, want %v", err, ErrSentNotConfirmed)
		}
		v.Wait(t.Context())
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
		if _, err := v.Send(t.Context(), testNumber, "", ""); err != nil {
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

func TestSend_CallerGoneBeforeTheProviderCallGetsNoSMS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		ctx, leave := context.WithCancel(t.Context())
		store.swap = func(context.Context) error { leave(); return nil }
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		_, err := v.Send(ctx, testNumber, "", "")
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
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		if _, err := v.Send(ctx, testNumber, "", ""); !isOnly(t, err, ErrCallerGone) {
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

// The caller's deadline does not end the call to the provider. SMSTimeout does.
func TestSend_OnlySMSTimeoutEndsTheProviderCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		type key struct{}
		v := newVerifier(&m, func(ctx context.Context, _ Message) (Receipt, error) {
			if got := ctx.Value(key{}); got != "trace" {
				t.Errorf("got the value %v in the context, want the caller's", got)
			}
			<-ctx.Done()
			return Receipt{}, &SendError{Kind: SendTimedOut}
		})
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "trace"), time.Second)
		defer cancel()
		start := time.Now()
		_, err := v.Send(ctx, testNumber, "", "")
		var timedOut *SendError
		if took := time.Since(start); took != v.SMSTimeout || !errors.As(err, &timedOut) || timedOut.Kind != SendTimedOut {
			t.Errorf("got %v after %v, want a timeout after %v", err, took, v.SMSTimeout)
		}
		if !lives(&m, "000001") {
			t.Error("got the code dead, want it live: the SMS may arrive")
		}
	})
}

func TestSend_ProviderResultDecidesIfTheCodeLives(t *testing.T) {
	for _, c := range []struct {
		name   string
		result error
		kind   SendKind
		lives  bool
	}{
		{"unknown", &SendError{Kind: SendUnknown}, SendUnknown, true},
		{"timed out", &SendError{Kind: SendTimedOut}, SendTimedOut, true},
		{"not attempted", &SendError{Kind: SendNotAttempted}, SendNotAttempted, false},
		{"limited", &SendError{Kind: SendLimited}, SendLimited, false},
		{"bad number", &SendError{Kind: SendBadNumber}, SendBadNumber, false},
		{"rejected", &SendError{Kind: SendRejected}, SendRejected, false},
		{"bad request", &SendError{Kind: SendBadRequest}, SendBadRequest, false},
		{"a rejection, wrapped", fmt.Errorf("aliyun: %w", &SendError{Kind: SendLimited}), SendLimited, false},
		{"no SendError", errors.New("EOF"), SendUnknown, true},
		{"a bare deadline", context.DeadlineExceeded, SendUnknown, true},
		{"the zero SendError", &SendError{}, SendUnknown, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				sent(t, &m, "888888")
				v := newVerifier(&m, failWith(c.result))
				_, err := v.Send(t.Context(), testNumber, "", "")
				var got *SendError
				if !errors.As(err, &got) || got.Kind != c.kind {
					t.Errorf("got %v, want a SendError of kind %d", err, c.kind)
				}
				if got := lives(&m, "000001"); got != c.lives {
					t.Errorf("its code: got live %v, want %v", got, c.lives)
				}
				if !lives(&m, "888888") {
					t.Error("got the code of the last success dead, want it live: a failed send invalidates nothing")
				}
			})
		})
	}
}

func TestSend_SenderPanicKeepsTheCodeAndPropagates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) { panic("in the sender") })
		func() {
			defer func() {
				if got := recover(); got != "in the sender" {
					t.Errorf("got panic %v, want the sender's", got)
				}
			}()
			_, _ = v.Send(t.Context(), testNumber, "", "")
		}()
		if !lives(&m, "000001") {
			t.Error("got the code dead, want it live: the SMS may have been sent")
		}
	})
}

func TestSend_StoresTheOutcomeAfterTheCallerLeft(t *testing.T) {
	for _, c := range []struct {
		name   string
		result error
		want   func(error) bool
		state  func(*fakeStore) bool
	}{
		{
			"confirm", nil,
			func(err error) bool { return errors.Is(err, ErrSentNotConfirmed) },
			func(m *fakeStore) bool {
				return lives(m, "000001") && !lives(m, "888888") && m.state().Codes[0].Confirmed
			},
		},
		{
			"withdraw", &SendError{Kind: SendLimited},
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
				_, err := v.Send(ctx, testNumber, "", "")
				if took := time.Since(start); !c.want(err) || took != storeTimeout {
					t.Errorf("got %v after %v, want its result after %v", err, took, storeTimeout)
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
		var log bytes.Buffer
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			store.fail(func(context.Context) error { return errNoEffect })
			return Receipt{BizID: "biz"}, nil
		})
		v.Log = slog.New(slog.NewTextHandler(&log, nil))
		start := time.Now()
		if _, err := v.Send(t.Context(), testNumber, "", ""); !isOnly(t, err, ErrSentNotConfirmed) {
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
		_, _ = v.Send(t.Context(), testNumber, "", "")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if v.Wait(ctx); time.Since(start) != time.Second {
			t.Errorf("waited %v, want 1s", time.Since(start))
		}
		v.Wait(t.Context()) // for the background update to end
	})
}

func TestSend_WithoutRandomnessStoresAndSendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		v.Random = iotest.ErrReader(errors.New("no entropy"))
		if _, err := v.Send(t.Context(), testNumber, "", ""); err == nil || !isOnly(t, err, nil) {
			t.Errorf("got %v, want an error that is no sentinel", err)
		}
		if len(m.history) != 0 {
			t.Errorf("got %d swaps, want none", len(m.history))
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
		if _, err := v.Send(t.Context(), testNumber, "", ""); !isOnly(t, err, ErrStateUnreadable) {
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

func TestSend_FullListIsRejectedBeforeTheProviderCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		for i := range maxCodes {
			began(t, &m, fmt.Sprintf("%06d", 100+i))
		}
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		if _, err := v.Send(t.Context(), testNumber, "", ""); !isOnly(t, err, ErrSendInProgress) {
			t.Errorf("got %v, want %v", err, ErrSendInProgress)
		}
	})
}

// The tests below run real goroutines, without a bubble.

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

func TestSend_ManyRejectedSendsKeepTheLiveCode(t *testing.T) {
	var m fakeStore
	sent(t, &m, "123456")
	var asked atomic.Int32
	v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
		asked.Add(1)
		return Receipt{}, &SendError{Kind: SendLimited}
	})
	var all sync.WaitGroup
	for range 30 {
		all.Go(func() {
			_, err := v.Send(t.Context(), testNumber, "", "")
			var rejected *SendError
			if !errors.As(err, &rejected) && !errors.Is(err, ErrSendInProgress) {
				t.Errorf("got %v, want the rejection or %v", err, ErrSendInProgress)
			}
		})
	}
	all.Wait()
	if asked.Load() == 0 {
		t.Error("got no call to the provider, want some")
	}
	if !lives(&m, "123456") {
		t.Error("got the live code dead, want it live")
	}
	if n := len(m.state().Codes); n != 1 {
		t.Errorf("got %d codes in the list, want 1", n)
	}
}

func TestWait_IsSafeDuringSends(t *testing.T) {
	var m fakeStore
	v := newVerifier(&m, failWith(&SendError{Kind: SendLimited}))
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 100 {
				_, _ = v.Send(t.Context(), testNumber, "", "")
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
