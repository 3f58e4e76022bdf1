package verify

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

var (
	testRules = Rules{AttemptLimit: 3, CodeTTL: MaxCodeTTL}
	testNow   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).UnixMicro()
)

// begun returns the state after a number of begins, all at testNow.
func begun(t *testing.T, sends int) (s State, sendIDs []int64) {
	t.Helper()
	for i := range sends {
		var b Begun
		var err error
		if s, b, err = testRules.Begin(s, newSend(modelMAC(i)), testNow); err != nil {
			t.Fatalf("begin %d: got %v, want nil", i, err)
		}
		sendIDs = append(sendIDs, b.SendID)
	}
	return s, sendIDs
}

func accepts(s State, send int, now int64) bool {
	_, valid, _ := testRules.Check(s, []MAC{modelMAC(send)}, nil, now)
	return valid
}

func TestRules_CodeLivesFrom5sBeforeItsBeginToItsTTL(t *testing.T) {
	s, _ := begun(t, 1)
	life := testRules.CodeTTL
	for _, c := range []struct {
		name  string
		after time.Duration
		want  bool
	}{
		{"a clock further behind", -5*time.Second - time.Microsecond, false},
		{"a clock five seconds behind", -5 * time.Second, true},
		{"at once", 0, true},
		{"the last microsecond of its life", life - time.Microsecond, true},
		{"its life is over", life, false},
		{"much later", 1000 * life, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := accepts(s, 0, testNow+c.after.Microseconds()); got != c.want {
				t.Errorf("check %v after begin: got %v, want %v", c.after, got, c.want)
			}
		})
	}
}

// A replica whose clock is too far behind counts no attempt on a code that it cannot compare.
func TestRules_ClockBehindCountsNoAttempt(t *testing.T) {
	s, _ := begun(t, 1)
	next, valid, changed := testRules.Check(s, nil, nil, testNow-6*time.Second.Microseconds())
	if valid || changed || next.Codes[0].Attempts != 0 {
		t.Errorf("got valid %v, changed %v, attempts %d, want false, false, 0", valid, changed, next.Codes[0].Attempts)
	}
}

// A full list drops its oldest code of unknown outcome, once that is 30 s old, and no other code.
func TestRules_FullListDropsItsOldestUnknownAfter30s(t *testing.T) {
	s, sendIDs := begun(t, maxCodes)
	s = testRules.Confirm(s, sendIDs[0], nil, testNow)
	exactly := testNow + longestInFlight.Microseconds()
	if got, b, err := testRules.Begin(s, newSend(MAC{99}), exactly); !errors.Is(err, ErrSendInProgress) || b != (Begun{}) ||
		!slices.Equal(got.Codes, s.Codes) {
		t.Errorf("30 s after: got %+v, %v, want none, %v and the state unchanged", b, err, ErrSendInProgress)
	}
	got, _, err := testRules.Begin(s, newSend(MAC{99}), exactly+1)
	if err != nil || len(got.Codes) != maxCodes || got.Codes[0].SendID != sendIDs[0] || got.Codes[1].SendID != sendIDs[2] {
		t.Errorf("30 s and 1 µs after: got %v, %v, want the confirmed code kept and the oldest other one gone", got.Codes, err)
	}
}

func TestRules_FullListDropsExpiredCodesFirst(t *testing.T) {
	s, sendIDs := begun(t, maxCodes)
	s = testRules.Confirm(s, sendIDs[0], nil, testNow)
	later := testNow + testRules.CodeTTL.Microseconds()
	got, b, err := testRules.Begin(s, newSend(MAC{99}), later)
	if err != nil || len(got.Codes) != 1 || b.SendID != later || !b.Sole {
		t.Errorf("got %d codes, %+v, %v, want 1, the send ID %d, sole, nil", len(got.Codes), b, err, later)
	}
}

