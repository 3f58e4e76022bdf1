package verify

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

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

// A sendRun is one call of Send under store faults, with the state that it left.
type sendRun struct {
	*scriptedStore
	result error // of the provider
	err    error // of Send
	took   time.Duration
	asked  int // calls to the provider

	old, ours, theirs  string // codes: of a send before ("" if none), of this send, of another replica
	theirSendID        int64  // 0 if no other replica sent
	theirsLiveAtReturn bool
	sendIDs            map[MAC]int64 // of every code that was stored
}

// With any combination of store faults and any other writer, the error of Send matches the
// state: nothing was sent, the code is live, or the outcome is unknown.
func TestSend_KeepsItsContractUnderStoreFaults(t *testing.T) {
	rejected := &SendError{Kind: SendLimited}
	for _, c := range []struct {
		name   string
		old    string
		result error // of the provider
		check  func(*testing.T, *sendRun)
	}{
		{"the provider accepts a resend", "888888", nil, checkAccepted},
		{"the provider accepts a first send", "", nil, checkFirstAccepted},
		{"the provider rejects", "888888", rejected, checkRejected},
		{"the provider's reply is lost", "888888", errors.New("EOF"), checkUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			forEachInterleaving(t, 5, func(t *testing.T, s *scriptedStore) {
				r := runSend(t, s, c.old, c.result)
				checkStoredCodes(t, r)
				if r.asked == 0 {
					checkNothingSent(t, r)
				} else {
					c.check(t, r)
				}
				checkTheirCodeInFlight(t, r)
			})
		})
	}
}

func runSend(t *testing.T, s *scriptedStore, old string, result error) *sendRun {
	t.Helper()
	r := &sendRun{scriptedStore: s, result: result, old: old, theirs: "777777", sendIDs: map[MAC]int64{}}
	m := &s.fakeStore
	if r.old != "" {
		sent(t, m, r.old)
	}
	s.otherWriters = []otherWriter{
		{otherChecked, func() { checked(m, wrongGuess) }},
		{otherSent, func() { r.theirSendID = sent(t, m, r.theirs) }},
		{otherBegan, func() { r.theirSendID = began(t, m, r.theirs) }},
	}
	v := newVerifier(s, func(_ context.Context, msg Message) (Receipt, error) {
		r.asked++
		r.ours = msg.Code
		if !slices.ContainsFunc(m.history, func(record Record) bool { return holds(record, msg.Code) }) {
			t.Error("sent a code that was never stored, want it stored first")
		}
		return Receipt{BizID: "biz"}, result
	})
	start := time.Now()
	_, r.err = v.Send(t.Context(), SendRequest{Number: testNumber})
	r.took = time.Since(start)
	r.theirsLiveAtReturn = lives(m, r.theirs)
	v.Wait(t.Context())
	s.applyDelayed()
	for _, record := range m.history {
		for _, code := range mustDecode(record).Codes {
			if before, known := r.sendIDs[code.MAC]; known && before != code.SendID {
				t.Errorf("one code was begun twice: got send IDs %d and %d, want one", before, code.SendID)
			}
			r.sendIDs[code.MAC] = code.SendID
		}
	}
	return r
}

// ourSendID returns the send ID of the sent code, 0 if none was sent.
func (r *sendRun) ourSendID() int64 { return r.sendIDs[stored(r.ours)] }

// replaced reports whether another replica's later send succeeded.
func (r *sendRun) replaced() bool { return r.by == otherSent && r.theirSendID > r.ourSendID() }

// checkStoredCodes checks every state that was stored.
func checkStoredCodes(t *testing.T, r *sendRun) {
	t.Helper()
	for _, record := range r.history {
		state, mine := mustDecode(record), 0
		for _, code := range state.Codes {
			if code.MAC != stored(r.old) && code.MAC != stored(r.theirs) {
				mine++
			}
		}
		if mine > 1 {
			t.Errorf("got %d codes of one send in the list, want one at most", mine)
		}
		for i := 1; i < len(state.Codes); i++ {
			if state.Codes[i-1].SendID >= state.Codes[i].SendID {
				t.Errorf("got send IDs out of order in %v, want them increasing", state)
			}
		}
	}
	if r.asked > 1 {
		t.Errorf("got %d calls to the provider, want one at most", r.asked)
	}
}

