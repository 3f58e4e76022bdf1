package verify

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func TestCheck_ReturnsTheResult(t *testing.T) {
	const right = "000001"
	match := func(after time.Duration, left int) Verification { return Verification{Match, after, left} }
	for _, c := range []struct {
		name  string
		setUp func(v *Verifier, m *fakeStore)
		typed string
		want  Verification
	}{
		{"never sent", func(*Verifier, *fakeStore) {}, right, Verification{}},
		{"the right code", func(v *Verifier, _ *fakeStore) { send(v); time.Sleep(7 * time.Second) }, right, match(7*time.Second, 0)},
		{"another code", func(v *Verifier, _ *fakeStore) { send(v) }, wrongGuess, Verification{Mismatch, 0, 2}},
		{"an older code", func(v *Verifier, _ *fakeStore) { send(v); send(v) }, right, Verification{Mismatch, 0, 2}},
		{"the last attempt", func(v *Verifier, _ *fakeStore) { send(v); guess(v, 2) }, wrongGuess, Verification{Result: Mismatch}},
		{"used", func(v *Verifier, _ *fakeStore) { send(v); v.Check(context.Background(), testNumber, right, "") }, right, Verification{}},
		{"expired", func(v *Verifier, _ *fakeStore) { send(v); time.Sleep(testRules.CodeTTL) }, right, Verification{Result: Expired}},
		{"spent", func(v *Verifier, _ *fakeStore) { send(v); guess(v, 3) }, right, Verification{Result: Exhausted}},
		{"spent, and its life is over", func(v *Verifier, _ *fakeStore) { send(v); guess(v, 3); time.Sleep(testRules.CodeTTL) }, right, Verification{Result: Expired}},
		{"spent by a limit that was lowered", func(v *Verifier, _ *fakeStore) { send(v); guess(v, 2); v.Rules.AttemptLimit = 2 }, right, Verification{Result: Exhausted}},
		{"spent, then a rejected send", func(v *Verifier, _ *fakeStore) {
			send(v)
			guess(v, 3)
			v.Sender = failWith(&SendError{Kind: SendLimited})
			send(v)
		}, right, Verification{Result: Exhausted}},
		{"rejected", func(v *Verifier, _ *fakeStore) { v.Sender = failWith(&SendError{Kind: SendLimited}); send(v) }, right, Verification{}},
		{"expired, then a rejected send", func(v *Verifier, _ *fakeStore) {
			send(v)
			time.Sleep(testRules.CodeTTL)
			v.Sender = failWith(&SendError{Kind: SendLimited})
			send(v)
		}, right, Verification{Result: Expired}},
		{"spent, and a newer one expired", func(v *Verifier, m *fakeStore) {
			send(v)
			guess(v, 2)
			began(t, m, "777777")
			guess(v, 1)
			time.Sleep(testRules.CodeTTL)
		}, right, Verification{Result: Expired}},
		{"begun by a replica whose clock is ahead", func(v *Verifier, _ *fakeStore) {
			send(v)
			v.Now = func() time.Time { return time.Now().Add(-4 * time.Second) }
		}, right, Verification{Result: Match}},
		{"an older live code", func(v *Verifier, m *fakeStore) {
			send(v)
			time.Sleep(time.Second)
			began(t, m, "777777")
		}, right, match(time.Second, 3)},
		{"spent, and another version wrote since", func(v *Verifier, m *fakeStore) {
			send(v)
			guess(v, 3)
			s, _, _ := decodeRecord(m.record.State)
			m.record.State = s.encode()
		}, right, Verification{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				v := newVerifier(&m, accept)
				c.setUp(v, &m)
				got, err := v.Check(t.Context(), testNumber, c.typed, "")
				got.After = got.After.Truncate(10 * time.Millisecond) // without the back-off after a conflict
				if got != c.want || err != nil {
					t.Errorf("got %v after %v, %v, want %v after %v", got.Result, got.After, err, c.want.Result, c.want.After)
				}
			})
		})
	}
}

// send sends, and waits until a rejected code is withdrawn.
func send(v *Verifier) {
	v.Send(context.Background(), SendRequest{Number: testNumber})
	synctest.Wait()
}

func guess(v *Verifier, times int) {
	for range times {
		v.Check(context.Background(), testNumber, wrongGuess, "")
	}
}

func TestInspect_ReturnsTheLastSendsAndTheCodesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) { return Receipt{"biz-1", "request-1"}, nil })
		inspect := func(step string, want History) {
			t.Helper()
			v.Wait(t.Context())
			got, err := v.Inspect(t.Context(), testNumber)
			if err != nil || got.History != want {
				t.Errorf("%s: got %+v, %v, want %+v", step, got.History, err, want)
			}
			if got.LastSendID != 0 && !got.BegunAt.Equal(time.UnixMicro(m.record.BegunAt)) {
				t.Errorf("%s: got begun at %v, want the record's", step, got.BegunAt)
			}
		}
		inspect("never sent", History{})
		send(v)
		first := Accepted{m.state().LastSendID, now(), "biz-1"}
		inspect("accepted", History{Accepted: first})
		guess(v, 1)
		inspect("a wrong code, which only the attempts left show", History{Accepted: first})
		time.Sleep(time.Second)
		v.Check(t.Context(), testNumber, "000001", "")
		end := CodeEnd{SendID: first.SendID, At: now(), Used: true, Attempts: 2}
		inspect("used", History{Accepted: first, End: end})
		v.Sender = failWith(&SendError{Kind: SendLimited, ProviderCode: "isv.BUSINESS_LIMIT_CONTROL", RequestID: "request-2"})
		send(v)
		second := Rejected{m.state().LastSendID, now(), SendLimited, "isv.BUSINESS_LIMIT_CONTROL", "request-2"}
		inspect("limited: the send before it stays", History{first, second, end})
		v.Sender = failWith(&SendError{Kind: SendTimedOut})
		time.Sleep(time.Second)
		send(v)
		inspect("a lost reply changes nothing", History{first, second, end})
		guess(v, 3)
		inspect("spent", History{first, second, CodeEnd{SendID: m.state().LastSendID, At: now(), Attempts: 3}})
	})
}

