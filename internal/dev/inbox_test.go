package dev

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

func newInbox() *Inbox {
	return &Inbox{Rules: verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute}}
}

// arrive puts a message into the inbox.
func arrive(t *testing.T, b *Inbox, n verify.Number, sendID int64, code string) {
	t.Helper()
	if _, err := b.Send(t.Context(), verify.Message{Number: n, Code: code, SendID: sendID}); err != nil {
		t.Fatal(err)
	}
}

func TestAwaitMessages_WakesForItsNumberOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newInbox()
		got := make(chan []Message, 1)
		go func() { got <- b.awaitMessages(t.Context(), "+8618600000001") }()
		synctest.Wait()
		arrive(t, b, "+8618600000002", 1, "111111")
		synctest.Wait()
		select {
		case m := <-got:
			t.Fatalf("after another number's message: got %v; want awaitMessages to wait", m)
		default:
		}
		arrive(t, b, "+8618600000001", 1, "222222")
		if m := <-got; len(m) != 1 || m[0].Code != "222222" {
			t.Errorf("got %v; want one message with code 222222", m)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if m := b.awaitMessages(ctx, "+8618600000003"); m == nil || len(m) != 0 {
			t.Errorf("without a message: got %v; want an empty list", m)
		}
	})
}

func TestInbox_KeepsTheLastThousandMessages(t *testing.T) {
	b := newInbox()
	for i := range int64(inboxSize + 5) {
		arrive(t, b, "+8618600000001", i, fmt.Sprintf("%06d", i))
	}
	m := b.Messages("")
	if len(m) != inboxSize || m[0].Code != "001004" || m[inboxSize-1].Code != "000005" {
		t.Errorf("got %d, from %s to %s; want 1000, from 001004 to 000005", len(m), m[0].Code, m[len(m)-1].Code)
	}
}

func TestSince_ReturnsTheChanges(t *testing.T) {
	b := newInbox()
	arrive(t, b, "+8618600000001", 1, "111111")
	arrive(t, b, "+8618600000002", 1, "222222")
	at, _ := b.since("", -1)
	ids := func(u changes) (ids []int64) {
		for _, m := range u.Messages {
			ids = append(ids, m.ID)
		}
		return ids
	}
	if !at.Whole || !slices.Equal(ids(at), []int64{2, 1}) {
		t.Fatalf("first: got %+v; want the whole inbox", at)
	}
	step := func(name string, change func(), whole bool, want ...int64) {
		t.Helper()
		_, changed := b.since("", at.Revision)
		change()
		select {
		case <-changed:
		default:
			t.Errorf("%s: got no wake-up; want one", name)
		}
		at, _ = b.since("", at.Revision)
		if at.Whole != whole || !slices.Equal(ids(at), want) {
			t.Errorf("%s: got whole %v, %v; want %v, %v", name, at.Whole, ids(at), whole, want)
		}
	}
	seen := verify.Inspection{LastSendID: 1, Live: []verify.CodeStatus{{
		SendID: 1, Expires: time.Now().Add(time.Minute), AttemptsLeft: 1,
		Accepted: true,
	}}}
	step("a new state", func() { b.updateStates("+8618600000001", "", seen) }, false, 1)
	step("a message", func() { arrive(t, b, "+8618600000003", 1, "333333") }, false, 3)
	step("a failure", func() { b.SetFailure(Failure{Kind: "timeout"}) }, false)
	if !slices.Equal(at.Failures, []Failure{{Kind: "timeout"}}) {
		t.Errorf("failures: got %v; want one timeout", at.Failures)
	}
	step("the end of the failure", func() { b.clearFailure("") }, false)
	step("a deletion", func() { b.delete("+8618600000002") }, true, 3, 1)
	step("a message after the deletion", func() { arrive(t, b, "+8618600000004", 1, "444444") }, false, 4)
	_, changed := b.since("", at.Revision)
	b.updateStates("+8618600000001", "", seen)
	select {
	case <-changed:
		t.Error("an unchanged state: got a wake-up; want none")
	default:
	}
}

func TestUpdateStates_FollowTheNumbersState(t *testing.T) {
	const number = "+8618600000001"
	expires := time.Now().Add(time.Minute)
	live := func(sendID int64, left int) verify.CodeStatus {
		return verify.CodeStatus{SendID: sendID, Expires: expires, AttemptsLeft: left, Accepted: true}
	}
	unconfirmed := verify.CodeStatus{SendID: 3, Expires: expires, AttemptsLeft: 1}
	for _, c := range []struct {
		name  string
		used  string
		alive []verify.CodeStatus
		want  []codeState // of the three, oldest first
	}{
		{"all live", "", []verify.CodeStatus{live(1, 3), live(2, 3), live(3, 3)}, []codeState{codeLive, codeLive, codeLive}},
		{"a newer code is confirmed", "", []verify.CodeStatus{live(3, 3)}, []codeState{codeReplaced, codeReplaced, codeLive}},
		{"one code was used", "000002", []verify.CodeStatus{live(3, 3)}, []codeState{codeReplaced, codeUsed, codeLive}},
		{"the newest code was used", "000003", nil, []codeState{codeReplaced, codeReplaced, codeUsed}},
		{"no code is left", "", nil, []codeState{codeExhausted, codeExhausted, codeExhausted}},
		{"older codes are exhausted beside one of unknown outcome", "", []verify.CodeStatus{unconfirmed}, []codeState{codeExhausted, codeExhausted, codeLive}},
	} {
		b := newInbox()
		for i := range int64(3) {
			arrive(t, b, number, i+1, fmt.Sprintf("%06d", i+1))
		}
		arrive(t, b, "+8618600000002", 1, "000002") // another number: never changes
		b.updateStates(number, c.used, verify.Inspection{LastSendID: 3, Live: c.alive})
		check := func(when string) {
			t.Helper()
			u, _ := b.since("", -1)
			var got []codeState
			for _, m := range slices.Backward(u.Messages[1:]) {
				got = append(got, m.State)
			}
			if !slices.Equal(got, c.want) || u.Messages[0].State != codeLive {
				t.Errorf("%s, %s: got %v and %v; want %v and live", c.name, when, got, u.Messages[0].State, c.want)
			}
		}
		check("at once")
		b.updateStates(number, "", verify.Inspection{LastSendID: 3})
		for i, s := range c.want {
			if s == codeLive {
				c.want[i] = codeExhausted
			}
		}
		check("later, with the final states kept")
	}
}

