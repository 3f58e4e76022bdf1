package verify

import (
	"crypto/subtle"
	"encoding/binary"
	"slices"
	"time"
)

// State is everything that the rules know about one number. It is a value: the
// transitions below return a new State and never change their argument. They contain
// every rule of the service; the store only loads and swaps.
type State struct {
	LastSendID int64  // of the last send, 0 before the first
	Codes      []Code // at most maxCodes, oldest first
}

// Code is one send whose code may still be verified.
type Code struct {
	SendID    int64 // unique within the number; increases, never repeats
	MAC       MAC
	BegunAt   int64 // microseconds since 1970, before the provider was asked
	Attempts  uint8 // checks compared with it since the last match
	Confirmed bool  // the provider accepted it
}

const (
	maxCodes = 8
	// The outcome of a send is unknown if it began longer ago than this and is not
	// confirmed: its call returned within twice storeTimeout and the longest
	// SMSTimeout (20 s).
	unknownOutcomeAfter = 30 * time.Second
	// How far another replica's clock may be ahead of this one.
	clockTolerance = 5 * time.Second
)

// Bounds of Rules.
const (
	MaxAttemptLimit = 100
	MaxCodeTTL      = 10 * time.Minute // NIST SP 800-63B
)

// Rules are the two limits that an operator may set.
type Rules struct {
	AttemptLimit int           // attempts per code, 1 to MaxAttemptLimit
	CodeTTL      time.Duration // a code's lifetime, over 0, up to MaxCodeTTL
}

// Begin adds a code before its SMS is requested, and returns its send ID. If the list
// is full of codes that are confirmed or in flight, it returns ErrSendInProgress:
// a burst of sends must not push out a live code.
func (r Rules) Begin(s State, mac MAC, now int64) (State, int64, error) {
	codes := r.unexpired(s.Codes, now)
	if len(codes) >= maxCodes {
		stale := slices.IndexFunc(codes, func(c Code) bool {
			return !c.Confirmed && c.BegunAt < now-unknownOutcomeAfter.Microseconds()
		})
		if stale < 0 {
			return s, 0, ErrSendInProgress
		}
		codes = slices.Delete(codes, stale, stale+1)
	}
	// Never below the clock, so that a send ID is not used again after its row was
	// purged.
	sendID := max(s.LastSendID+1, now)
	codes = append(codes, Code{SendID: sendID, MAC: mac, BegunAt: now})
	return State{LastSendID: sendID, Codes: codes}, sendID, nil
}

// Confirm records that the provider accepted the send, and drops every older code. It
// does not put the code back if the code was used or has no attempts left.
func (r Rules) Confirm(s State, sendID, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID < sendID })
	if len(codes) > 0 && codes[0].SendID == sendID {
		codes[0].Confirmed = true
	}
	return State{LastSendID: s.LastSendID, Codes: codes}
}

// Withdraw drops the code of a send that was definitely not sent, and no other code.
func (r Rules) Withdraw(s State, sendID, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID == sendID })
	return State{LastSendID: s.LastSendID, Codes: codes}
}

// Check compares the live codes with macs: the MACs of the entered code, one for each
// key. changed is false if there was no live code, so that there is nothing to store.
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
				match = i // the newest, if two have the same digits
			}
		}
	}
	if !compared {
		return s, false, false
	}
	if match >= 0 {
		codes = codes[match+1:]
		// Newer codes belong to sends in flight. Their attempts are counted from
		// this match on, as if they had been sent after it.
		for i := range codes {
			codes[i].Attempts = 0
		}
		return State{LastSendID: s.LastSendID, Codes: codes}, true, true
	}
	codes = slices.DeleteFunc(codes, func(c Code) bool { return int(c.Attempts) >= r.AttemptLimit })
	return State{LastSendID: s.LastSendID, Codes: codes}, false, true
}

// A CodeStatus describes a stored code without its digits.
type CodeStatus struct {
	SendID       int64
	Expires      time.Time
	AttemptsLeft int
	Confirmed    bool // the provider accepted it
}

// Alive returns the codes that can still be verified, oldest first.
func (r Rules) Alive(s State, now int64) []CodeStatus {
	var alive []CodeStatus
	for _, c := range r.unexpired(s.Codes, now) {
		if !r.cannotMatch(c, now) {
			alive = append(alive, CodeStatus{c.SendID, time.UnixMicro(c.BegunAt).Add(r.CodeTTL), r.AttemptLimit - int(c.Attempts), c.Confirmed})
		}
	}
	return alive
}

// cannotMatch reports whether an unexpired code is excluded from comparison: it has no
// attempts left, or it was begun by a replica whose clock is far ahead.
func (r Rules) cannotMatch(c Code, now int64) bool {
	return c.BegunAt-clockTolerance.Microseconds() > now || int(c.Attempts) >= r.AttemptLimit
}

// unexpired returns a copy of the codes that have not expired.
func (r Rules) unexpired(codes []Code, now int64) []Code {
	kept := make([]Code, 0, len(codes)+1)
	for _, c := range codes {
		if now < c.BegunAt+r.CodeTTL.Microseconds() {
			kept = append(kept, c)
		}
	}
	return kept
}

// contains reports whether the send with this ID and MAC is in the list.
func (s State) contains(sendID int64, mac MAC) bool {
	return slices.ContainsFunc(s.Codes, func(c Code) bool { return c.SendID == sendID && c.MAC == mac })
}

// The stored form: a format byte, the last send ID, the number of codes, then 49 bytes
// for each code; big-endian. Bytes after the codes are not part of the State: decodeState
// ignores them, so that a later version can add optional data while this one still runs
// beside it. A version that does not know the data drops it on the next write.
const (
	stateFormat   = 1
	headerBytes   = 1 + 8 + 1
	codeBytes     = 8 + len(MAC{}) + 8 + 1
	confirmedFlag = 0x80 // free, since attempts stay below MaxAttemptLimit
)

func (s State) encode() []byte {
	b := make([]byte, 0, headerBytes+len(s.Codes)*codeBytes)
	b = append(b, stateFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(s.LastSendID))
	b = append(b, byte(len(s.Codes)))
	for _, c := range s.Codes {
		b = binary.BigEndian.AppendUint64(b, uint64(c.SendID))
		b = append(b, c.MAC[:]...)
		b = binary.BigEndian.AppendUint64(b, uint64(c.BegunAt))
		flags := c.Attempts
		if c.Confirmed {
			flags |= confirmedFlag
		}
		b = append(b, flags)
	}
	return b
}

// decodeState decodes the output of encode. Empty input is the state of a number that
// has no row. It returns ErrStateUnreadable for any other input.
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
		c.Attempts = b[48] &^ confirmedFlag
		c.Confirmed = b[48]&confirmedFlag != 0
		b = b[codeBytes:]
	}
	return s, nil
}
