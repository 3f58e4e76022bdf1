package verify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// This file checks the transitions of State exhaustively. It visits every interleaving of
// a few overlapping sends, checks and clock steps, and checks three properties in every
// state (docs/guarantees.md has G1, G2 and the rules):
//
//   - the results so far are linearizable (the oracle of oracle_test.go);
//   - G1: no code was compared with more than AttemptLimit calls since the last match;
//   - G2: every code that reached a phone is accepted, unless a later send succeeded or
//     the code is used, expired or out of attempts.
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
	// A storm is seven sends of other callers that crash at once.
	stormSends = maxCodes - 1
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
	begin    func(s State, mac MAC, now int64) (next State, sendID int64, sole bool, err error)
	confirm  func(s State, begun Code, now int64) State // begun is the code as begin added it
	withdraw func(s State, begun Code, now int64) State
	check    checkFunc
	// soleAtLoad is true for a mutant: sole is true of an earlier load, not of the replaced state.
	soleAtLoad bool
	// older are the transitions of replicas of an older release, which run beside these.
	older *transitions
}

type checkFunc func(s State, macs []MAC, now int64) (next State, valid, changed bool)

func transitionsOf(r Rules) transitions {
	return transitions{
		begin:    r.Begin,
		confirm:  func(s State, begun Code, now int64) State { return r.Confirm(s, begun.SendID, now) },
		withdraw: func(s State, begun Code, now int64) State { return r.Withdraw(s, begun.SendID, now) },
		check:    r.Check,
	}
}

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
	noCode  bool                    // the last evLoad found no live code
	spec    [1 << modelSends]uint64 // states of the oracle
}

type modelSend struct {
	phase    phase
	code     Code // as begin added it
	tick     int  // of the begin
	sole     bool
	older    bool // the replica has the older release
	used     bool // accepted once
	calls    int  // checks of the number since the begin, or since the last match
	compared int  // of these, the ones that could have accepted it
	total    int  // as compared, not reset by a match; 0 unless world.totals
	younger  int  // sends begun later
	pushed   bool // its unknown outcome may have been pushed out
}

func (n *node) now() int64 { return modelZero + int64(n.tick)*modelTick.Microseconds() }

func (n *node) expired(i int) bool { return n.tick-n.sends[i].tick >= 2 }

// superseded reports whether a send begun after i has succeeded: its call
// returned OK, or its code was accepted.
func (n *node) superseded(i int) bool {
	return slices.ContainsFunc(n.sends[i+1:n.begun], func(s modelSend) bool { return s.phase == returnedOK || s.used })
}

// pending returns the sends that may still succeed, one bit each.
func (n *node) pending() (bits int) {
	for i := range n.begun {
		if p := n.sends[i].phase; p == inFlight || p == delivered {
			bits |= 1 << i
		}
	}
	return bits
}

// key encodes the parts of a node that can affect later steps.
func (n *node) key(b []byte, w world) string {
	b = binary.AppendVarint(b[:0], n.row.LastSendID)
	for _, c := range n.row.Codes {
		b = append(b, c.MAC[0], c.Attempts)
		b = binary.AppendVarint(b, c.SendID)
		b = binary.AppendVarint(b, (c.BegunAt-modelZero)/modelTick.Microseconds())
	}
	b = append(b, 0xff, byte(n.begun), byte(n.tick), byte(flag(n.stormed)|flag(n.noCode)<<1))
	for _, s := range n.sends[:n.begun] {
		b = append(b, byte(s.phase), byte(s.tick), byte(flag(s.used)|flag(s.pushed)<<1|flag(s.sole)<<2|flag(s.older)<<3),
			byte(min(s.calls, w.limit)), byte(s.compared), byte(s.total))
		b = binary.AppendVarint(b, s.code.SendID)
		if w.storm {
			b = append(b, byte(s.younger))
		}
	}
	for _, states := range n.spec {
		b = binary.AppendUvarint(b, states)
	}
	return string(b)
}

