package verify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
)

// This file checks the transitions of State exhaustively. It visits every interleaving of
// a few overlapping sends, checks and clock steps, and checks four properties in every
// state (docs/guarantees.md has G1, G2 and the rules):
//
//   - the results so far are linearizable (the oracle of oracle_test.go);
//   - G1: no code was compared with more than AttemptLimit calls since the last match;
//   - G2: every code that reached a phone is accepted, unless a later send succeeded or
//     the code is used, expired or out of attempts;
//   - each send with an idempotency key has the right answer (answerToKey).
//
// The first three hold for each context by itself: it has a specification of its own.
//
// A store with load and compare-and-swap makes every transition one atomic step. So the
// interleavings of transitions are all effects that concurrent calls, replicas and crashes
// can have on a number.
//
// A send has these phases, and may stop permanently in each:
//
//	idle → inFlight → delivered → returnedOK
//	              ↘ withdrawn
//
// A send of a sole code returns OK at once. Every other send returns OK when its confirm is
// stored. The acceptance of a sole code that is stored later is not part of the State.
//
// A crash, a lost reply and an unknown outcome need no steps: the send never leaves
// inFlight (its SMS never arrives) or delivered (its SMS arrived, but the service does not
// know it). A rejection with a late withdraw is a send that is still inFlight, although its call
// may have returned. confirm and withdraw may come at any later time, any number of times, as after a lost reply of a swap.

const (
	modelSends = 3
	// A tick is half a code's life. A code lives at the tick of its begin and at the next
	// one. At the second its life ends, to the microsecond.
	modelTTL  = 10 * time.Minute
	modelTick = modelTTL / 2
	modelZero = int64(1_000_000_000_000) // the time of tick 0

	wrongCode = -1 // a code that was never sent
	// A storm is seven sends of other callers without a context that crash at once.
	stormSends = maxCodes - 1
	// Context 0 is no context.
	maxContexts = 2
)

type phase uint8

const (
	idle phase = iota
	inFlight
	delivered  // on the phone, the call has not returned
	returnedOK // on the phone, the call returned OK
	withdrawn  // definitely not sent, and stored: the call failed
)

// transitions are the functions that explore tests: those of Rules, or a mutant.
type transitions struct {
	begin    func(s State, n NewSend, now int64) (next State, b Begun, err error)
	confirm  func(s State, begun Code, now int64) State // begun is the code as begin added it
	withdraw func(s State, begun Code, now int64) State
	doubt    func(s State, begun Code) State
	check    checkFunc
	// soleAtLoad is true for a mutant: sole is true of an earlier load, not of the replaced state.
	soleAtLoad bool
	// older are the transitions of replicas of an older release, which run beside these.
	older *transitions
}

// A checkFunc checks in the context of macs.
type checkFunc func(s State, macs []MAC, now int64) (next State, valid, changed bool)

func transitionsOf(r Rules) transitions {
	return transitions{
		begin: r.Begin,
		confirm: func(s State, begun Code, now int64) State {
			return r.Confirm(s, begun.SendID, contextOf(begun.MAC), now)
		},
		withdraw: func(s State, begun Code, now int64) State { return r.Withdraw(s, begun.SendID, now) },
		doubt:    func(s State, begun Code) State { return r.Doubt(s, begun.SendID, SendUnknown) },
		check: func(s State, macs []MAC, now int64) (State, bool, bool) {
			return r.Check(s, macs, contextOf(macs[0]), now)
		},
	}
}

// contextOf returns the tags of a MAC's context.
func contextOf(m MAC) ContextTags {
	if tag := m.context(); tag != (ContextTag{}) {
		return ContextTags{tag}
	}
	return nil
}

func newSend(mac MAC, key ...KeyTag) NewSend { return NewSend{mac, contextOf(mac), key} }

// of returns the transitions of the replica that makes a send.
func (t transitions) of(s modelSend) transitions {
	if s.older {
		return *t.older
	}
	return t
}

// A world bounds the exploration.
type world struct {
	limit  int  // AttemptLimit
	sends  int  // up to modelSends
	ticks  int  // the last tick; 0: time stands still
	storm  bool // a storm may fill the list, once
	loads  bool // a begin may load the row before other begins
	totals bool // count all comparisons of each code

	contexts int  // 0 and 1: no call has a context
	keys     bool // a send may have the idempotency key; there is one
	// Replicas of the previous release run beside these. They know no context, and may drop and
	// count codes with one. Such codes must still be accepted only in their context, and once.
	lossy bool
}

