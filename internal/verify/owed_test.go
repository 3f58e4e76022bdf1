package verify

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// acceptedIn returns the acceptance that another process reads from the store.
func acceptedIn(t *testing.T, m Store, n Number) Accepted {
	t.Helper()
	found, err := newVerifier(m, accept).Inspect(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return found.History.Accepted
}

// owedSend sends a sole code, and checks that its acceptance is owed: known in the process that
// sent it, and not stored.
func owedSend(t *testing.T, v *Verifier, m *fakeStore) Accepted {
	t.Helper()
	if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil {
		t.Fatal(err)
	}
	want := Accepted{m.state().LastSendID, now(), "biz"}
	here, err := v.Inspect(t.Context(), testNumber)
	if err != nil || here.History.Accepted != want || !here.Live[0].Accepted {
		t.Fatalf("inspected by the process that sent: got %+v, %v, want %+v", here, err, want)
	}
	if got := acceptedIn(t, m, testNumber); m.swaps() != 1 || got != (Accepted{}) {
		t.Fatalf("after the send: got %d swaps and %+v stored, want 1 and none", m.swaps(), got)
	}
	return want
}

func TestOwed_IsStoredByTheNextSwapOfTheNumber(t *testing.T) {
	for name, next := range map[string]func(v *Verifier){
		"a match":    func(v *Verifier) { v.Check(context.Background(), testNumber, "000001", "") },
		"an attempt": func(v *Verifier) { v.Check(context.Background(), testNumber, wrongGuess, "") },
		"a begin": func(v *Verifier) {
			v.Sender = failWith(&SendError{Kind: SendUnknown})
			v.Send(context.Background(), SendRequest{Number: testNumber})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				v := newVerifier(&m, accept)
				want := owedSend(t, v, &m)
				time.Sleep(5 * time.Second)
				synctest.Wait()
				next(v)
				if got := acceptedIn(t, &m, testNumber); got != want {
					t.Errorf("got %+v stored, want %+v", got, want)
				}
				time.Sleep(2 * owedDelay)
				synctest.Wait()
				v.Wait(t.Context())
				if n := m.swaps(); n != 2 {
					t.Errorf("got %d swaps, want 2: the acceptance has none of its own", n)
				}
			})
		})
	}
}

func TestOwed_IsStoredByItsOwnSwapIfTheCodeLives(t *testing.T) {
	for _, c := range []struct {
		name      string
		meanwhile func(m *fakeStore) // by another replica
		swaps     int                // of all replicas
		stored    bool
	}{
		{"no other write", func(*fakeStore) {}, 2, true},
		{"another replica counted an attempt", func(m *fakeStore) { checked(m, wrongGuess) }, 3, true},
		{"another replica used the code", func(m *fakeStore) { checked(m, "000001") }, 2, false},
		{"another replica sent", func(m *fakeStore) { sent(t, m, "777777") }, 3, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				v := newVerifier(&m, accept)
				want := owedSend(t, v, &m)
				c.meanwhile(&m)
				time.Sleep(owedDelay - time.Second)
				synctest.Wait()
				if got := acceptedIn(t, &m, testNumber); got != (Accepted{}) {
					t.Errorf("before its delay: got %+v stored, want none", got)
				}
				time.Sleep(1500 * time.Millisecond)
				synctest.Wait()
				if got := acceptedIn(t, &m, testNumber) == want; got != c.stored || m.swaps() != c.swaps {
					t.Errorf("after its delay: got stored %v and %d swaps, want %v and %d", got, m.swaps(), c.stored, c.swaps)
				}
				if got := len(v.owed.accepted); got != 0 {
					t.Errorf("got %d acceptances owed, want none", got)
				}
			})
		})
	}
}

func TestOwed_WaitsWhileTheStoreIsBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		want := owedSend(t, v, &m)
		for range maxOwedSwaps {
			v.storeSlots <- struct{}{}
		}
		time.Sleep(5 * owedDelay)
		synctest.Wait()
		if n := m.swaps(); n != 1 {
			t.Errorf("with %d calls at the store: got %d swaps, want 1", maxOwedSwaps, n)
		}
		<-v.storeSlots
		time.Sleep(2 * owedInterval)
		synctest.Wait()
		if got := acceptedIn(t, &m, testNumber); got != want {
			t.Errorf("with one call less: got %+v, want %+v", got, want)
		}
	})
}

// A send beside which too many are owed stores its acceptance at once. It does not wait for that.
func TestOwed_IsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		v := newVerifier(&store, accept)
		for i := range maxOwed {
			if _, err := v.Send(t.Context(), SendRequest{Number: Number(fmt.Sprintf("+86139%08d", i))}); err != nil {
				t.Fatal(err)
			}
		}
		start := time.Now()
		store.swap = func(context.Context) error {
			if store.swaps() > 0 {
				time.Sleep(time.Second)
			}
			return nil
		}
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil || time.Since(start) != 0 {
			t.Errorf("got %v after %v, want nil at once", err, time.Since(start))
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		store.swap = nil
		if got := acceptedIn(t, &store, testNumber); got.BizID != "biz" {
			t.Errorf("got %+v, want the acceptance stored at once", got)
		}
		time.Sleep(owedDelay)
		synctest.Wait()
		if got := acceptedIn(t, &store, "+8613900000000"); got.BizID != "biz" || len(v.owed.accepted) != 0 {
			t.Errorf("after the delay: got %+v, and %d owed, want the others stored", got, len(v.owed.accepted))
		}
	})
}