func TestInbox_MessageIsLiveUntilMoreIsKnown(t *testing.T) {
	const number = "+8618600000001"
	b := newInbox()
	arrive(t, b, number, 7, "111111")
	tracked := func() trackedMessage {
		u, _ := b.since("", -1)
		return u.Messages[0]
	}
	if m := tracked(); m.State != codeLive || m.AttemptsLeft != 3 || time.Until(m.Expires).Round(time.Minute) != 10*time.Minute {
		t.Errorf("at arrival: got %+v; want live, 3 attempts, 10 minutes", m)
	}
	b.updateStates(number, "", verify.Inspection{LastSendID: 6}) // read before this send began
	if m := tracked(); m.State != codeLive || m.AttemptsLeft != 3 {
		t.Errorf("after a state from before the send: got %+v; want it live with 3 attempts", m)
	}
	expires := time.Now().Add(-time.Second)
	b.updateStates(number, "", verify.Inspection{LastSendID: 7, Live: []verify.CodeStatus{{SendID: 7, Expires: expires, AttemptsLeft: 2}}})
	if m := tracked(); m.AttemptsLeft != 2 || !m.Expires.Equal(expires) {
		t.Errorf("after a live state: got %+v; want its attempts and expiry", m)
	}
	b.updateStates(number, "", verify.Inspection{LastSendID: 7})
	if m := tracked(); m.State != codeLive {
		t.Errorf("gone after its expiry: got %v; want live, which the page shows as expired", m.State)
	}
}

func TestUpdateStates_MarkTheNewestOfEqualCodesUsed(t *testing.T) {
	b := newInbox()
	arrive(t, b, "+8618600000001", 1, "111111")
	arrive(t, b, "+8618600000001", 2, "111111")
	b.updateStates("+8618600000001", "111111", verify.Inspection{LastSendID: 2})
	if u, _ := b.since("", -1); u.Messages[0].State != codeUsed || u.Messages[1].State != codeReplaced {
		t.Errorf("got %v, %v; want used, replaced", u.Messages[0].State, u.Messages[1].State)
	}
}

func TestUpdateStates_UsedReplacesAnEarlierState(t *testing.T) {
	b := newInbox()
	arrive(t, b, "+8618600000001", 1, "111111")
	b.updateStates("+8618600000001", "", verify.Inspection{LastSendID: 1}) // another call read the state before Valid returned
	b.updateStates("+8618600000001", "111111", verify.Inspection{LastSendID: 1})
	if u, _ := b.since("", -1); u.Messages[0].State != codeUsed {
		t.Errorf("got %v; want used", u.Messages[0].State)
	}
}

func TestParseFailure_ReadsKindAndTimes(t *testing.T) {
	for text, want := range map[string]Failure{
		"limit_day": {Kind: "limit_day"}, "timeout:3": {Kind: "timeout", Times: 3}, "no_balance:1000": {
			Kind:  "no_balance",
			Times: 1000,
		}, "none": {Kind: "none"},
	} {
		b := newInbox()
		if err := b.SetFailure(ParseFailure(text)); err != nil || !slices.Equal(b.Failures(), []Failure{want}) {
			t.Errorf("%s: got %v, %v; want %v", text, b.Failures(), err, want)
		}
	}
	for _, text := range []string{"", "limit", "timeout:", "timeout:0", "timeout:-1", "timeout:1001", "timeout:x", "timeout:1:2"} {
		b := newInbox()
		if err := b.SetFailure(ParseFailure(text)); err == nil {
			t.Errorf("%q: got %v; want an error", text, b.Failures())
		}
	}
	b := newInbox()
	for i := range inboxSize {
		if err := b.SetFailure(Failure{Kind: "timeout", PhoneNumber: verify.Number(fmt.Sprint(i))}); err != nil {
			t.Fatal(err)
		}
	}
	if b.SetFailure(Failure{Kind: "timeout"}) == nil || len(b.Failures()) != inboxSize {
		t.Errorf("one failure more than %d: got %d failures; want an error", inboxSize, len(b.Failures()))
	}
}
