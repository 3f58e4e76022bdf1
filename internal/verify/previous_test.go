package verify

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// The previous release knows neither contexts nor idempotency keys. This file has its transitions
// and its codec, to run both releases on one table. Its writes drop the keyed sends.

func previousBegin(r Rules, s State, n NewSend, now int64) (State, Begun, error) {
	codes := r.unexpired(s.Codes, now)
	if len(codes) >= maxCodes {
		later := slices.IndexFunc(codes[1:], func(c Code) bool { return c.BegunAt < now-longestInFlight.Microseconds() })
		if later < 0 {
			return s, Begun{}, ErrSendInProgress
		}
		codes = slices.Delete(codes, 1+later, 2+later)
	}
	b := Begun{SendID: max(s.LastSendID+1, now), At: now, Sole: len(codes) == 0}
	return State{b.SendID, append(codes, Code{SendID: b.SendID, MAC: n.MAC, BegunAt: now}), nil}, b, nil
}

func previousConfirm(r Rules, s State, sendID, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID < sendID })
	return State{s.LastSendID, codes, nil}
}

func previousWithdraw(r Rules, s State, sendID, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID == sendID })
	return State{s.LastSendID, codes, nil}
}

func previousCheck(r Rules, s State, macs []MAC, now int64) (next State, valid, changed bool) {
	codes := r.unexpired(s.Codes, now)
	match := -1
	for i := range codes {
		if !r.cannotMatch(codes[i], now) {
			changed = true
			codes[i].Attempts++
			if slices.Contains(macs, codes[i].MAC) {
				match = i
			}
		}
	}
	switch {
	case !changed:
		return s, false, false
	case match >= 0:
		codes = codes[match+1:]
		for i := range codes {
			codes[i].Attempts = 0
		}
	default:
		codes = slices.DeleteFunc(codes, func(c Code) bool { return int(c.Attempts) >= r.AttemptLimit })
	}
	return State{s.LastSendID, codes, nil}, match >= 0, true
}

func previousTransitions(r Rules) *transitions {
	return &transitions{
		begin:    func(s State, n NewSend, now int64) (State, Begun, error) { return previousBegin(r, s, n, now) },
		confirm:  func(s State, begun Code, now int64) State { return previousConfirm(r, s, begun.SendID, now) },
		withdraw: func(s State, begun Code, now int64) State { return previousWithdraw(r, s, begun.SendID, now) },
		check:    func(s State, macs []MAC, now int64) (State, bool, bool) { return previousCheck(r, s, macs, now) },
	}
}

// In a rolling upgrade, or when it is taken back, replicas of both releases use one table. Calls
// without a context keep their guarantees. A code with a context is accepted only in it, and once;
// the previous release may drop it or count attempts on it.
func TestModel_PreviousReleaseBesideThisOneIsHarmless(t *testing.T) {
	for name, w := range map[string]world{
		"no context, three sends":                 {limit: 1, sends: 3, ticks: 1},
		"no context, two sends, the list is full": {limit: 2, sends: 2, ticks: 1, storm: true},
		"two contexts, two sends":                 {limit: 2, sends: 2, ticks: 2, contexts: 2, lossy: true},
		"two contexts, three sends":               {limit: 1, sends: 3, contexts: 2, lossy: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			beside := transitionsOf(w.rules())
			beside.older = previousTransitions(w.rules())
			seen := explore(w, beside)
			if seen.wrong != nil {
				t.Fatalf("got %v", seen)
			}
			t.Logf("no violation in %v", seen)
		})
	}
}

// The transitions of the previous release are those of this one if no call has a context or a key.
func TestRules_WithoutContextAndKeyAreThePreviousOnes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := State{LastSendID: modelZero}
		for i := range rapid.IntRange(0, maxCodes).Draw(t, "codes") {
			begunAt := modelZero - rapid.Int64Range(0, 2*modelTTL.Microseconds()).Draw(t, "age")
			s.Codes = append(s.Codes, Code{int64(i), modelMAC(i), begunAt, uint8(rapid.IntRange(0, 3).Draw(t, "attempts"))})
		}
		same := func(call string, got, want State) {
			t.Helper()
			if got.LastSendID != want.LastSendID || !slices.Equal(got.Codes, want.Codes) || len(got.Keyed) > 0 {
				t.Fatalf("%s: got %v, want %v", call, got, want)
			}
		}
		r, sendID, macs := testRules, int64(rapid.IntRange(0, maxCodes).Draw(t, "send")), []MAC{modelMAC(rapid.IntRange(0, 9).Draw(t, "typed"))}
		got, b, err := r.Begin(s, newSend(modelMAC(99)), modelZero)
		want, wantB, wantErr := previousBegin(r, s, newSend(modelMAC(99)), modelZero)
		if same("begin", got, want); b != wantB || !errors.Is(err, wantErr) {
			t.Fatalf("begin: got %v, %v, want %v, %v", b, err, wantB, wantErr)
		}
		same("confirm", r.Confirm(s, sendID, nil, modelZero), previousConfirm(r, s, sendID, modelZero))
		same("withdraw", r.Withdraw(s, sendID, modelZero), previousWithdraw(r, s, sendID, modelZero))
		got, valid, changed := r.Check(s, macs, nil, modelZero)
		want, wantValid, wantChanged := previousCheck(r, s, macs, modelZero)
		if same("check", got, want); valid != wantValid || changed != wantChanged {
			t.Fatalf("check: got %v, %v, want %v, %v", valid, changed, wantValid, wantChanged)
		}
	})
}

