package verify

import (
	"encoding/binary"
	"slices"
	"time"
)

// History holds the last events of a number in all contexts, for the operator. A swap writes it
// together with the State, so it needs no write of its own. The methods of Rules do not read it.
// Each event is zero if there was none.
type History struct {
	Accepted Accepted
	Rejected Rejected
	End      CodeEnd
}

// Accepted is the last send that the provider accepted.
type Accepted struct {
	SendID int64
	At     int64  // microseconds since 1970
	BizID  string // the provider's ID of the SMS
}

// Rejected is the last send that failed with a SendError whose kind is NotSent.
type Rejected struct {
	SendID       int64
	At           int64 // microseconds since 1970
	Kind         SendKind
	ProviderCode string // the provider's error code
	RequestID    string
}

// CodeEnd is the last check that made a code used or exhausted.
type CodeEnd struct {
	SendID   int64
	At       int64 // microseconds since 1970
	Used     bool  // false if exhausted
	Attempts uint8 // attempts on the code, the last one included
}

// recordAccepted stores an acceptance, unless h already has that of a later send.
func (h *History) recordAccepted(a Accepted) {
	if a.SendID >= h.Accepted.SendID {
		h.Accepted = a
	}
}

// recordRejected stores that a send sent no SMS, unless h already has a later send without an SMS.
func (h *History) recordRejected(sendID, now int64, err *SendError) {
	if sendID >= h.Rejected.SendID {
		h.Rejected = Rejected{sendID, now, err.Kind, err.ProviderCode, err.RequestID}
	}
}

// recordCheck returns the result of a check in a context. If the check made codes used or
// exhausted, recordCheck stores the newest of them. before is the argument of Rules.Check, and after,
// valid and changed are its results.
func (h *History) recordCheck(r Rules, before, after State, context ContextTags, valid, changed bool, now int64) Verification {
	unexpired := r.unexpired(before.Codes, now)
	if !changed {
		return Verification{Result: h.noLiveCode(r, before.Codes, unexpired, context, now)}
	}
	found := Verification{Result: Mismatch}
	for _, c := range after.Codes {
		if context.has(c) {
			found.AttemptsLeft = r.attemptsLeft(c)
		}
	}
	for _, c := range slices.Backward(unexpired) {
		if slices.ContainsFunc(after.Codes, func(a Code) bool { return a.SendID == c.SendID }) {
			continue
		}
		attempts := c.Attempts
		if !r.cannotMatch(c, now) {
			attempts++
		}
		h.End = CodeEnd{SendID: c.SendID, At: now, Used: valid, Attempts: attempts}
		if valid { // the newest dropped code is the match
			// The difference is negative if the clock of another replica is ahead.
			found.Result, found.After = Match, max(0, time.Duration(now-c.BegunAt)*time.Microsecond)
		}
		break
	}
	return found
}

// noLiveCode returns the reason that no code of the context was live. It is Exhausted if a code of
// the context is unexpired, since cannotMatch is then true for it. It is OtherContext if a code of
// another context is live. Otherwise it is the way in which the newest code of the number ended.
func (h *History) noLiveCode(r Rules, codes, unexpired []Code, context ContextTags, now int64) CheckResult {
	newest := h.Accepted.SendID
	for _, c := range codes {
		newest = max(newest, c.SendID)
	}
	switch {
	case slices.ContainsFunc(unexpired, context.has):
		return Exhausted
	case slices.ContainsFunc(unexpired, func(c Code) bool { return !r.cannotMatch(c, now) }):
		return OtherContext
	case newest > h.End.SendID: // the newest code was not used or exhausted
		return Expired
	case h.End.SendID == 0 || h.End.Used:
		return NoCode
	case now < h.End.At+r.CodeTTL.Microseconds():
		return Exhausted
	}
	return Expired
}

// The stored form of a History is: a format byte, a byte of flags for the parts that follow, and
// the parts. A text is a length byte and at most maxTextBytes bytes. A zero History has no bytes.
const (
	historyFormat = 1
	acceptedPart  = 1
	rejectedPart  = 2
	endPart       = 4
	usedFlag      = 0x80
	maxTextBytes  = 64
)

// appendTo appends the stored form to b, which is an encoded State.
func (h History) appendTo(b []byte) []byte {
	if h == (History{}) {
		return b
	}
	parts := len(b) + 1
	b = append(b, historyFormat, 0)
	integer := func(n int64) { b = binary.BigEndian.AppendUint64(b, uint64(n)) }
	text := func(s string) {
		s = s[:min(len(s), maxTextBytes)]
		b = append(append(b, byte(len(s))), s...)
	}
	if a := h.Accepted; a != (Accepted{}) {
		b[parts] |= acceptedPart
		integer(a.SendID)
		integer(a.At)
		text(a.BizID)
	}
	if r := h.Rejected; r != (Rejected{}) {
		b[parts] |= rejectedPart
		integer(r.SendID)
		integer(r.At)
		b = append(b, byte(r.Kind))
		text(r.ProviderCode)
		text(r.RequestID)
	}
	if e := h.End; e != (CodeEnd{}) {
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

// decodeHistory decodes the output of appendTo, and returns the bytes after it. If it cannot read
// the History, it returns the zero History and stored, but no error: only operators and metrics use
// the History.
func decodeHistory(stored []byte) (h History, rest []byte) {
	if len(stored) < 2 || stored[0] != historyFormat {
		return History{}, stored
	}
	parts, b, ok := stored[1], stored[2:], true
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
		h.Accepted = Accepted{integer(), integer(), text()}
	}
	if parts&rejectedPart != 0 {
		h.Rejected = Rejected{integer(), integer(), SendKind(take(1)[0]), text(), text()}
	}
	if parts&endPart != 0 {
		h.End = CodeEnd{SendID: integer(), At: integer()}
		flags := take(1)[0]
		h.End.Used, h.End.Attempts = flags&usedFlag != 0, flags&^usedFlag
	}
	if !ok {
		return History{}, stored
	}
	return h, b
}

// CheckResult is the result of a check. A response shows only whether it is Match. The other values are
// for metrics, and for known callers that want details.
type CheckResult uint8

// All results except Match and Mismatch mean that no code of the context was live. NoCode is the zero
// value: no SMS was sent, or the last code was used. Exhausted is also the result if the unexpired
// codes began in the future of this replica's clock (cannotMatch).
const (
	NoCode       CheckResult = iota
	Match                    // the entered code is a live code
	Mismatch                 // no live code is the entered code
	Expired                  // the last code has expired
	Exhausted                // the last code has no attempts left
	OtherContext             // a code of another context is live
)

func (r CheckResult) String() string {
	return []string{"no_code", "match", "mismatch", "expired", "exhausted", "other_context"}[r]
}

// Verification is the result of a check.
type Verification struct {
	Result CheckResult
	After  time.Duration // from the begin of the send to a Match
	// AttemptsLeft belongs to the newest code of the context after the check. It is 0 if there is none.
	AttemptsLeft int
}

// Valid reports whether the entered code was a live code.
func (v Verification) Valid() bool { return v.Result == Match }