func (w world) rules() Rules { return Rules{AttemptLimit: w.limit, CodeTTL: modelTTL} }

// A node is one state of the world: the number's row, the sends with their results, and
// the possible states of the specification.
type node struct {
	row     State
	sends   [modelSends]modelSend // in the order of their begins
	begun   int                   // number of sends that began
	tick    int
	stormed bool
	noCode  bool                                 // the last evLoad found no live code
	spec    [maxContexts][1 << modelSends]uint64 // states of the oracle of each context
}

type modelSend struct {
	phase    phase
	code     Code // as begin added it
	tick     int  // of the begin
	sole     bool
	older    bool // the replica has the older release
	context  int8
	keyed    bool // it has the idempotency key
	doubted  bool // it is stored that its outcome is unknown
	used     bool // accepted once
	calls    int  // checks in its context since the begin, or since the last match
	compared int  // of these, the ones that could have accepted it
	total    int  // as compared, not reset by a match; 0 unless world.totals
	younger  int  // sends begun later
	pushed   bool // its unknown outcome may have been pushed out
}

func (n *node) now() int64 { return modelZero + int64(n.tick)*modelTick.Microseconds() }

func (n *node) expired(i int) bool { return n.tick-n.sends[i].tick >= 2 }

// replaced reports whether a send of the context begun after i has succeeded: its call
// returned OK, or its code was accepted.
func (n *node) replaced(i int) bool {
	return slices.ContainsFunc(n.sends[i+1:n.begun], func(s modelSend) bool {
		return s.context == n.sends[i].context && (s.phase == returnedOK || s.used)
	})
}

// pending returns the sends of a context that may still succeed, one bit each.
func (n *node) pending(context int) (bits int) {
	for i := range n.begun {
		if s := n.sends[i]; int(s.context) == context && (s.phase == inFlight || s.phase == delivered) {
			bits |= 1 << i
		}
	}
	return bits
}

// key encodes the parts of a node that can affect later steps.
func (n *node) key(b []byte, w world) string {
	b = binary.AppendVarint(b[:0], n.row.LastSendID)
	for _, c := range n.row.Codes {
		b = append(b, c.MAC[0]+c.MAC[16], c.MAC[8], c.Attempts)
		b = binary.AppendVarint(b, c.SendID)
		b = binary.AppendVarint(b, (c.BegunAt-modelZero)/modelTick.Microseconds())
	}
	b = append(b, 0xff)
	for _, k := range n.row.Keyed {
		b = append(b, k.Tag.Request[0], byte(k.Status))
		b = binary.AppendVarint(b, k.SendID)
		b = binary.AppendVarint(b, (k.BegunAt-modelZero)/modelTick.Microseconds())
	}
	b = append(b, 0xff, byte(n.begun), byte(n.tick), byte(flag(n.stormed)|flag(n.noCode)<<1))
	for _, s := range n.sends[:n.begun] {
		flags := flag(s.used) | flag(s.pushed)<<1 | flag(s.sole)<<2 | flag(s.older)<<3 | flag(s.keyed)<<4 | flag(s.doubted)<<5
		b = append(b, byte(s.phase), byte(s.tick), byte(s.context), byte(flags),
			byte(min(s.calls, w.limit)), byte(s.compared), byte(s.total))
		b = binary.AppendVarint(b, s.code.SendID)
		if w.storm {
			b = append(b, byte(s.younger))
		}
	}
	for _, spec := range n.spec[:max(1, w.contexts)] {
		for _, states := range spec {
			b = binary.AppendUvarint(b, states)
		}
	}
	return string(b)
}

