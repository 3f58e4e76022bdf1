package verify

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestCheck_CodeCountsOnlyInItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		send := func(context string) {
			t.Helper()
			if _, err := v.Send(t.Context(), SendRequest{Number: testNumber, Context: context}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		check := func(code, context string, want Verification) {
			t.Helper()
			if got, err := v.Check(t.Context(), testNumber, code, context); got != want || err != nil {
				t.Errorf("check %s in %q: got %+v, %v, want %+v", code, context, got, err, want)
			}
		}
		other := Verification{Result: OtherContext}
		send("login") // 000001
		check("000001", "", other)
		check("000001", "reset", other)
		check("wrong", "reset", other)
		send("")      // 000002
		send("reset") // 000003
		check("000002", "login", Verification{Mismatch, 0, 2})
		check("000001", "", Verification{Mismatch, 0, 2})
		check("000003", "reset", Verification{Match, time.Second, 0})
		check("000003", "reset", other)
		check("000002", "", Verification{Match, 2 * time.Second, 0})
		send("login") // 000004 replaces 000001
		check("000001", "login", Verification{Mismatch, 0, 2})
		check("000004", "login", Verification{Match, time.Second, 0})
		check("000004", "login", Verification{Result: NoCode})
	})
}

// The attempts of a code are counted in its context, so that a person who does not know the context
// cannot use them up.
func TestCheck_AttemptsAreCountedForEachContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		for _, context := range []string{"", "session"} {
			v.Send(t.Context(), SendRequest{Number: testNumber, Context: context})
		}
		swaps := m.swaps()
		for _, context := range []string{"", "another", "", "another", "", "another", ""} {
			v.Check(t.Context(), testNumber, wrongGuess, context)
		}
		if got := m.swaps() - swaps; got != testRules.AttemptLimit {
			t.Errorf("got %d swaps, want %d: those without a context", got, testRules.AttemptLimit)
		}
		if got, err := v.Check(t.Context(), testNumber, "000002", "session"); got.Result != Match || err != nil {
			t.Errorf("the code of the session: got %v, %v, want a match", got.Result, err)
		}
	})
}

func TestMAC_OfAContextHidesItAndDiffers(t *testing.T) {
	k := RandomKeys()
	plain, login, reset := k.sign(testNumber, "123456", ""), k.sign(testNumber, "123456", "login"), k.sign(testNumber, "123456", "reset")
	if plain.context() != (ContextTag{}) || login.context() != k.contextTags(testNumber, "login")[0] || login.context() == reset.context() {
		t.Errorf("got tags %x, %x, %x, want none and two", plain.context(), login.context(), reset.context())
	}
	if slices.Equal(login[16:], reset[16:]) || slices.Equal(login[16:], plain[:16]) {
		t.Error("got one HMAC for one code in two contexts, want two")
	}
	if k.contextTags(testNumber+"9", "login")[0] == login.context() {
		t.Error("got one tag for one context of two numbers, want two")
	}
	if again := k.sign(testNumber, "654321", "login"); again.context() != login.context() || slices.Equal(again[16:], login[16:]) {
		t.Error("another code: got another tag, or the same HMAC")
	}
}

func idsOf(s State) (ids []int64) {
	for _, c := range s.Codes {
		ids = append(ids, c.SendID)
	}
	return ids
}

// testContext returns the tags of a context in the tests of Rules.
func testContext(i int) ContextTags { return ContextTags{{byte(i), 1}} }

func inContext(i int) NewSend {
	m := MAC{16: byte(i + 1)}
	copy(m[zeroBytes:], testContext(i)[0][:])
	return NewSend{MAC: m, Context: testContext(i)}
}

func TestRules_FirstCodeOfEachContextIsKept(t *testing.T) {
	var s State
	var err error
	for i := range maxCodes {
		if s, _, err = testRules.Begin(s, inContext(i), testNow+int64(i)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name       string
		now        int64
		inProgress bool
		retryAfter time.Duration
	}{
		{"in flight", testNow + longestInFlight.Microseconds(), true, 0},
		{"the newest in flight", testNow + int64(maxCodes-1) + longestInFlight.Microseconds(), true, 0},
		{
			"none in flight", testNow + int64(maxCodes) + longestInFlight.Microseconds(), false,
			testRules.CodeTTL - longestInFlight - maxCodes*time.Microsecond,
		},
	} {
		for _, n := range []NewSend{newSend(MAC{99}), inContext(0), inContext(9)} {
			got, _, err := testRules.Begin(s, n, c.now)
			var full *FullError
			if c.inProgress != errors.Is(err, ErrSendInProgress) || !slices.Equal(got.Codes, s.Codes) ||
				!c.inProgress && (!errors.As(err, &full) || full.RetryAfter != c.retryAfter) {
				t.Errorf("%s: got %v %+v and %d codes, want in progress %v, %v", c.name, err, full, len(got.Codes), c.inProgress, c.retryAfter)
			}
		}
	}
	later := testNow + testRules.CodeTTL.Microseconds()
	if s, _, err = testRules.Begin(s, inContext(9), later); err != nil || len(s.Codes) != maxCodes || s.Codes[0].MAC != inContext(1).MAC {
		t.Errorf("when the first has expired: got %d codes, %v, want its place taken", len(s.Codes), err)
	}
}

// The oldest code that is not the first of its context gives its place.
func TestRules_FullListDropsALaterCodeOfAContext(t *testing.T) {
	var s State
	var sendIDs []int64
	for i := range maxCodes {
		context := []int{0, 1, 0, 1, 1, 2, 2, 0}[i]
		n := inContext(context)
		n.MAC[31] = byte(i)
		var b Begun
		s, b, _ = testRules.Begin(s, n, testNow)
		sendIDs = append(sendIDs, b.SendID)
	}
	want := slices.Clone(sendIDs)
	now := testNow + longestInFlight.Microseconds() + 1
	for _, drop := range []int{2, 3, 4, 6, 7} {
		var b Begun
		s, b, _ = testRules.Begin(s, inContext(3), now)
		want = append(slices.DeleteFunc(slices.Clone(want), func(id int64) bool { return id == sendIDs[drop] }), b.SendID)
		if got := idsOf(s); !slices.Equal(got, want) {
			t.Fatalf("got codes %v, want %v: code %d gone", got, want, drop)
		}
	}
	if _, _, err := testRules.Begin(s, inContext(4), now); !errors.Is(err, ErrSendInProgress) {
		t.Errorf("with firsts and codes in flight alone: got %v, want %v", err, ErrSendInProgress)
	}
}

func TestSend_ContextsDoNotConfirmEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		for i := range 3 {
			if _, err := v.Send(t.Context(), SendRequest{Number: testNumber, Context: fmt.Sprint(i)}); err != nil || m.swaps() != i+1 {
				t.Errorf("send %d: got %v and %d swaps, want one for each: the code is sole in its context", i, err, m.swaps())
			}
		}
	})
}