// Of sends whose outcome stays unknown the newest six count, beside the first code: the list has
// eight places, and the send that begins takes one of them.
func TestRules_FirstAndNewestSixOfUnknownOutcomeCount(t *testing.T) {
	const crashes = 12
	s, _ := begun(t, 1)
	now := testNow
	for i := range crashes { // one each half minute, each crashes
		now += longestInFlight.Microseconds() + 1
		s, _, _ = testRules.Begin(s, newSend(modelMAC(1+i)), now)
	}
	// One more send begins, and is definitely rejected.
	s, b, err := testRules.Begin(s, newSend(MAC{99}), now)
	if err != nil {
		t.Fatal(err)
	}
	s = testRules.Withdraw(s, b.SendID, now)
	for i := range 1 + crashes {
		if got, want := accepts(s, i, now), i == 0 || i > crashes-6; got != want {
			t.Errorf("code %d of %d: got live %v, want %v", i, crashes, got, want)
		}
	}
}

func TestRules_SoleIsTrueWithoutAnOlderCode(t *testing.T) {
	first, b, _ := testRules.Begin(State{}, newSend(modelMAC(0)), testNow)
	life := testRules.CodeTTL.Microseconds()
	for _, c := range []struct {
		name string
		s    State
		now  int64
		want bool
	}{
		{"a code is in flight", first, testNow, false},
		{"a code in its last microsecond", first, testNow + life - 1, false},
		{"a code of a clock that is ahead", first, testNow - time.Minute.Microseconds(), false},
		{"a code without attempts left under a lower limit", State{1, []Code{{SendID: 1, BegunAt: testNow, Attempts: 3}}, nil}, testNow, false},
		{"the code has expired", first, testNow + life, true},
		{"the code was used", State{LastSendID: first.LastSendID}, testNow, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, got, err := testRules.Begin(c.s, newSend(modelMAC(1)), c.now); got.Sole != c.want || err != nil {
				t.Errorf("got sole %v, %v, want %v", got.Sole, err, c.want)
			}
		})
	}
	if !b.Sole {
		t.Error("the first send: got sole false, want true")
	}
}

// This is the exact worst case of G1: a match sets the attempts of newer codes to zero, and
// at most seven older codes are in the list beside the newest.
func TestRules_NewestOfEightIsComparedAtMost8xTheLimit(t *testing.T) {
	s, _ := begun(t, maxCodes)
	newest := maxCodes - 1
	compared := 0
	check := func(macs []MAC) (valid bool) {
		if accepts(s, newest, testNow) {
			compared++
		}
		s, valid, _ = testRules.Check(s, macs, nil, testNow)
		return valid
	}
	for send := range maxCodes {
		for range testRules.AttemptLimit - 1 {
			check(nil)
		}
		if !check([]MAC{modelMAC(send)}) {
			t.Fatalf("the last attempt at code %d: got false, want true", send)
		}
	}
	if want := maxCodes * testRules.AttemptLimit; compared != want || len(s.Codes) != 0 {
		t.Errorf("got %d comparisons and %d codes left, want %d and 0", compared, len(s.Codes), want)
	}
}

// If two sends have the same digits, one check uses up both.
func TestRules_OneCheckUsesUpTwoEqualCodes(t *testing.T) {
	same := MAC{7}
	s, _, _ := testRules.Begin(State{}, newSend(same), testNow)
	s, _, _ = testRules.Begin(s, newSend(MAC{8}), testNow)
	s, _, _ = testRules.Begin(s, newSend(same), testNow)
	s, first, _ := testRules.Check(s, []MAC{same}, nil, testNow)
	_, second, _ := testRules.Check(s, []MAC{same}, nil, testNow)
	if !first || second {
		t.Errorf("two checks of the same digits: got %v and %v, want true and false", first, second)
	}
}

func TestRules_CheckWithoutALiveCodeChangesNothing(t *testing.T) {
	s, sendIDs := begun(t, 1)
	for name, state := range map[string]State{
		"a number that was never seen": {},
		"withdrawn":                    testRules.Withdraw(s, sendIDs[0], testNow),
		"expired":                      {LastSendID: s.LastSendID, Codes: []Code{{SendID: 1, MAC: modelMAC(0), BegunAt: testNow - testRules.CodeTTL.Microseconds()}}},
		"spent under a lower limit":    {LastSendID: s.LastSendID, Codes: []Code{{SendID: 1, MAC: modelMAC(0), BegunAt: testNow, Attempts: 3}}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, valid, changed := testRules.Check(state, []MAC{modelMAC(0)}, nil, testNow); valid || changed {
				t.Errorf("got valid %v, changed %v, want false, false", valid, changed)
			}
		})
	}
}

