package verify

import (
	"encoding/binary"
	"slices"
	"time"
)

// A History is what an operator may be told of a number beyond its codes. It is
// written by the swaps that are there anyway, and no rule reads it. A version of the
// service that does not know it loses it.
type History struct {
	Accepted Accepted // the last send that the provider took
	Rejected Rejected // the last that it did not
	End      CodeEnd  // of the last code that was used, or whose looks were spent
}

// Accepted is zero where there is none.
type Accepted struct {
	SendID int64
	At     int64 // microseconds since 1970
	BizID  string
}

// Rejected is zero where there is none.
type Rejected struct {
	SendID    int64
	At        int64 // microseconds since 1970
	Kind      SendKind
	Code      string // the provider's own
	RequestID string
}

// An CodeEnd is how a code came to its end. It is zero where there is none.
type CodeEnd struct {
	SendID   int64
	At       int64 // microseconds since 1970
	Used     bool  // else its looks were spent
	Attempts uint8 // the last one among them
}

// recordAccepted and refused note what the provider said, unless it said the same of a later
// send.
func (t *History) recordAccepted(ticket, now int64, receipt Receipt) {
	if ticket >= t.Accepted.SendID {
		t.Accepted = Accepted{ticket, now, receipt.BizID}
	}
}

func (t *History) recordRejected(ticket, now int64, err *SendError) {
	if ticket >= t.Rejected.SendID {
		t.Rejected = Rejected{ticket, now, err.Kind, err.Code, err.RequestID}
	}
}

// recordCheck notes what a check that led from one state to another did to their codes,
// and tells it.
func (t *History) recordCheck(r Rules, before, after State, valid, changed bool, now int64) Verification {
	live := r.unexpired(before.Codes, now)
	if !changed {
		return Verification{Outcome: t.whyNone(r, before.Codes, len(live) > 0, now)}
	}
	found := Verification{Outcome: Mismatch}
	for _, c := range slices.Backward(live) {
		if slices.ContainsFunc(after.Codes, func(a Code) bool { return a.SendID == c.SendID }) {
			continue
		}
		looks := c.Attempts
		if !r.unusable(c, now) {
			looks++
		}
		t.End = CodeEnd{SendID: c.SendID, At: now, Used: valid, Attempts: looks}
		if valid { // a match takes older codes with it: the newest of all that are gone is it
			// Another replica's clock may have been ahead.
			found = Verification{Match, max(0, time.Duration(now-c.BegunAt)*time.Microsecond)}
		}
		break
	}
	return found
}

// whyNone tells why no code could be compared: what became of the newest.
func (t *History) whyNone(r Rules, codes []Code, unusable bool, now int64) Outcome {
	newest := t.Accepted.SendID
	for _, c := range codes {
		newest = max(newest, c.SendID)
	}
	switch {
	case unusable:
		return Exhausted
	case newest > t.End.SendID: // and neither used nor spent
		return Expired
	case t.End.SendID == 0 || t.End.Used:
		return NoCode
	case now < t.End.At+r.CodeTTL.Microseconds():
		return Exhausted
	}
	return Expired
}

// The stored form: a format byte, a byte that says which parts follow, and these:
// integers big-endian, texts after their length. No byte stands for no part.
const (
	trailFormat    = 1
	acceptedPart   = 1
	refusedPart    = 2
	endPart        = 4
	usedFlag       = 0x80
	maxTokenLength = 64
)

func (t History) append(b []byte) []byte {
	if t == (History{}) {
		return b
	}
	parts := len(b) + 1
	b = append(b, trailFormat, 0)
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
		b[parts] |= refusedPart
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

// decodeHistory reads what stands behind the codes of a stored state. What it cannot
// read it leaves out: nothing depends on it.
func decodeHistory(stored []byte) (t History) {
	if len(stored) < headerBytes {
		return History{}
	}
	codes := headerBytes + int(stored[headerBytes-1])*codeBytes
	if len(stored) < codes+2 || stored[codes] != trailFormat {
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
	if parts&refusedPart != 0 {
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

// An Outcome is what a check found. Its caller learns only whether it is Match.
type Outcome uint8

// None is the zero value: nothing was ever sent, or what was sent is used or was
// refused.
const (
	NoCode Outcome = iota
	Match
	Mismatch  // a code was alive, and was another
	Expired   // the last code's life is over
	Exhausted // the last code's looks are spent
)

func (o Outcome) String() string {
	return []string{"none", "match", "mismatch", "expired", "exhausted"}[o]
}

// A Verification is what a check found.
type Verification struct {
	Outcome Outcome
	After   time.Duration // of a match: since its send began
}

// Valid reports whether the code was right.
func (v Verification) Valid() bool { return v.Outcome == Match }
