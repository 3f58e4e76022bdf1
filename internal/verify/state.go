package verify

import (
	"crypto/subtle"
	"encoding/binary"
	"slices"
	"time"
)

// State is the state of one number: its last send ID, its codes, and its sends with an idempotency
// key. Only Begin, Confirm, Withdraw, Doubt and Check compute a new State. They never change their
// argument.
type State struct {
	LastSendID int64       // send ID of the last send, 0 before the first
	Codes      []Code      // at most maxCodes, oldest first
	Keyed      []KeyedSend // at most maxKeyed, oldest first
}

// Code is a stored code. If a write makes it used, exhausted, replaced or withdrawn, the same write
// drops it. An expired code is ignored until Begin, Confirm, Withdraw or Check drops it.
type Code struct {
	SendID   int64 // unique for the number; increases with each send
	MAC      MAC
	BegunAt  int64 // microseconds since 1970, before the provider request
	Attempts uint8 // since the begin, or since an older code was used
}

const (
	maxCodes = 8
	// longestInFlight is the time after which a send is no longer in flight: its call has returned.
	// A call takes at most LongestSend, which is 26 s with the longest SMSTimeout, 20 s.
	longestInFlight = 30 * time.Second
	// clockTolerance is the time by which the clock of another replica may be ahead.
	clockTolerance = 5 * time.Second
)

// MaxAttemptLimit and MaxCodeTTL are the maximum values of Rules.
const (
	MaxAttemptLimit = 100
	MaxCodeTTL      = 10 * time.Minute // NIST SP 800-63B
)

// Rules has the two limits that an operator may set. Begin, Confirm, Withdraw, Doubt and Check are its
// methods.
type Rules struct {
	AttemptLimit int           // attempts for each code, 1 to MaxAttemptLimit
	CodeTTL      time.Duration // lifetime of a code, at most MaxCodeTTL
}

// NewSend is the input of Begin.
type NewSend struct {
	MAC     MAC // of its code
	Context ContextTags
	Key     []KeyTag // one for each of the Keys; nil without an idempotency key
}

// Begun is a send after its Begin.
type Begun struct {
	SendID   int64
	At       int64 // microseconds since 1970
	Sole     bool  // the list has no older code of the context
	Replayed bool  // an earlier send with the same idempotency key; Begin added nothing
}

// Begin adds a code before the request to the provider. If the code is Sole, Confirm has no code to
// drop: send IDs increase, so no older code is added later. Then the call may return OK without
// Confirm.
//
// If the number has a send with the same idempotency key, Begin returns that send or an error, as
// replayed does.
//
// If the list is full, Begin drops the oldest code that is neither the first of its context nor in
// flight. The first code of a context may be the code of its last send that returned OK. Each later
// code of the context belongs to a send that has not returned OK. If there is no code to drop, Begin
// returns ErrSendInProgress or a *FullError. So many sends at once cannot drop a code that the person
// may still enter.
func (r Rules) Begin(s State, n NewSend, now int64) (next State, begun Begun, err error) {
	keyed := r.unexpiredKeyed(s.Keyed, now)
	if begun, err = replayed(keyed, n.Key, now); begun.Replayed || err != nil {
		return s, begun, err
	}
	codes := r.unexpired(s.Codes, now)
	if len(codes) >= maxCodes {
		i := droppable(codes, now)
		if i < 0 {
			return s, Begun{}, r.full(codes, now)
		}
		codes = slices.Delete(codes, i, i+1)
	}
	// A send ID is at least the clock, so that none repeats after a purge of the record.
	begun = Begun{SendID: max(s.LastSendID+1, now), At: now, Sole: !slices.ContainsFunc(codes, n.Context.has)}
	if n.Key != nil {
		if len(keyed) >= maxKeyed {
			return s, Begun{}, &FullError{r.left(keyed[0].BegunAt, now)}
		}
		keyed = append(keyed, KeyedSend{Tag: n.Key[0], SendID: begun.SendID, BegunAt: now})
	}
	codes = append(codes, Code{SendID: begun.SendID, MAC: n.MAC, BegunAt: now})
	return State{begun.SendID, codes, keyed}, begun, nil
}