func TestWait_StoresOwedOutcomesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		want := owedSend(t, v, &m)
		start := time.Now()
		v.Wait(t.Context())
		if got := acceptedIn(t, &m, testNumber); got != want || time.Since(start) > time.Second {
			t.Errorf("got %+v after %v, want %+v at once", got, time.Since(start), want)
		}
		v.Check(t.Context(), testNumber, "000001", "")
		v.Send(t.Context(), SendRequest{Number: testNumber}) // that still runs
		synctest.Wait()
		if got := acceptedIn(t, &m, testNumber); got.SendID != m.state().LastSendID {
			t.Errorf("a send after Wait: got %+v, want send ID %d", got, m.state().LastSendID)
		}
	})
}

// If the process crashes, the acceptance is lost, and no code.
func TestOwed_LostByACrashLosesNoCode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		owedSend(t, newVerifier(&m, accept), &m)
		other := newVerifier(&m, accept)
		if valid, err := isValid(t.Context(), other, testNumber, "000001"); !valid || err != nil {
			t.Errorf("got %v, %v, want true", valid, err)
		}
	})
}

// A sole code needs no store after the call to the provider: the call returns OK.
func TestSend_SoleCodeReturnsOKWhileTheStoreIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			store.fail(func(context.Context) error { return errNoEffect })
			return Receipt{BizID: "biz"}, nil
		})
		start := time.Now()
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil || time.Since(start) != 0 {
			t.Errorf("got %v after %v, want nil at once", err, time.Since(start))
		}
		store.load, store.swap = nil, nil
		if valid, err := isValid(t.Context(), v, testNumber, "000001"); !valid || err != nil {
			t.Errorf("got %v, %v, want true", valid, err)
		}
	})
}

func TestOwed_HandsItsRecordToOneCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		v := newVerifier(&store, accept)
		owedSend(t, v, &store.fakeStore)
		loads := 0
		store.load = func(context.Context) error {
			loads++
			return nil
		}
		for i, want := range []struct {
			code  string
			valid bool
			loads int
		}{{wrongGuess, false, 0}, {"000001", true, 1}} {
			if valid, err := isValid(t.Context(), v, testNumber, want.code); valid != want.valid || err != nil || loads != want.loads {
				t.Errorf("check %d: got %v, %v after %d loads, want %v after %d", i, valid, err, loads, want.valid, want.loads)
			}
		}
	})
}

// Another replica wrote the record after the send, so that the handed record is stale.
func TestOwed_ItsRecordMayBeStale(t *testing.T) {
	send := func(t *testing.T, m *fakeStore) { sent(t, m, "777777") }
	for _, c := range []struct {
		name      string
		meanwhile func(t *testing.T, m *fakeStore)
		code      string
		context   string
		want      bool
		conflicts int // of the first check
	}{
		{"the code was used", func(_ *testing.T, m *fakeStore) { checked(m, "000001") }, "000001", "", false, 1},
		{"a newer code", send, "777777", "", true, 1},
		{"the older code", send, "000001", "", false, 1},
		{"a code of another context", func(t *testing.T, m *fakeStore) {
			newVerifier(m, accept).Send(t.Context(), SendRequest{Number: testNumber, Context: "login"})
		}, "000001", "login", true, 0},
		{"the record was deleted", func(_ *testing.T, m *fakeStore) {
			time.Sleep(longestInFlight + time.Second)
			newVerifier(m, accept).Forget(context.Background(), testNumber, m, nil)
		}, "000001", "", false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var store brokenStore
				v := newVerifier(&store, accept)
				owedSend(t, v, &store.fakeStore)
				for range maxOwedSwaps { // the acceptance stays owed
					v.storeSlots <- struct{}{}
				}
				c.meanwhile(t, &store.fakeStore)
				attempts := 0
				store.swap = func(context.Context) error {
					attempts++
					return nil
				}
				for i, want := range []int{c.conflicts, 0} {
					before := store.swaps()
					attempts = 0
					got, err := v.Check(t.Context(), testNumber, c.code, c.context)
					if i == 0 && (got.Valid() != c.want || err != nil) {
						t.Errorf("got %v, %v, want %v", got, err, c.want)
					}
					if conflicts := attempts - (store.swaps() - before); conflicts != want {
						t.Errorf("check %d: got %d conflicts, want %d", i, conflicts, want)
					}
				}
			})
		})
	}
}