func flag(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// Kinds of events. An event of a send has its number.
type eventKind uint8

const (
	evBegin eventKind = iota
	evBeginByOlder
	evLoad
	evDeliver
	evReturnOK
	evConfirm
	evWithdraw
	evCheck
	evTick
	evPurge
	evStorm
	evCheckByOlder
)

type event struct {
	kind eventKind
	send int8
}

func (e event) String() string {
	of := " " + string(rune('A'+e.send))
	switch e.kind {
	case evBegin:
		return "begin" + of
	case evBeginByOlder:
		return "begin" + of + " by the older release"
	case evLoad:
		return "a load by a later begin"
	case evDeliver:
		return of[1:] + " reaches the phone"
	case evReturnOK:
		return of[1:] + " returns OK without confirm"
	case evConfirm:
		return "confirm" + of
	case evWithdraw:
		return "withdraw" + of
	case evCheck, evCheckByOlder:
		by := ""
		if e.kind == evCheckByOlder {
			by = " by the older release"
		}
		if e.send == wrongCode {
			return "check a wrong code" + by
		}
		return "check" + of + by
	case evTick:
		return "half a life passes"
	case evPurge:
		return "the row is purged"
	default:
		return "seven others begin and crash"
	}
}

// events appends every event that is possible at n.
func (n *node) events(to []event, w world, t transitions) []event {
	if n.begun < w.sends {
		to = append(to, event{evBegin, int8(n.begun)})
		if t.older != nil {
			to = append(to, event{evBeginByOlder, int8(n.begun)})
		}
		if w.loads {
			to = append(to, event{kind: evLoad})
		}
	}
	for i := range n.begun {
		send := int8(i)
		to = append(to, event{evCheck, send})
		switch n.sends[i].phase {
		case inFlight:
			to = append(to, event{evDeliver, send}, event{evWithdraw, send})
		case delivered, returnedOK:
			if !n.sends[i].sole {
				to = append(to, event{evConfirm, send})
			} else if n.sends[i].phase == delivered {
				to = append(to, event{evReturnOK, send})
			}
		case withdrawn:
			to = append(to, event{evWithdraw, send})
		}
	}
	to = append(to, event{evCheck, wrongCode})
	if t.older != nil {
		for i := wrongCode; i < n.begun; i++ {
			to = append(to, event{evCheckByOlder, int8(i)})
		}
	}
	if n.tick < w.ticks {
		to = append(to, event{kind: evTick})
	}
	// A row is kept for the retention. The model uses a lower bound: no code of the row
	// lives. So confirms and withdraws may also come after their row was purged.
	if n.row.LastSendID != 0 && !slices.ContainsFunc(n.row.Codes, n.unexpired) &&
		n.tick >= n.lastBegin()+2 {
		to = append(to, event{kind: evPurge})
	}
	if w.storm && !n.stormed {
		to = append(to, event{kind: evStorm})
	}
	return to
}

func (n *node) unexpired(c Code) bool { return n.now() < c.BegunAt+modelTTL.Microseconds() }

func (n *node) lastBegin() int {
	last := -2
	if n.begun > 0 {
		last = n.sends[n.begun-1].tick
	}
	return last
}

// modelMAC returns the MAC of a send's code.
func modelMAC(send int) MAC { return MAC{byte(send + 2)} }

var modelMACs = func() (macs [1 + modelSends][]MAC) { // wrongCode first
	for i := range macs {
		macs[i] = []MAC{modelMAC(i - 1)}
	}
	return macs
}()

// live reports whether the code of a send would be accepted now.
func (n *node) live(send int, t transitions) bool {
	_, valid, _ := t.check(n.row, modelMACs[1+send], n.now())
	return valid
}

// step returns the node after e, and an error if it violates a property.
func (n node) step(e event, t transitions, w world) (node, error) {
	spec := oracle{n.spec[:], w.limit}
	now := n.now()
	i := int(e.send)
	switch e.kind {
	case evLoad:
		n.noCode = !slices.ContainsFunc(n.row.Codes, n.unexpired)
	case evBegin, evBeginByOlder:
		begin := t.begin
		if e.kind == evBeginByOlder {
			begin = t.older.begin
		}
		row, sendID, sole, err := begin(n.row, modelMAC(i), now)
		if err != nil {
			return n, nil // nothing was sent; the call may come again later
		}
		if t.soleAtLoad {
			sole = n.noCode
		}
		n.beganOne()
		n.row = row
		n.sends[i] = modelSend{
			phase: inFlight, tick: n.tick, code: Code{SendID: sendID, MAC: modelMAC(i), BegunAt: now},
			sole: sole, older: e.kind == evBeginByOlder,
		}
		n.begun++
	case evStorm:
		n.stormed = true
		for k := range stormSends {
			row, _, _, err := t.begin(n.row, MAC{byte(100 + k)}, now)
			if err != nil {
				break
			}
			n.beganOne()
			n.row = row
		}
	case evDeliver:
		n.sends[i].phase = delivered
	case evReturnOK:
		n.sends[i].phase = returnedOK
		spec.returnedOK(i)
	case evConfirm:
		n.row = t.of(n.sends[i]).confirm(n.row, n.sends[i].code, now)
		if n.sends[i].phase == delivered {
			n.sends[i].phase = returnedOK
			spec.returnedOK(i)
		}
	case evWithdraw:
		n.row = t.of(n.sends[i]).withdraw(n.row, n.sends[i].code, now)
		if n.sends[i].phase == inFlight {
			n.sends[i].phase = withdrawn
			spec.returnedRejected(i, n.sends[i].used)
		}
	case evCheck, evCheckByOlder:
		check := t.check
		if e.kind == evCheckByOlder {
			check = t.older.check
		}
		if err := n.check(i, check, t, w, spec); err != nil {
			return n, err
		}
	case evTick:
		n.tick++
	case evPurge:
		n.row = State{}
	}
	spec.letSucceed(n.pending())
	for i := range n.begun {
		if n.expired(i) {
			spec.expire(i)
		}
	}
	n.forget()
	if n.stormed {
		spec.letStrangerSucceed()
	}
	if !spec.legal() {
		return n, errors.New("not linearizable: no order of the calls explains the results")
	}
	return n, n.deadSMS(t, w)
}

// forget drops counts that no longer matter, so that nodes that differ only in them are
// equal. A code that is used, withdrawn or expired must not be accepted even once, and G2
// does not apply to it or to a superseded code.
func (n *node) forget() {
	for i := range n.begun {
		s := &n.sends[i]
		over := s.used || s.phase == withdrawn || n.expired(i)
		if over {
			s.compared = 0
		}
		if over || s.pushed || n.superseded(i) {
			s.calls = 0
		}
	}
}

// beganOne counts a begin for each earlier send, before it is in the row. Of sends that have not
// returned OK, only the first code and the newest six count (docs/architecture.md, known
// limitations). The one that begins is one of the six until its outcome is known.
func (n *node) beganOne() {
	first := slices.IndexFunc(n.row.Codes, n.unexpired)
	for i := range n.begun {
		s := &n.sends[i]
		s.younger++
		isFirst := first >= 0 && n.row.Codes[first].SendID == s.code.SendID
		if s.phase != returnedOK && n.tick > s.tick && s.younger >= maxCodes-1 && !isFirst {
			s.pushed = true
		}
	}
}

// check is a Valid call with the code of a send.
func (n *node) check(send int, check checkFunc, t transitions, w world, spec oracle) error {
	for i := range n.begun {
		s := &n.sends[i]
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
	row, valid, _ := check(n.row, modelMACs[1+send], n.now())
	n.row = row
	if valid {
		if n.sends[send].used {
			return fmt.Errorf("rule 4: code %c was accepted twice", 'A'+send)
		}
		n.sends[send].used = true
		for i := range n.begun {
			n.sends[i].calls, n.sends[i].compared = 0, 0
		}
	}
	spec.checked(send, send != wrongCode && !n.expired(send), valid, n.begun)
	if !spec.legal() {
		return fmt.Errorf("not linearizable: no order of the calls explains the last result, %v", valid)
	}
	return nil
}

// deadSMS checks G2: it returns an error if a code reached a phone and is rejected without
// a reason in the rules.
func (n *node) deadSMS(t transitions, w world) error {
	for i := range n.begun {
		s := &n.sends[i]
		reached := s.phase == delivered || s.phase == returnedOK
		if reached && !s.used && !s.pushed && s.calls < w.limit && !n.expired(i) && !n.superseded(i) && !n.live(i, t) {
			return fmt.Errorf("G2: code %c is on the phone and rejected, but is not superseded, used, expired or spent", 'A'+i)
		}
	}
	return nil
}

// An exploration is the result of explore.
type exploration struct {
	states, steps int
	mostCompared  int // calls that one code was compared with since a match
	mostInAll     int // calls that one code was compared with; 0 unless world.totals
	wrong         error
	trace         []event // the shortest path to wrong
}

func (e exploration) String() string {
	if e.wrong == nil {
		return fmt.Sprintf("%d states, %d steps", e.states, e.steps)
	}
	var steps []string
	for _, ev := range e.trace {
		steps = append(steps, ev.String())
	}
	return fmt.Sprintf("%v\n\tafter: %s\n\t(%d states seen)", e.wrong, strings.Join(steps, "; "), e.states)
}

// explore visits each state of w once, breadth first, until it has seen all states or found
// a violation.
func explore(w world, t transitions) (seen exploration) {
	type step struct { // the first step to a state
		from int32
		by   event
	}
	var first node
	newOracle(first.spec[:], w.limit)
	var key []byte
	visited := map[string]struct{}{first.key(key, w): {}}
	steps := []step{{from: -1}}
	frontier := []node{first}
	var events []event
	for base := 0; len(frontier) > 0; {
		var next []node
		for f := range frontier {
			n := &frontier[f]
			events = n.events(events[:0], w, t)
			for _, e := range events {
				seen.steps++
				m, err := n.step(e, t, w)
				if err != nil {
					seen.wrong, seen.trace = err, []event{e}
					for at := base + f; steps[at].from >= 0; at = int(steps[at].from) {
						seen.trace = append(seen.trace, steps[at].by)
					}
					slices.Reverse(seen.trace)
					seen.states = len(visited)
					return seen
				}
				k := m.key(key, w)
				if _, known := visited[k]; known {
					continue
				}
				visited[k] = struct{}{}
				steps = append(steps, step{int32(base + f), e})
				next = append(next, m)
				for _, s := range m.sends {
					seen.mostCompared = max(seen.mostCompared, s.compared)
					seen.mostInAll = max(seen.mostInAll, s.total)
				}
			}
		}
		base += len(frontier)
		frontier = next
	}
	seen.states = len(visited)
	return seen
}

func TestModel_EveryInterleavingKeepsTheGuarantees(t *testing.T) {
	for _, c := range []struct {
		name  string
		world world
		floor int // states; fewer means that explore misses some
	}{
		{"one attempt, three sends, codes expire, rows are purged", world{limit: 1, sends: 3, ticks: 3}, 45_000},
		{"two attempts, three sends, codes expire, rows are purged", world{limit: 2, sends: 3, ticks: 2}, 70_000},
		{"three attempts, three sends, codes expire, rows are purged", world{limit: 3, sends: 3, ticks: 2}, 200_000},
		{"one attempt, three sends, and the list is full", world{limit: 1, sends: 3, ticks: 1, storm: true}, 75_000},
		{"three attempts, two sends, and the list is full", world{limit: 3, sends: 2, ticks: 2, storm: true}, 70_000},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			seen := explore(c.world, transitionsOf(c.world.rules()))
			if seen.wrong != nil {
				t.Fatalf("got %v", seen)
			}
			t.Logf("no violation in %v", seen)
			if seen.states < c.floor {
				t.Errorf("got %d states, want at least %d", seen.states, c.floor)
			}
			if seen.mostCompared != c.world.limit {
				t.Errorf("calls that one code was compared with between two matches: got %d at most, want %d", seen.mostCompared, c.world.limit)
			}
		})
	}
}

// A match sets the attempts of newer codes to zero (rule 3 of docs/guarantees.md: their
// sends succeed after it). So a code can be compared with AttemptLimit calls for itself, and
// with as many for each older code that is used before it.
func TestModel_CodeIsComparedAtMostLimitTimesPerSend(t *testing.T) {
	for limit := 1; limit <= 3; limit++ {
		t.Run(fmt.Sprintf("limit %d", limit), func(t *testing.T) {
			t.Parallel()
			w := world{limit: limit, sends: 3, totals: true}
			seen := explore(w, transitionsOf(w.rules()))
			if want := limit * 3; seen.wrong != nil || seen.mostInAll != want {
				t.Errorf("three sends: got %d comparisons with one code at most, want %d (%v)", seen.mostInAll, want, seen)
			}
		})
	}
}