func flag(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func (n *node) unexpired(c Code) bool { return n.now() < c.BegunAt+modelTTL.Microseconds() }

func (n *node) lastBegin() int {
	last := -2
	if n.begun > 0 {
		last = n.sends[n.begun-1].tick
	}
	return last
}

// modelMAC returns the MAC of a send's code without a context.
func modelMAC(send int) MAC { return MAC{byte(send + 2)} }

// contextMAC returns the MAC of a send's code in a context.
func contextMAC(send, context int) MAC {
	if context == 0 {
		return modelMAC(send)
	}
	return MAC{8: byte(context), 16: byte(send + 2)}
}

var modelMACs = func() (macs [maxContexts][1 + modelSends][]MAC) { // wrongCode first
	for context := range macs {
		for i := range macs[context] {
			macs[context][i] = []MAC{contextMAC(i-1, context)}
		}
	}
	return macs
}()

// modelKey is the idempotency key, whose request is the context.
func modelKey(context int8) KeyTag { return KeyTag{ID: [12]byte{1}, Request: [4]byte{byte(context)}} }

// live reports whether the code of a send would be accepted now in its context.
func (n *node) live(send int, t transitions) bool {
	_, valid, _ := t.check(n.row, modelMACs[n.sends[send].context][1+send], n.now())
	return valid
}

// answerToKey checks the result of a begin with the idempotency key. Until the life of its code is
// over, the key is one SMS, unless the send was withdrawn.
func (n *node) answerToKey(context int8, b Begun, err error) error {
	var unknown *SendError
	got := "begins"
	switch {
	case errors.As(err, &unknown):
		got = "an unknown outcome"
	case errors.Is(err, ErrKeyInProgress), errors.Is(err, ErrKeyReused):
		got = err.Error()
	case err != nil:
		return nil // the list is full
	case b.Replayed:
		got = "a replay"
	}
	want := "begins"
	for i, s := range n.sends[:n.begun] {
		switch {
		case !s.keyed || s.phase == withdrawn || n.expired(i):
		case s.context != context:
			want = ErrKeyReused.Error()
		case s.phase == returnedOK:
			want = "a replay"
		case s.doubted || n.tick > s.tick: // a send is in flight for half a minute at most
			want = "an unknown outcome"
		default:
			want = ErrKeyInProgress.Error()
		}
	}
	if got != want {
		return fmt.Errorf("idempotency key: got %q, want %q", got, want)
	}
	return nil
}

// step returns the node after e, and an error if it violates a property.
func (n node) step(e event, t transitions, w world) (node, error) {
	specs := [maxContexts]oracle{{n.spec[0][:], w.limit}, {n.spec[1][:], w.limit}}
	now := n.now()
	i := int(e.send)
	spec := specs[e.context] // for an event of a send, that of its context
	switch e.kind {
	case evLoad:
		n.noCode = !slices.ContainsFunc(n.row.Codes, n.unexpired)
	case evBegin, evBeginByOlder:
		begin := t.begin
		if e.kind == evBeginByOlder {
			begin = t.older.begin
		}
		send := newSend(contextMAC(i, int(e.context)))
		if e.keyed {
			send.Key = []KeyTag{modelKey(e.context)}
		}
		row, b, err := begin(n.row, send, now)
		if e.keyed {
			if wrong := n.answerToKey(e.context, b, err); wrong != nil {
				return n, wrong
			}
		}
		if err != nil || b.Replayed {
			return n, nil // nothing was sent; the call may come again later
		}
		if t.soleAtLoad {
			b.Sole = n.noCode
		}
		n.beganOne(w)
		n.row = row
		n.sends[i] = modelSend{
			phase: inFlight, tick: n.tick, code: Code{SendID: b.SendID, MAC: send.MAC, BegunAt: now},
			sole: b.Sole, older: e.kind == evBeginByOlder, context: e.context, keyed: e.keyed,
		}
		n.begun++
	case evStorm:
		n.stormed = true
		for k := range stormSends {
			row, _, err := t.begin(n.row, newSend(MAC{byte(100 + k)}), now)
			if err != nil {
				break
			}
			n.beganOne(w)
			n.row = row
		}
	case evDeliver:
		n.sends[i].phase = delivered
	case evDoubt:
		n.row = t.doubt(n.row, n.sends[i].code)
		n.sends[i].doubted = true
	case evReturnOK:
		n.sends[i].phase = returnedOK
		spec.returnedOK(i)
	case evConfirm:
		n.row = t.of(n.sends[i]).confirm(n.row, n.sends[i].code, now)
		if n.sends[i].phase == delivered {
			n.sends[i].phase = returnedOK
			spec.returnedOK(i)
			if n.sends[i].pushed { // it succeeded, and may have been pushed out before this late confirm
				spec.letLose(i)
			}
		}
	case evWithdraw:
		n.row = t.of(n.sends[i]).withdraw(n.row, n.sends[i].code, now)
		if n.sends[i].phase == inFlight {
			n.sends[i].phase = withdrawn
			spec.returnedRejected(i, n.sends[i].used)
		}
	case evCheck, evCheckByOlder:
		if err := n.check(e, t, w, spec); err != nil {
			return n, err
		}
	case evTick:
		n.tick++
	case evPurge:
		n.row = State{}
	}
	for context := range max(1, w.contexts) {
		specs[context].letSucceed(n.pending(context))
	}
	for i := range n.begun {
		if n.expired(i) {
			specs[n.sends[i].context].expire(i)
		}
	}
	n.forget()
	if n.stormed {
		specs[0].letStrangerSucceed()
	}
	for context := range n.guaranteed(w) {
		if !specs[context].legal() {
			return n, errors.New("not linearizable: no order of the calls explains the results")
		}
	}
	return n, n.deadSMS(t, w)
}

// guaranteed returns the number of contexts with all guarantees.
func (n *node) guaranteed(w world) int {
	if w.lossy {
		return 1
	}
	return max(1, w.contexts)
}

// forget drops counts that no longer matter, so that nodes that differ only in them are
// equal. A code that is used, withdrawn or expired must not be accepted even once, and G2
// does not apply to it or to a replaced code.
func (n *node) forget() {
	for i := range n.begun {
		s := &n.sends[i]
		over := s.used || s.phase == withdrawn || n.expired(i)
		if over {
			s.compared = 0
		}
		if over || s.pushed || n.replaced(i) {
			s.calls = 0
		}
	}
}

// beganOne counts a begin for each earlier send, before it is in the row. Of sends that have not
// returned OK, only the first code and the newest six count (docs/architecture.md, known
// limitations), and one less for each other context. The one that begins is one of the six until its
// outcome is known.
func (n *node) beganOne(w world) {
	for i := range n.begun {
		s := &n.sends[i]
		s.younger++
		first := slices.IndexFunc(n.row.Codes, func(c Code) bool { return n.unexpired(c) && contextOf(s.code.MAC).has(c) })
		isFirst := first >= 0 && n.row.Codes[first].SendID == s.code.SendID
		if s.phase != returnedOK && n.tick > s.tick && s.younger >= maxCodes-max(1, w.contexts) && !isFirst {
			s.pushed = true
		}
	}
}

// check is a Valid call with the code of a send, in the context of the event.
func (n *node) check(e event, t transitions, w world, spec oracle) error {
	check := t.check
	if e.kind == evCheckByOlder {
		check = t.older.check
	}
	send := int(e.send)
	for i := range n.begun {
		s := &n.sends[i]
		if s.context != e.context && e.kind != evCheckByOlder { // the older release counts all codes
			continue
		}
		s.calls = min(s.calls+1, w.limit)
		if !n.live(i, t) {
			continue
		}
		s.compared++
		if w.totals {
			s.total++
		}
		if s.compared > w.limit {
			return fmt.Errorf("G1: code %c was compared with %d calls since the last match, want %d at most", 'A'+i, s.compared, w.limit)
		}
	}
	row, valid, _ := check(n.row, modelMACs[e.context][1+send], n.now())
	n.row = row
	if valid {
		if n.sends[send].used {
			return fmt.Errorf("rule 4: code %c was accepted twice", 'A'+send)
		}
		if n.sends[send].context != e.context {
			return fmt.Errorf("code %c was accepted in another context", 'A'+send)
		}
		n.sends[send].used = true
		for i := range n.begun {
			if n.sends[i].context == e.context || e.kind == evCheckByOlder {
				n.sends[i].calls, n.sends[i].compared = 0, 0
			}
		}
	}
	right := send != wrongCode && n.sends[send].context == e.context && !n.expired(send)
	spec.checked(send, right, valid, n.begun)
	if int(e.context) < n.guaranteed(w) && !spec.legal() {
		return fmt.Errorf("not linearizable: no order of the calls explains the last result, %v", valid)
	}
	return nil
}

// deadSMS checks G2: it returns an error if a code reached a phone and is rejected without
// a reason in the rules.
func (n *node) deadSMS(t transitions, w world) error {
	for i := range n.begun {
		s := &n.sends[i]
		reached := int(s.context) < n.guaranteed(w) && (s.phase == delivered || s.phase == returnedOK)
		if reached && !s.used && !s.pushed && s.calls < w.limit && !n.expired(i) && !n.replaced(i) && !n.live(i, t) {
			return fmt.Errorf("G2: code %c is on the phone and rejected, but is not replaced, used, expired or exhausted", 'A'+i)
		}
	}
	return nil
}