func checkNothingSent(t *testing.T, r *sendRun) {
	t.Helper()
	if !isOnly(t, r.err, ErrStoreUnavailable) {
		t.Errorf("nothing was sent: got %v, want %v", r.err, ErrStoreUnavailable)
	}
	checkOldCodeLives(t, r)
}

func checkAccepted(t *testing.T, r *sendRun) {
	t.Helper()
	if r.err == nil && lives(&r.fakeStore, r.old) {
		t.Error("Send returned nil: got the old code live, want it dead")
	}
	if r.err != nil && !isOnly(t, r.err, ErrSentNotConfirmed) {
		t.Errorf("got %v, want nil or %v", r.err, ErrSentNotConfirmed)
	}
	if r.err != nil && r.took < storeTimeout {
		t.Errorf("got %v after %v, want it only if the store took %v", r.err, r.took, storeTimeout)
	}
	if lives(&r.fakeStore, r.old) {
		t.Error("the old code: got it live at the end, want it dropped by the confirm")
	}
	checkOurCodeLives(t, r)
	checkNoOlderCodeAfterOK(t, r)
}

// checkFirstAccepted checks a send that began without an older code, or with that of another
// replica. Only in the second case does it need the store after the call to the provider.
func checkFirstAccepted(t *testing.T, r *sendRun) {
	t.Helper()
	isSole := r.theirSendID == 0 || r.theirSendID > r.ourSendID()
	if r.err != nil && (isSole || !isOnly(t, r.err, ErrSentNotConfirmed)) {
		t.Errorf("got %v, want nil, or %v if another replica's code is older", r.err, ErrSentNotConfirmed)
	}
	checkOurCodeLives(t, r)
	checkNoOlderCodeAfterOK(t, r)
}

// checkNoOlderCodeAfterOK checks rule 2 for another replica's code.
func checkNoOlderCodeAfterOK(t *testing.T, r *sendRun) {
	t.Helper()
	if r.err == nil && r.theirSendID < r.ourSendID() && r.theirsLiveAtReturn {
		t.Error("Send returned nil: got another replica's older code live, want it dead")
	}
}

func checkRejected(t *testing.T, r *sendRun) {
	t.Helper()
	if !errors.Is(r.err, r.result) {
		t.Errorf("got %v, want %v", r.err, r.result)
	}
	if lives(&r.fakeStore, r.ours) {
		t.Error("a rejected send: got its code live, want it dead")
	}
	checkOldCodeLives(t, r)
}

func checkUnknown(t *testing.T, r *sendRun) {
	t.Helper()
	var unknown *SendError
	if !errors.As(r.err, &unknown) || unknown.Kind != SendUnknown {
		t.Errorf("got %v, want a SendError of an unknown outcome", r.err)
	}
	checkOurCodeLives(t, r)
	checkOldCodeLives(t, r)
}

// checkOurCodeLives checks that the sent code is live, unless a later send replaced it.
func checkOurCodeLives(t *testing.T, r *sendRun) {
	t.Helper()
	if got, want := lives(&r.fakeStore, r.ours), !r.replaced(); got != want {
		t.Errorf("the sent code: got live %v, want %v", got, want)
	}
}

// checkOldCodeLives checks that this send replaced no code: it did not succeed.
func checkOldCodeLives(t *testing.T, r *sendRun) {
	t.Helper()
	if got, want := lives(&r.fakeStore, r.old), r.by != otherSent; got != want && r.old != "" {
		t.Errorf("a send without success: got old code live %v, want %v", got, want)
	}
}

// checkTheirCodeInFlight checks that only a later send that succeeded replaces another replica's
// code in flight.
func checkTheirCodeInFlight(t *testing.T, r *sendRun) {
	t.Helper()
	replaced := r.result == nil && r.theirSendID <= r.ourSendID()
	if r.by == otherBegan && !replaced && !lives(&r.fakeStore, r.theirs) {
		t.Error("got another replica's code in flight dead, want it live")
	}
}

func holds(r Record, code string) bool {
	return slices.ContainsFunc(mustDecode(r).Codes, func(c Code) bool { return c.MAC == stored(code) })
}

const rightCode, newerCode = "888888", "777777"

// A checkRun is one call of Check under store faults.
type checkRun struct {
	*scriptedStore
	code     string
	valid    bool
	err      error
	took     time.Duration
	atReturn int  // swaps of the call that were applied when it returned
	theyWon  bool // another replica used the code
}