// droppable returns the index of the oldest code that is neither the first of its context nor in
// flight, or -1.
func droppable(codes []Code, now int64) int {
	for i, c := range codes {
		if !isFirst(codes, i) && !isInFlight(c.BegunAt, now) {
			return i
		}
	}
	return -1
}

// isFirst reports whether codes[i] is the first code of its context.
func isFirst(codes []Code, i int) bool {
	context := codes[i].MAC.context()
	return !slices.ContainsFunc(codes[:i], func(c Code) bool { return c.MAC.context() == context })
}

// isInFlight reports whether a send that began at begunAt may be in flight.
func isInFlight(begunAt, now int64) bool { return begunAt >= now-longestInFlight.Microseconds() }

// full returns the error for a list of codes without a droppable one.
func (r Rules) full(codes []Code, now int64) error {
	if slices.ContainsFunc(codes, func(c Code) bool { return isInFlight(c.BegunAt, now) }) {
		return ErrSendInProgress
	}
	return &FullError{r.left(codes[0].BegunAt, now)}
}

// left returns the remaining lifetime of a code that began at begunAt.
func (r Rules) left(begunAt, now int64) time.Duration {
	return time.Duration(begunAt-now)*time.Microsecond + r.CodeTTL
}

// Confirm drops the codes of the context that are older than the code of a send, because the provider
// accepted the send. If the code itself was used or exhausted before, Confirm does not add it again.
func (r Rules) Confirm(s State, sendID int64, context ContextTags, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID < sendID && context.has(c) })
	return State{s.LastSendID, codes, withStatus(s.Keyed, sendID, keyedAccepted)}
}

// Withdraw drops the code and the KeyedSend of a send whose SMS was definitely not sent. Of the
// other codes, it drops only the expired ones.
func (r Rules) Withdraw(s State, sendID, now int64) State {
	codes := slices.DeleteFunc(r.unexpired(s.Codes, now), func(c Code) bool { return c.SendID == sendID })
	keyed := slices.DeleteFunc(slices.Clone(s.Keyed), func(k KeyedSend) bool { return k.SendID == sendID })
	return State{s.LastSendID, codes, keyed}
}

// Doubt stores that the outcome of a send with an idempotency key is unknown. kind is SendUnknown or
// SendTimedOut.
func (r Rules) Doubt(s State, sendID int64, kind SendKind) State {
	status := keyedUnknown
	if kind == SendTimedOut {
		status = keyedTimedOut
	}
	return State{s.LastSendID, s.Codes, withStatus(s.Keyed, sendID, status)}
}

