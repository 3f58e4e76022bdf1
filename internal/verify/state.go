package verify

import (
	"crypto/subtle"
	"encoding/binary"
	"slices"
	"time"
)

// State is the codes of one number. Begin, Confirm, Withdraw and Check are the only functions that
// change it. They return a new State and never change their argument.
type State struct {
	LastSendID int64  // send ID of the last send, 0 before the first
	Codes      []Code // at most maxCodes, oldest first
}

// Code is a stored code. The write that makes a code used, exhausted, replaced or withdrawn drops
// it. An expired code is ignored until Begin, Confirm, Withdraw or Check drops it.
type Code struct {
	SendID   int64 // unique for the number; increases with each send
	MAC      MAC
	BegunAt  int64 // microseconds since 1970, before the provider request
	Attempts uint8 // attempts since an older code was used
}

const (
	maxCodes = 8
	// A send is no longer in flight after this time: its call has returned. It takes at most
	// LongestSend, which is 26 s with the longest SMSTimeout, 20 s.
	longestInFlight = 30 * time.Second
	// The clock of another replica may be ahead of this one by this time.
	clockTolerance = 5 * time.Second
)

// Bounds of Rules.
const (
	MaxAttemptLimit = 100
	MaxCodeTTL      = 10 * time.Minute // NIST SP 800-63B
)

// Rules has the two limits that an operator may set. Begin, Confirm, Withdraw and Check are its
// methods.
type Rules struct {
	AttemptLimit int           // attempts for each code, 1 to MaxAttemptLimit
	CodeTTL      time.Duration // lifetime of a code, at most MaxCodeTTL
}

// Begin adds a code before the request to the provider, and returns its send ID. sole means that
// no older code is in the list. None is added later, since send IDs increase. So Confirm has no
// code to drop, and the call may return OK without it.
//
// If the list is full, Begin drops the oldest code that is neither the first nor in flight. The
// first code may be the code of the last send that returned OK. Each later code belongs to a send
// that has not returned OK. If these are all in flight, Begin returns ErrSendInProgress, so that
// many sends at once cannot drop a code that the person may still enter.
func (r Rules) Begin(s State, mac MAC, now int64) (next State, sendID int64, sole bool, err error) {
	codes := r.unexpired(s.Codes, now)
	if len(codes) >= maxCodes {
		later := slices.IndexFunc(codes[1:], func(c Code) bool { return c.BegunAt < now-longestInFlight.Microseconds() })
		if later < 0 {
			return s, 0, false, ErrSendInProgress
		}
		codes = slices.Delete(codes, 1+later, 2+later)
	}
	// A send ID is at least the clock, so that none repeats after a purge of the record.
	sendID = max(s.LastSendID+1, now)
	sole = len(codes) == 0
	codes = append(codes, Code{SendID: sendID, MAC: mac, BegunAt: now})
	return State{LastSendID: sendID, Codes: codes}, sendID, sole, nil
}

// Confirm drops every code that is older than that of a send that the provider accepted. If that
// code was used or exhausted before, Confirm does not add it again.
func (r Rules) Confirm(s State, sendID, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID < sendID })
	return State{LastSendID: s.LastSendID, Codes: codes}
}

// Withdraw drops the code of a send that was definitely not sent. Of the other codes, it
// drops only the expired ones.
func (r Rules) Withdraw(s State, sendID, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID == sendID })
	return State{LastSendID: s.LastSendID, Codes: codes}
}

// Check compares the live codes with macs: the MACs of the entered code, one for each key. A
// match drops the code and all older codes, and sets the Attempts of newer codes to zero. Without
// a match, Check adds one to the Attempts of every live code, and drops a code whose Attempts
// reach the limit. changed is false if no code was live: there is nothing to store.
func (r Rules) Check(s State, macs []MAC, now int64) (next State, valid, changed bool) {
	codes := r.unexpired(s.Codes, now)
	match := -1
	compared := false
	for i := range codes {
		c := &codes[i]
		if r.cannotMatch(*c, now) {
			continue
		}
		compared = true
		c.Attempts++
		for _, mac := range macs {
			if subtle.ConstantTimeCompare(c.MAC[:], mac[:]) == 1 {
				match = i // the newest of two equal codes
			}
		}
	}
	if !compared {
		return s, false, false
	}
	if match >= 0 {
		codes = codes[match+1:]
		// No newer send returned OK, since Confirm would have dropped the code that
		// matched. So the newer codes count as sent after this match.
		for i := range codes {
			codes[i].Attempts = 0
		}
		return State{LastSendID: s.LastSendID, Codes: codes}, true, true
	}
	codes = slices.DeleteFunc(codes, func(c Code) bool { return int(c.Attempts) >= r.AttemptLimit })
	return State{LastSendID: s.LastSendID, Codes: codes}, false, true
}

