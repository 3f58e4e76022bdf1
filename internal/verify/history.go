package verify

import (
	"encoding/binary"
	"slices"
	"time"
)

// A History holds the last events of a number, for the operator. It is written by the
// swaps that store the State, so it costs no further write, and no rule depends on it. A
// version of the service that does not know it drops it.
type History struct {
	Accepted Accepted // the last send that the provider accepted
	Rejected Rejected // the last send that was not sent
	End      CodeEnd  // of the last code that was used or exhausted
}

// Accepted is a send that the provider accepted. It is zero if there was none.
type Accepted struct {
	SendID int64
	At     int64 // microseconds since 1970
	BizID  string
}

// Rejected is a send that was definitely not sent. It is zero if there was none.
type Rejected struct {
	SendID    int64
	At        int64 // microseconds since 1970
	Kind      SendKind
	Code      string // the provider's error code
	RequestID string
}

// A CodeEnd is the end of a code: used or exhausted. It is zero if there was none.
type CodeEnd struct {
	SendID   int64
	At       int64 // microseconds since 1970
	Used     bool  // false: no attempts were left
	Attempts uint8 // including the last one
}

// recordAccepted records that the provider accepted a send, unless a later send was
// accepted before.
func (t *History) recordAccepted(sendID, now int64, receipt Receipt) {
	if sendID >= t.Accepted.SendID {
		t.Accepted = Accepted{sendID, now, receipt.BizID}
	}
}

// recordRejected records that a send was not sent, unless a later one was rejected before.
func (t *History) recordRejected(sendID, now int64, err *SendError) {
	if sendID >= t.Rejected.SendID {
		t.Rejected = Rejected{sendID, now, err.Kind, err.Code, err.RequestID}
	}
}

// recordCheck records how a check that changed before into after ended a code, and
// returns the check's outcome.
func (t *History) recordCheck(r Rules, before, after State, valid, changed bool, now int64) Verification {
	live := r.unexpired(before.Codes, now)
	if !changed {
		return Verification{Outcome: t.noMatchOutcome(r, before.Codes, len(live) > 0, now)}
	}
	found := Verification{Outcome: Mismatch}
	for _, c := range slices.Backward(live) {
		if slices.ContainsFunc(after.Codes, func(a Code) bool { return a.SendID == c.SendID }) {
			continue
		}
		attempts := c.Attempts
		if !r.cannotMatch(c, now) {
			attempts++
		}
		t.End = CodeEnd{SendID: c.SendID, At: now, Used: valid, Attempts: attempts}
		if valid { // a match drops older codes too; the newest dropped code matched
			// At least 0, since another replica's clock may have been ahead.
			found = Verification{Match, max(0, time.Duration(now-c.BegunAt)*time.Microsecond)}
		}
		break
	}
	return found
}

// noMatchOutcome returns why there was no live code: what ended the newest one.
func (t *History) noMatchOutcome(r Rules, codes []Code, cannotMatch bool, now int64) Outcome {
	newest := t.Accepted.SendID
	for _, c := range codes {
		newest = max(newest, c.SendID)
	}
	switch {
	case cannotMatch:
		return Exhausted
	case newest > t.End.SendID: // and neither used nor exhausted
		return Expired
	case t.End.SendID == 0 || t.End.Used:
		return NoCode
	case now < t.End.At+r.CodeTTL.Microseconds():
		return Exhausted
	}
	return Expired
}

// The stored form: a format byte, a bit set of the parts that follow, and the parts.
// Integers are big-endian; a text follows its length. A zero History takes no byte.
const (
	historyFormat  = 1
	acceptedPart   = 1
	rejectedPart   = 2
	endPart        = 4
	usedFlag       = 0x80
	maxTokenLength = 64
)

func (t History) append(b []byte) []byte {
	if t == (History{}) {
		return b
	}
	parts := len(b) + 1
	b = append(b, historyFormat, 0)
	integer := func(n int64) { b = binary.BigEndian.AppendUint64(b, uint64(n)) }
	text := func(s string) {
		s = s[:min(len(s), maxTokenLength)]
		b = append(append(b, byte(len(s))), s...)
	}
	if a := t.Accepted; a != (Accepted{}) {
		b[parts] |= acceptedPart
		integer(a.SendID)
		integer(a.At)
		text(a.BizID)
	}
	if r := t.Rejected; r != (Rejected{}) {
		b[parts] |= rejectedPart
		integer(r.SendID)
		integer(r.At)
		b = append(b, byte(r.Kind))
		text(r.Code)
		text(r.RequestID)
	}
	if e := t.End; e != (CodeEnd{}) {
		b[parts] |= endPart
		integer(e.SendID)
		integer(e.At)
		flags := e.Attempts
		if e.Used {
			flags |= usedFlag
		}
		b = append(b, flags)
	}
	return b
}

// decodeHistory decodes the bytes after the codes of a stored state. It returns the zero
// History if it cannot read them, since no rule depends on it.
func decodeHistory(stored []byte) (t History) {
	if len(stored) < headerBytes {
		return History{}
	}
	codes := headerBytes + int(stored[headerBytes-1])*codeBytes
	if len(stored) < codes+2 || stored[codes] != historyFormat {
		return History{}
	}
	parts, b, ok := stored[codes+1], stored[codes+2:], true
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
	if parts&acceptedPart != 0 {
		t.Accepted = Accepted{integer(), integer(), text()}
	}
	if parts&rejectedPart != 0 {
		t.Rejected = Rejected{integer(), integer(), SendKind(take(1)[0]), text(), text()}
	}
	if parts&endPart != 0 {
		t.End = CodeEnd{SendID: integer(), At: integer()}
		flags := take(1)[0]
		t.End.Used, t.End.Attempts = flags&usedFlag != 0, flags&^usedFlag
	}
	if !ok {
		return History{}
	}
	return t
}

// An Outcome is the result of a check. The caller learns only whether it is Match.
type Outcome uint8

// NoCode is the zero value: no code was sent, or the last one was used or its send was
// rejected.
const (
	NoCode Outcome = iota
	Match
	Mismatch  // there was a live code, but another one
	Expired   // the last code has expired
	Exhausted // the last code has no attempts left
)

func (o Outcome) String() string {
	return []string{"no_code", "match", "mismatch", "expired", "exhausted"}[o]
}

// A Verification is the result of a check.
type Verification struct {
	Outcome Outcome
	After   time.Duration // for Match: time since the send began
}

// Valid reports whether the code matched.
func (v Verification) Valid() bool { return v.Outcome == Match }