// previousDecode is the decoder of the previous release.
func previousDecode(b []byte) (s State, h History, err error) {
	if len(b) < 10 || b[0] != 1 || b[9] > 8 || len(b) < 10+int(b[9])*49 {
		return s, h, ErrStateUnreadable
	}
	s.LastSendID = int64(binary.BigEndian.Uint64(b[1:]))
	n := int(b[9])
	b = b[10:]
	for range n {
		s.Codes = append(s.Codes, Code{
			int64(binary.BigEndian.Uint64(b)), MAC(b[8:40]), int64(binary.BigEndian.Uint64(b[40:])), b[48] &^ 0x80,
		})
		b = b[49:]
	}
	if len(b) < 2 || b[0] != 1 {
		return s, h, nil
	}
	parts, b, ok := b[1], b[2:], true
	take := func(n int) []byte {
		if len(b) < n {
			ok = false
			return make([]byte, n)
		}
		head := b[:n]
		b = b[n:]
		return head
	}
	integer := func() int64 { return int64(binary.BigEndian.Uint64(take(8))) }
	text := func() string { return string(take(int(take(1)[0]))) }
	if parts&1 != 0 {
		h.Accepted = Accepted{integer(), integer(), text()}
	}
	if parts&2 != 0 {
		h.Rejected = Rejected{integer(), integer(), SendKind(take(1)[0]), text(), text()}
	}
	if parts&4 != 0 {
		h.End = CodeEnd{SendID: integer(), At: integer()}
		flags := take(1)[0]
		h.End.Used, h.End.Attempts = flags&0x80 != 0, flags&^0x80
	}
	if !ok {
		return s, History{}, nil
	}
	return s, h, nil
}

// previousEncode is the encoder of the previous release. The form of the History is unchanged.
func previousEncode(s State, h History) []byte {
	b := binary.BigEndian.AppendUint64([]byte{1}, uint64(s.LastSendID))
	b = append(b, byte(len(s.Codes)))
	for i, c := range s.Codes {
		b = binary.BigEndian.AppendUint64(b, uint64(c.SendID))
		b = append(b, c.MAC[:]...)
		b = binary.BigEndian.AppendUint64(b, uint64(c.BegunAt))
		if i == 0 {
			c.Attempts |= 0x80
		}
		b = append(b, c.Attempts)
	}
	return h.appendTo(b)
}

func TestStored_PreviousReleaseKeepsCodesAndHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, h := anyState().Draw(t, "state"), anyHistory().Draw(t, "history")
		s.Keyed = anyKeyed().Draw(t, "keyed")
		read, readHistory, err := previousDecode(encodeRecord(s, h))
		if err != nil || read.LastSendID != s.LastSendID || !slices.Equal(read.Codes, s.Codes) || readHistory != h {
			t.Fatalf("read by the previous release: got %v, %+v, %v, want %v, %+v", read, readHistory, err, s, h)
		}
		back, backHistory, err := decodeRecord(previousEncode(read, readHistory))
		if err != nil || back.LastSendID != s.LastSendID || !slices.Equal(back.Codes, s.Codes) || backHistory != h || back.Keyed != nil {
			t.Fatalf("written by the previous release: got %v, %+v, %v, want %v, %+v without keys", back, backHistory, err, s, h)
		}
	})
}

func TestStored_WithoutContextAndKeyHasThePreviousBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, h := anyState().Draw(t, "state"), anyHistory().Draw(t, "history")
		for i := range s.Codes {
			s.Codes[i].MAC[0] = 1 // no context
		}
		if got, want := encodeRecord(s, h), previousEncode(s, h); !slices.Equal(got, want) {
			t.Fatalf("got %x, want %x", got, want)
		}
	})
}