func TestHistory_LateResultKeepsThatOfALaterSend(t *testing.T) {
	var history History
	history.recordAccepted(Accepted{2, 4, "second"})
	history.recordRejected(2, 4, &SendError{ProviderCode: "second"})
	before := history
	history.recordAccepted(Accepted{1, 5, "first"})
	history.recordRejected(1, 5, &SendError{ProviderCode: "first"})
	if history != before {
		t.Errorf("got %+v, want %+v", history, before)
	}
}

func TestHistory_CostsNoStoreOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		send(v)
		v.Check(t.Context(), testNumber, "000001", "")
		if swaps := len(m.history); swaps != 2 {
			t.Errorf("got %d swaps for a send and a check, want 2: begin and check", swaps)
		}
		v.Check(t.Context(), testNumber, "000001", "")
		if swaps := len(m.history); swaps != 2 {
			t.Errorf("got %d swaps after a check that found no code, want 2 as before", swaps)
		}
	})
}

func anyHistory() *rapid.Generator[History] {
	return rapid.Custom(func(t *rapid.T) History {
		text := rapid.StringMatching(`[A-Za-z0-9._-]{0,64}`)
		integer := func(name string) int64 { return rapid.Int64().Draw(t, name) }
		var history History
		if rapid.Bool().Draw(t, "accepted") {
			history.Accepted = Accepted{integer("sendID"), integer("at"), text.Draw(t, "biz id")}
		}
		if rapid.Bool().Draw(t, "rejected") {
			kind := SendKind(rapid.IntRange(int(SendUnknown), int(SendBadRequest)).Draw(t, "kind"))
			history.Rejected = Rejected{integer("sendID"), integer("at"), kind, text.Draw(t, "code"), text.Draw(t, "request id")}
		}
		if rapid.Bool().Draw(t, "ended") {
			history.End = CodeEnd{
				integer("sendID"), integer("at"), rapid.Bool().Draw(t, "used"),
				uint8(rapid.IntRange(0, MaxAttemptLimit).Draw(t, "attempts")),
			}
		}
		return history
	})
}

func anyKeyed() *rapid.Generator[[]KeyedSend] {
	return rapid.Custom(func(t *rapid.T) (keyed []KeyedSend) {
		for range rapid.IntRange(0, maxKeyed).Draw(t, "keyed sends") {
			k := KeyedSend{
				SendID: rapid.Int64().Draw(t, "send ID"), BegunAt: rapid.Int64().Draw(t, "begun at"),
				Status: keyedStatus(rapid.IntRange(0, int(keyedTimedOut)).Draw(t, "status")),
			}
			copy(k.Tag.ID[:], rapid.SliceOfN(rapid.Byte(), 12, 12).Draw(t, "ID"))
			copy(k.Tag.Request[:], rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "request"))
			keyed = append(keyed, k)
		}
		return keyed
	})
}

func TestHistory_RoundTripsBesideTheState(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, want := anyState().Draw(t, "state"), anyHistory().Draw(t, "history")
		s.Keyed = anyKeyed().Draw(t, "keyed")
		stored := encodeRecord(s, want)
		if len(stored) > MaxStateBytes {
			t.Fatalf("got %d bytes, want at most %d", len(stored), MaxStateBytes)
		}
		got, h, err := decodeRecord(append(stored, "of a later version"...))
		if err != nil || h != want || !slices.Equal(got.Keyed, s.Keyed) {
			t.Fatalf("got %+v, %+v, %v, want %+v, %+v", h, got.Keyed, err, want, s.Keyed)
		}
		cut := rapid.IntRange(len(s.encode()), len(stored)).Draw(t, "cut to")
		if cut == len(stored) {
			return
		}
		got, h, err = decodeRecord(stored[:cut])
		if err != nil || got.LastSendID != s.LastSendID || !slices.Equal(got.Codes, s.Codes) {
			t.Fatalf("truncated to %d of %d bytes: got %v, %v, want the codes of %v", cut, len(stored), got, err, s)
		}
		wantHistory := want
		if cut < len(want.appendTo(s.encode())) {
			wantHistory = History{}
		}
		if h != wantHistory || got.Keyed != nil {
			t.Fatalf("truncated to %d of %d bytes: got %+v, %+v, want %+v and no keyed sends", cut, len(stored), h, got.Keyed, wantHistory)
		}
	})
}

func TestHistory_TruncatesLongTexts(t *testing.T) {
	long := strings.Repeat("x", 300)
	stored := encodeRecord(State{}, History{Accepted{1, 1, long}, Rejected{1, 1, SendLimited, long, long}, CodeEnd{1, 1, true, 1}})
	if _, got, err := decodeRecord(stored); err != nil || got.Accepted.BizID != long[:maxTextBytes] {
		t.Errorf("got %q, %v, want the first %d bytes of each text", got.Accepted.BizID, err, maxTextBytes)
	}
}

func TestCheckResult_HasItsName(t *testing.T) {
	for o, want := range map[CheckResult]string{
		NoCode: "no_code", Match: "match", Mismatch: "mismatch", Expired: "expired",
		Exhausted: "exhausted", OtherContext: "other_context",
	} {
		if got := o.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
