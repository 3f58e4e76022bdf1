package verify

import (
	"encoding/binary"
	"slices"
	"time"
)

// A Trail is what an operator may be told of a number beyond its codes. It is
// written by the swaps that are there anyway, and no rule reads it. A version of the
// service that does not know it loses it.
type Trail struct {
	Answer Answer // to the last send that the provider answered
	End    End    // of the last code that was used, or whose looks were spent
}

// An Answer is what the provider said of a send. Its zero value is none.
type Answer struct {
	Ticket    int64
	At        int64 // microseconds since 1970
	Accepted  bool
	Kind      SendKind // of a refusal
	Code      string   // the provider's own, of a refusal
	BizID     string   // of an accepted send
	RequestID string   // of a refusal
}

// An End is how a code came to its end. Its zero value is none.
type End struct {
	Ticket int64
	At     int64 // microseconds since 1970
	Used   bool  // else its looks were spent
	Looks  uint8 // the last one among them
}

// answered notes what the provider said, unless it said something of a later send.
func (t *Trail) answered(a Answer) {
	if a.Ticket >= t.Answer.Ticket {
		t.Answer = a
	}
}

func accepted(ticket, now int64, receipt Receipt) Answer {
	return Answer{Ticket: ticket, At: now, Accepted: true, BizID: receipt.BizID}
}

func refused(ticket, now int64, err *SendError) Answer {
	return Answer{Ticket: ticket, At: now, Kind: err.Kind, Code: err.Code, RequestID: err.RequestID}
}

// checked notes what a check that led from one state to another did to their codes,
// and tells it.
func (t *Trail) checked(r Rules, before, after State, valid, changed bool, now int64) Verification {
	live := r.unexpired(before.Codes, now)
	if !changed {
		return Verification{Outcome: t.whyNone(r, len(live) < len(before.Codes), len(live) > 0, now)}
	}
	found := Verification{Outcome: Mismatch}
	for _, c := range slices.Backward(live) {
		if slices.ContainsFunc(after.Codes, func(a Code) bool { return a.Ticket == c.Ticket }) {
			continue
		}
		t.End = End{Ticket: c.Ticket, At: now, Used: valid, Looks: c.Looks + 1}
		if valid { // a match takes older codes with it: the newest of all that are gone is it
			found = Verification{Match, time.Duration(now-c.BegunAt) * time.Microsecond}
		}
		break
	}
	return found
}

// whyNone tells why no code could be compared.
func (t *Trail) whyNone(r Rules, expired, unusable bool, now int64) Outcome {
	spent := t.End.Ticket != 0 && !t.End.Used
	switch {
	case unusable || spent && now < t.End.At+r.CodeTTL.Microseconds():
		return Exhausted
	case expired || spent:
		return Expired
	}
	return None
}

// The stored form: a format byte; of the answer ticket, time, kind, and three texts
// with their lengths; of the end ticket, time, and looks with the flag. Big-endian.
// No byte stands for two zero values.
const (
	trailFormat    = 1
	acceptedKind   = 0xff
	usedFlag       = 0x80
	maxTokenLength = 64
)

func (t Trail) append(b []byte) []byte {
	if t == (Trail{}) {
		return b
	}
	b = append(b, trailFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Answer.Ticket))
	b = binary.BigEndian.AppendUint64(b, uint64(t.Answer.At))
	kind := byte(t.Answer.Kind)
	if t.Answer.Accepted {
		kind = acceptedKind
	}
	b = append(b, kind)
	for _, text := range []string{t.Answer.Code, t.Answer.BizID, t.Answer.RequestID} {
		text = text[:min(len(text), maxTokenLength)]
		b = append(append(b, byte(len(text))), text...)
	}
	b = binary.BigEndian.AppendUint64(b, uint64(t.End.Ticket))
	b = binary.BigEndian.AppendUint64(b, uint64(t.End.At))
	flags := t.End.Looks
	if t.End.Used {
		flags |= usedFlag
	}
	return append(b, flags)
}

// decodeTrail reads what stands behind the codes of a stored state. What it cannot
// read it leaves out: nothing depends on it.
func decodeTrail(stored []byte) (t Trail) {
	if len(stored) < headerBytes {
		return Trail{}
	}
	codes := headerBytes + int(stored[headerBytes-1])*codeBytes
	if len(stored) <= codes || stored[codes] != trailFormat {
		return Trail{}
	}
	b := stored[codes+1:]
	ok := true
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
	t.Answer.Ticket, t.Answer.At = integer(), integer()
	if kind := take(1)[0]; kind == acceptedKind {
		t.Answer.Accepted = true
	} else {
		t.Answer.Kind = SendKind(kind)
	}
	t.Answer.Code, t.Answer.BizID, t.Answer.RequestID = text(), text(), text()
	t.End.Ticket, t.End.At = integer(), integer()
	flags := take(1)[0]
	t.End.Used, t.End.Looks = flags&usedFlag != 0, flags&^usedFlag
	if !ok {
		return Trail{}
	}
	return t
}

// An Outcome is what a check found. Its caller learns only whether it is Match.
type Outcome uint8

// None is the zero value: nothing was ever sent, or what was sent is used or was
// refused.
const (
	None Outcome = iota
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