// Check compares the live codes of the context with macs: the MACs of the entered code, one for each
// key. A match drops the code and all older codes of the context, and sets the Attempts of its newer
// codes to zero. Without a match, Check adds one to the Attempts of every live code of the context,
// and drops a code whose Attempts reach the limit. If no code of the context was live, there is
// nothing to store, and changed is false. Codes of other contexts do not change.
func (r Rules) Check(s State, macs []MAC, context ContextTags, now int64) (next State, valid, changed bool) {
	codes := r.unexpired(s.Codes, now)
	match := -1
	compared := false
	for i := range codes {
		c := &codes[i]
		if !context.has(*c) || r.cannotMatch(*c, now) {
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
		used := codes[match].SendID
		codes = slices.DeleteFunc(codes, func(c Code) bool { return c.SendID <= used && context.has(c) })
		// No newer send of the context returned OK, since Confirm would have dropped the
		// code that matched. So the newer codes count as sent after this match.
		for i := range codes {
			if context.has(codes[i]) {
				codes[i].Attempts = 0
			}
		}
		return State{s.LastSendID, codes, s.Keyed}, true, true
	}
	codes = slices.DeleteFunc(codes, func(c Code) bool { return int(c.Attempts) >= r.AttemptLimit && context.has(c) })
	return State{s.LastSendID, codes, s.Keyed}, false, true
}

// CodeStatus describes a live code without its digits.
type CodeStatus struct {
	SendID       int64
	Expires      time.Time
	AttemptsLeft int
	Accepted     bool // the provider accepted the SMS; false if this is not known
}

// live returns the live codes, oldest first. accepted is the send ID of the last send that the
// provider accepted.
func (r Rules) live(s State, accepted, now int64) (live []CodeStatus) {
	for _, c := range r.unexpired(s.Codes, now) {
		if !r.cannotMatch(c, now) {
			expires := time.UnixMicro(c.BegunAt).Add(r.CodeTTL)
			live = append(live, CodeStatus{c.SendID, expires, r.attemptsLeft(c), c.SendID == accepted})
		}
	}
	return live
}

func (r Rules) attemptsLeft(c Code) int { return max(0, r.AttemptLimit-int(c.Attempts)) }

// cannotMatch reports whether Check does not compare an unexpired code. Either the code has no
// attempts left, which happens only if the operator lowered AttemptLimit. Or it began more than
// clockTolerance in the future of this replica's clock.
func (r Rules) cannotMatch(c Code, now int64) bool {
	return c.BegunAt-clockTolerance.Microseconds() > now || int(c.Attempts) >= r.AttemptLimit
}

// unexpired returns a copy of the codes that have not expired.
func (r Rules) unexpired(codes []Code, now int64) []Code {
	return slices.DeleteFunc(slices.Clone(codes), func(c Code) bool { return r.isExpired(c.BegunAt, now) })
}

// isExpired reports whether the lifetime of a code that began at begunAt is over.
func (r Rules) isExpired(begunAt, now int64) bool { return now >= begunAt+r.CodeTTL.Microseconds() }

// contains reports whether the list has a code with this send ID and MAC.
func (s State) contains(sendID int64, mac MAC) bool {
	return slices.ContainsFunc(s.Codes, func(c Code) bool { return c.SendID == sendID && c.MAC == mac })
}

// encodeRecord returns the stored form of a State and a History: the codes, the History, and the
// keyed sends. A zero History and an empty list of keyed sends have no bytes.
func encodeRecord(s State, h History) []byte {
	return appendKeyed(h.appendTo(s.encode()), s.Keyed)
}

// decodeRecord decodes the output of encodeRecord. Its error is that of decodeState.
func decodeRecord(stored []byte) (State, History, error) {
	s, rest, err := decodeState(stored)
	if err != nil {
		return State{}, History{}, err
	}
	h, rest := decodeHistory(rest)
	s.Keyed = decodeKeyed(rest)
	return s, h, nil
}

// The stored form of the codes is: a format byte, the last send ID, the number of codes, then
// codeBytes for each code. Integers are big-endian. A later release can add optional data after the
// keyed sends. A release that cannot read such data drops it with its next write of the record.
//
// The first code of each context has the firstFlag, which only older releases use. If the list is
// full, they drop a code without the flag. When they confirm a code, which is then the first, they
// set the flag.
const (
	stateFormat = 1
	headerBytes = 1 + 8 + 1
	codeBytes   = 8 + len(MAC{}) + 8 + 1
	firstFlag   = 0x80 // not used by Attempts, which are at most MaxAttemptLimit
)

// encode returns the stored form of the last send ID and the codes.
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
		if isFirst(s.Codes, i) {
			flags |= firstFlag
		}
		b = append(b, flags)
	}
	return b
}

// decodeState decodes the output of encode, and returns the bytes after it. If b is empty, the number
// has no record, and decodeState returns the zero State. It returns ErrStateUnreadable if the format
// is unknown, the list has more than maxCodes codes, or bytes are missing.
func decodeState(b []byte) (s State, rest []byte, err error) {
	if len(b) == 0 {
		return State{}, nil, nil
	}
	if len(b) < headerBytes || b[0] != stateFormat {
		return State{}, nil, ErrStateUnreadable
	}
	s.LastSendID = int64(binary.BigEndian.Uint64(b[1:]))
	n := int(b[9])
	b = b[headerBytes:]
	if n > maxCodes || len(b) < n*codeBytes {
		return State{}, nil, ErrStateUnreadable
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
	return s, b, nil
}
