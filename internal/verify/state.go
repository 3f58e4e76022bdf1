package verify

import (
	"crypto/subtle"
	"encoding/binary"
	"slices"
	"time"
)

// State is all that is kept of one number. It is a value: the transitions below
// return a new one and never change the one they are given, and every rule of
// the service is in them. The store only loads it and swaps it.
type State struct {
	LastSendID int64  // the last ticket given, 0 before the first
	Codes      []Code // at most maxCodes, oldest first
}

// Code is one send that may still be verified.
type Code struct {
	SendID    int64 // names the send within its number; rises, never repeats
	MAC       MAC
	BegunAt   int64 // microseconds since 1970, before the provider was asked
	Attempts  uint8 // calls that were compared with it since the last match
	Confirmed bool  // the provider accepted it
}

const (
	maxCodes = 8
	// A code begun longer ago than this and still not confirmed is one whose
	// outcome stayed unknown: its caller was answered within twice storePatience
	// and the longest SMSTimeout (20 s).
	unknownOutcomeAfter = 30 * time.Second
	// How far another replica's clock may be ahead of ours.
	clockTolerance = 5 * time.Second
)

// Bounds of Rules.
const (
	MaxAttemptLimit = 100
	MaxCodeTTL      = 10 * time.Minute // NIST SP 800-63B
)

// Rules are the two numbers that an operator may choose.
type Rules struct {
	AttemptLimit int           // looks that a code can take, 1 to MaxAttemptLimit
	CodeTTL      time.Duration // a code's life, over 0 and up to MaxCodeTTL
}

// Begin adds a code before its SMS is asked for and returns its ticket. Where
// the list is full of codes that are confirmed or in flight it returns
// ErrSendInProgress: a storm of sends must not push out a live code.
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
	// Never below the clock, so that a row that was purged does not give a
	// ticket twice.
	ticket := max(s.LastSendID+1, now)
	codes = append(codes, Code{SendID: ticket, MAC: mac, BegunAt: now})
	return State{LastSendID: ticket, Codes: codes}, ticket, nil
}

// Confirm records that the send was accepted: every older code is dead. The
// code itself is not put back where it was used or its looks are spent.
func (r Rules) Confirm(s State, ticket, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID < ticket })
	if len(codes) > 0 && codes[0].SendID == ticket {
		codes[0].Confirmed = true
	}
	return State{LastSendID: s.LastSendID, Codes: codes}
}

// Withdraw drops the code of a send that was surely refused, and no other.
func (r Rules) Withdraw(s State, ticket, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID == ticket })
	return State{LastSendID: s.LastSendID, Codes: codes}
}

// Check compares the live codes with macs, those of one typed code under every
// key. changed is false where nothing is to be stored: no code was alive.
func (r Rules) Check(s State, macs []MAC, now int64) (next State, valid, changed bool) {
	codes := r.unexpired(s.Codes, now)
	match := -1
	looked := false
	for i := range codes {
		c := &codes[i]
		if r.unusable(*c, now) {
			continue
		}
		looked = true
		c.Attempts++
		for _, mac := range macs {
			if subtle.ConstantTimeCompare(c.MAC[:], mac[:]) == 1 {
				match = i // the newest, should two sends have drawn the same digits
			}
		}
	}
	if !looked {
		return s, false, false
	}
	if match >= 0 {
		codes = codes[match+1:]
		// Newer codes are sends that were under way: their count starts after
		// this success, as it does where they succeed after it.
		for i := range codes {
			codes[i].Attempts = 0
		}
		return State{LastSendID: s.LastSendID, Codes: codes}, true, true
	}
	codes = slices.DeleteFunc(codes, func(c Code) bool { return int(c.Attempts) >= r.AttemptLimit })
	return State{LastSendID: s.LastSendID, Codes: codes}, false, true
}

// A CodeStatus is what may be told of a stored code: nothing of its digits.
type CodeStatus struct {
	SendID       int64
	Expires      time.Time
	AttemptsLeft int
	Confirmed    bool // the provider accepted it
}

// Alive tells which codes can still be verified, oldest first.
func (r Rules) Alive(s State, now int64) []CodeStatus {
	var alive []CodeStatus
	for _, c := range r.unexpired(s.Codes, now) {
		if !r.unusable(c, now) {
			alive = append(alive, CodeStatus{c.SendID, time.UnixMicro(c.BegunAt).Add(r.CodeTTL), r.AttemptLimit - int(c.Attempts), c.Confirmed})
		}
	}
	return alive
}

// unusable reports whether a code that is not past its life is compared with nothing:
// its looks are spent, or a replica far ahead of our clock began it.
func (r Rules) unusable(c Code, now int64) bool {
	return c.BegunAt-clockTolerance.Microseconds() > now || int(c.Attempts) >= r.AttemptLimit
}

// unexpired returns a copy of the codes that are not past their life.
func (r Rules) unexpired(codes []Code, now int64) []Code {
	kept := make([]Code, 0, len(codes)+1)
	for _, c := range codes {
		if now < c.BegunAt+r.CodeTTL.Microseconds() {
			kept = append(kept, c)
		}
	}
	return kept
}

// contains reports whether the send with this ticket and MAC is in the list.
func (s State) contains(ticket int64, mac MAC) bool {
	return slices.ContainsFunc(s.Codes, func(c Code) bool { return c.SendID == ticket && c.MAC == mac })
}

// The stored form: a format byte, the last ticket, the number of codes, then 49
// bytes a code; big-endian. What follows the codes is ignored, and lost with the
// next write, so that a later version can add what it can do without while this
// one still runs beside it.
const (
	stateFormat   = 1
	headerBytes   = 1 + 8 + 1
	codeBytes     = 8 + len(MAC{}) + 8 + 1
	confirmedFlag = 0x80 // looks stay below MaxAttemptLimit, which leaves the bit free
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

// decodeState reads what encode wrote; empty input is the state of a number
// that was never seen. It returns ErrStateUnreadable for anything else.
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