// With any combination of store faults and any other writer, a check counts at most once, and
// its result matches the state.
func TestCheck_KeepsItsContractUnderStoreFaults(t *testing.T) {
	for _, c := range []struct{ name, code string }{{"the right code", rightCode}, {"a wrong code", wrongGuess}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			forEachInterleaving(t, 6, func(t *testing.T, s *scriptedStore) {
				v := newVerifier(s, accept)
				r := runCheck(t, s, v, c.code)
				checkCountedOnce(t, r)
				switch {
				case r.valid:
					checkTrue(t, r)
				case r.err == nil:
					checkFalse(t, r)
				case isOnly(t, r.err, ErrOutcomeUnknown):
					checkOutcomeUnknown(t, r)
				default:
					checkUnavailable(t, r)
				}
				checkRightCodeAfterwards(t, r, v)
			})
		})
	}
}

func runCheck(t *testing.T, s *scriptedStore, v *Verifier, code string) *checkRun {
	t.Helper()
	r := &checkRun{scriptedStore: s, code: code}
	m := &s.fakeStore
	sent(t, m, rightCode)
	s.otherWriters = []otherWriter{
		{otherChecked, func() { checked(m, wrongGuess) }},
		{otherUsed, func() { r.theyWon = checked(m, rightCode) }},
		{otherSent, func() { sent(t, m, newerCode) }},
	}
	start := time.Now()
	r.valid, r.err = isValid(t.Context(), v, testNumber, code)
	r.took = time.Since(start)
	r.atReturn = len(s.ownSwaps)
	s.applyDelayed()
	return r
}

func checkCountedOnce(t *testing.T, r *checkRun) {
	t.Helper()
	for version, times := range r.ownSwaps {
		if times > 1 {
			t.Errorf("swap %x: got applied %d times, want once", version, times)
		}
	}
	if len(r.ownSwaps) > 1 {
		t.Errorf("one call: got counted %d times, want once", len(r.ownSwaps))
	}
}

func checkTrue(t *testing.T, r *checkRun) {
	t.Helper()
	if r.err != nil {
		t.Errorf("got true, %v, want true only without an error", r.err)
	}
	if r.atReturn != 1 {
		t.Errorf("got true with %d swaps, want one", r.atReturn)
	}
	if r.code != rightCode || r.theyWon {
		t.Errorf("got true for code %s, used by the other writer: %v; want true only for the right code, unused", r.code, r.theyWon)
	}
}

func checkFalse(t *testing.T, r *checkRun) {
	t.Helper()
	dead := r.theyWon || r.by == otherSent // by the other writer
	if r.code == rightCode && !dead {
		t.Error("the right code, live: got false, want true")
		return
	}
	if r.atReturn != 1 && len(r.state().Codes) > 0 {
		t.Errorf("got false with %d attempts stored, want 1", r.atReturn)
	}
}

func checkOutcomeUnknown(t *testing.T, r *checkRun) {
	t.Helper()
	if !r.unknown {
		t.Errorf("got %v with every outcome known, want another result", r.err)
	}
	if r.by == 0 && r.took < storeTimeout {
		t.Errorf("got %v after %v without another writer, want the outcome found by a load", r.err, r.took)
	}
}

func checkUnavailable(t *testing.T, r *checkRun) {
	t.Helper()
	if !isOnly(t, r.err, ErrStoreUnavailable) {
		t.Errorf("got %v, want %v or %v", r.err, ErrStoreUnavailable, ErrOutcomeUnknown)
	}
	if len(r.ownSwaps) != 0 {
		t.Errorf("got %v for a call that was counted, want another error", r.err)
	}
}

// checkRightCodeAfterwards checks the right code again, without faults: it is accepted unless it
// was used or replaced.
func checkRightCodeAfterwards(t *testing.T, r *checkRun, v *Verifier) {
	t.Helper()
	used := r.theyWon || r.code == rightCode && len(r.ownSwaps) == 1 && r.by != otherSent
	r.left = 0 // no more faults
	again, err := isValid(t.Context(), v, testNumber, rightCode)
	if want := !used && r.by != otherSent; err != nil || again != want {
		t.Errorf("the right code afterwards: got %v, %v, want %v", again, err, want)
	}
	if again && (r.valid || r.theyWon) {
		t.Error("got one code accepted twice, want once")
	}
}