func TestRules_SendIDsIncreaseWithAnyClock(t *testing.T) {
	var s State
	last := int64(0)
	for _, now := range []int64{testNow, testNow, testNow - time.Hour.Microseconds(), testNow + 1, testNow + 1, 0} {
		var b Begun
		var err error
		if s, b, err = testRules.Begin(s, newSend(MAC{1}), now); err != nil || b.SendID <= last || s.LastSendID != b.SendID {
			t.Errorf("begin at %d: got send ID %d (last %d, %v), want more than %d", now, b.SendID, s.LastSendID, err, last)
		}
		last = b.SendID
	}
	if _, b, _ := testRules.Begin(State{}, newSend(MAC{1}), testNow+24*time.Hour.Microseconds()); b.SendID <= last {
		t.Errorf("a begin after the purge: got send ID %d, want more than %d", b.SendID, last)
	}
}

func TestDecodeState_InvalidBytesAreUnreadable(t *testing.T) {
	s, _ := begun(t, 2)
	good := s.encode()
	other := slices.Clone(good)
	other[0]++
	tooMany := slices.Clone(good)
	tooMany[9] = maxCodes + 1
	for name, stored := range map[string][]byte{
		"a format of a later version": other,
		"a truncated header":          good[:headerBytes-1],
		"a truncated code":            good[:len(good)-1],
		"a count without codes":       good[:headerBytes],
		"more codes than fit":         append(tooMany, make([]byte, 10*codeBytes)...),
		"a zero byte":                 {0},
	} {
		t.Run(name, func(t *testing.T) {
			if got, _, err := decodeState(stored); !errors.Is(err, ErrStateUnreadable) || got.LastSendID != 0 || got.Codes != nil {
				t.Errorf("got %v, %v, want the zero State, %v", got, err, ErrStateUnreadable)
			}
		})
	}
	if got, _, err := decodeRecord(nil); err != nil || got.LastSendID != 0 || len(got.Codes) != 0 {
		t.Errorf("no bytes: got %v, %v, want the zero State", got, err)
	}
}

func TestState_LargestFitsItsColumn(t *testing.T) {
	s, _ := begun(t, maxCodes)
	s.Keyed = make([]KeyedSend, maxKeyed)
	long := strings.Repeat("x", maxTextBytes)
	h := History{Accepted{1, 1, long}, Rejected{1, 1, SendLimited, long, long}, CodeEnd{1, 1, true, 1}}
	if got := len(encodeRecord(s, h)); got > MaxStateBytes {
		t.Errorf("got %d bytes, want at most %d", got, MaxStateBytes)
	}
}

func FuzzDecodeState(f *testing.F) {
	s := State{LastSendID: 5, Codes: []Code{{SendID: 5, Attempts: 2}}}
	f.Add(s.encode())
	f.Add(s.encode()[:20])
	f.Add([]byte{})
	f.Add([]byte{stateFormat, 0, 0, 0, 0, 0, 0, 0, 1, 255})
	f.Fuzz(func(t *testing.T, stored []byte) {
		s, h, err := decodeRecord(stored)
		if err != nil {
			if !errors.Is(err, ErrStateUnreadable) {
				t.Fatalf("got %v, want %v", err, ErrStateUnreadable)
			}
			return
		}
		again := s.encode()
		for i := range s.Codes { // the flag is written by position
			at := headerBytes + (i+1)*codeBytes - 1
			again[at] = again[at]&^firstFlag | stored[at]&firstFlag
		}
		if again := encodeRecord(s, h); len(stored) > 0 && len(again) > len(stored) {
			t.Fatalf("encoded the record again: got %d bytes, want at most %d", len(again), len(stored))
		}
		if len(stored) > 0 && (len(again) > len(stored) || !slices.Equal(again, stored[:len(again)])) {
			t.Fatalf("encoded again: got %x, want the beginning of %x", again, stored)
		}
	})
}
