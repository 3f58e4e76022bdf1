package verify

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Delete implements Deleter.
func (m *fakeStore) Delete(_ context.Context, n Number, old Version) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n != testNumber || m.record.Version != old {
		return false, nil
	}
	m.record = Record{}
	return true, nil
}

// A deleterFunc is a Deleter.
type deleterFunc func(old Version) (bool, error)

func (f deleterFunc) Delete(_ context.Context, _ Number, old Version) (bool, error) { return f(old) }

func TestForget_DeletesTheRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		sent(t, &m, "111111")
		time.Sleep(longestInFlight)
		held, deleted, err := v.Forget(t.Context(), testNumber, &m, func(time.Duration) { t.Error("waiting: got a call; want none") })
		if !deleted || err != nil || len(held.Live) != 1 {
			t.Errorf("got %+v, %v, %v; want one live code, true, nil", held, deleted, err)
		}
		if m.stored().Version != (Version{}) {
			t.Errorf("stored: got %+v; want nothing", m.stored())
		}
		if _, deleted, err = v.Forget(t.Context(), testNumber, &m, nil); deleted || err != nil {
			t.Errorf("again: got %v, %v; want false, nil", deleted, err)
		}
	})
}

// A person who is asked for a code while an operator deletes the number gets a code that works.
func TestForget_WaitsForASendInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		code := make(chan string, 1)
		v := newVerifier(&m, func(_ context.Context, msg Message) (Receipt, error) {
			time.Sleep(4 * time.Second)
			code <- msg.Code
			return Receipt{}, nil
		})
		go v.Send(t.Context(), SendRequest{Number: testNumber})
		synctest.Wait()
		var waits []time.Duration
		forgotten := make(chan error, 1)
		go func() {
			_, deleted, err := v.Forget(t.Context(), testNumber, &m, func(left time.Duration) { waits = append(waits, left) })
			if !deleted {
				err = errors.Join(err, errors.New("not deleted"))
			}
			forgotten <- err
		}()
		if valid, err := isValid(t.Context(), v, testNumber, <-code); !valid || err != nil {
			t.Errorf("the code of the send: got %v, %v; want true, nil", valid, err)
		}
		if err := <-forgotten; err != nil {
			t.Error(err)
		}
		if len(waits) != 1 || waits[0] != longestInFlight {
			t.Errorf("waits: got %v; want one of %v", waits, longestInFlight)
		}
	})
}

func TestForget_RepeatsUntilItIsCertain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		sent(t, &m, "111111")
		time.Sleep(longestInFlight)
		calls := 0
		_, deleted, err := v.Forget(t.Context(), testNumber, deleterFunc(func(old Version) (bool, error) {
			switch calls++; calls {
			case 1: // a check is first
				checked(&m, wrongGuess)
				return m.Delete(t.Context(), testNumber, old)
			case 2: // not applied, and the reply is lost
				return false, ErrOutcomeUnknown
			default: // applied, and the reply is lost
				m.Delete(t.Context(), testNumber, old)
				return false, ErrOutcomeUnknown
			}
		}), nil)
		if !deleted || err != nil || calls != 3 || m.stored().Version != (Version{}) {
			t.Errorf("got %v, %v, %d calls, stored %+v; want true, nil, 3 calls, nothing", deleted, err, calls, m.stored())
		}
		sent(t, &m, "111111")
		time.Sleep(longestInFlight)
		denied := errors.New("denied")
		without := deleterFunc(func(Version) (bool, error) { return false, denied })
		if _, deleted, err := v.Forget(t.Context(), testNumber, without, nil); deleted || !errors.Is(err, denied) {
			t.Errorf("without the right: got %v, %v; want false, %v", deleted, err, denied)
		}
	})
}

// The outcome of a send that took longer than Forget waits does not store the number again.
func TestForget_LateOutcomeStoresNothing(t *testing.T) {
	for name, result := range map[string]error{"accepted": nil, "rejected": &SendError{Kind: SendLimited}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				sent(t, &m, "111111") // so that the code of the next send is not sole
				v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
					m.Delete(t.Context(), testNumber, m.stored().Version)
					return Receipt{}, result
				})
				v.Send(t.Context(), SendRequest{Number: testNumber})
				v.Wait(t.Context())
				if m.stored().Version != (Version{}) {
					t.Errorf("stored: got %+v; want nothing", m.stored())
				}
			})
		})
	}
}