// CodeStatus describes a live code without its digits.
type CodeStatus struct {
	SendID       int64
	Expires      time.Time
	AttemptsLeft int
	Accepted     bool // it is known that the provider accepted the SMS
}

// live returns the live codes, oldest first: Check would compare them. accepted is the send ID of
// the last send that the provider accepted.
func (r Rules) live(s State, accepted, now int64) (live []CodeStatus) {
	for _, c := range r.unexpired(s.Codes, now) {
		if !r.cannotMatch(c, now) {
			expires := time.UnixMicro(c.BegunAt).Add(r.CodeTTL)
			live = append(live, CodeStatus{c.SendID, expires, r.AttemptLimit - int(c.Attempts), c.SendID == accepted})
		}
	}
	return live
}

// cannotMatch reports whether Check does not compare an unexpired code: it has no attempts left
// (only if the operator has lowered AttemptLimit), or it began more than clockTolerance in the
// future of this replica's clock.
func (r Rules) cannotMatch(c Code, now int64) bool {
	return c.BegunAt-clockTolerance.Microseconds() > now || int(c.Attempts) >= r.AttemptLimit
}

// unexpired returns a copy of the codes that have not expired.
func (r Rules) unexpired(codes []Code, now int64) []Code {
	return slices.DeleteFunc(slices.Clone(codes), func(c Code) bool { return now >= c.BegunAt+r.CodeTTL.Microseconds() })
}

// contains reports whether the list has a code with this send ID and MAC.
func (s State) contains(sendID int64, mac MAC) bool {
	return slices.ContainsFunc(s.Codes, func(c Code) bool { return c.SendID == sendID && c.MAC == mac })
}

// The stored form of a State is: a format byte, the last send ID, the number of codes, then
// codeBytes for each code. Integers are big-endian. decodeState ignores the bytes after the codes.
// The History is there (decodeHistory), and a later release can add optional data after it. A
// release that cannot read such data drops it with its next write of the record.
//
// The first code has the firstFlag, only for older releases. They drop codes without it from a
// full list, and set it when they confirm a code, which is then the first.
const (
	stateFormat = 1
	headerBytes = 1 + 8 + 1
	codeBytes   = 8 + len(MAC{}) + 8 + 1
	firstFlag   = 0x80 // free: attempts are at most MaxAttemptLimit
)

func (s State) encode() []byte {
	b := make([]byte, 0, headerBytes+len(s.Codes)*codeBytes)
	b = append(b, stateFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(s.LastSendID))
	b = append(b, byte(len(s.Codes)))
	for i, c := range s.Codes {
		b = binary.BigEndian.AppendUint64(b, uint64(c.SendID))
		b = append(b, c.MAC[:]...)
		b = binary.BigEndian.AppendUint64(b, uint64(c.BegunAt))
		flags := c.Attempts
		if i == 0 {
			flags |= firstFlag
		}
		b = append(b, flags)
	}
	return b
}

// decodeState decodes the output of encode. An empty input gives the zero State: the number has no
// record. decodeState returns ErrStateUnreadable if the format is unknown, the list has more than
// maxCodes codes, or bytes are missing.
func decodeState(b []byte) (State, error) {
	if len(b) == 0 {
		return State{}, nil
	}
	if len(b) < headerBytes || b[0] != stateFormat {
		return State{}, ErrStateUnreadable
	}
	s := State{LastSendID: int64(binary.BigEndian.Uint64(b[1:]))}
	n := int(b[9])
	b = b[headerBytes:]
	if n > maxCodes || len(b) < n*codeBytes {
		return State{}, ErrStateUnreadable
	}
	s.Codes = make([]Code, n)
	for i := range s.Codes {
		c := &s.Codes[i]
		c.SendID = int64(binary.BigEndian.Uint64(b))
		copy(c.MAC[:], b[8:])
		c.BegunAt = int64(binary.BigEndian.Uint64(b[40:]))
		c.Attempts = b[48] &^ firstFlag
		b = b[codeBytes:]
	}
	return s, nil
}
