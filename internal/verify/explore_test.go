package verify

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

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
	evDoubt
)

type event struct {
	kind    eventKind
	send    int8
	context int8
	keyed   bool
}

func (e event) String() string {
	of := " " + string(rune('A'+e.send))
	if e.send == wrongCode {
		of = " a wrong code"
	}
	if e.context != 0 {
		of += " in another context"
	}
	if e.keyed {
		of += " with the key"
	}
	switch e.kind {
	case evBegin:
		return "begin" + of
	case evBeginByOlder:
		return "begin" + of + " by the older release"
	case evLoad:
		return "a load by a later begin"
	case evDeliver:
		return of[1:] + " reaches the phone"
	case evDoubt:
		return "doubt" + of
	case evReturnOK:
		return of[1:] + " returns OK without confirm"
	case evConfirm:
		return "confirm" + of
	case evWithdraw:
		return "withdraw" + of
	case evCheck:
		return "check" + of
	case evCheckByOlder:
		return "check" + of + " by the older release"
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
	contexts := int8(max(1, w.contexts))
	if n.begun < w.sends {
		begun := int8(n.begun)
		for context := range contexts {
			to = append(to, event{kind: evBegin, send: begun, context: context})
			if w.keys {
				to = append(to, event{kind: evBegin, send: begun, context: context, keyed: true})
			}
		}
		if t.older != nil {
			to = append(to, event{kind: evBeginByOlder, send: begun})
		}
		if w.loads {
			to = append(to, event{kind: evLoad})
		}
	}
	for i := range n.begun {
		s := n.sends[i]
		add := func(kind eventKind) { to = append(to, event{kind: kind, send: int8(i), context: s.context}) }
		switch {
		case s.doubted: // its call has returned
			if s.phase == inFlight {
				add(evDeliver)
			}
		case s.phase == inFlight:
			add(evDeliver)
			add(evWithdraw)
		case s.phase == withdrawn:
			add(evWithdraw)
		case !s.sole || s.keyed:
			add(evConfirm)
		case s.phase == delivered:
			add(evReturnOK)
		}
		if s.keyed && (s.phase == inFlight || s.phase == delivered) {
			add(evDoubt)
		}
	}
	for context := range contexts {
		for i := int8(wrongCode); int(i) < n.begun; i++ {
			to = append(to, event{kind: evCheck, send: i, context: context})
		}
	}
	if t.older != nil {
		for i := int8(wrongCode); int(i) < n.begun; i++ {
			to = append(to, event{kind: evCheckByOlder, send: i})
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
	for context := range first.spec {
		newOracle(first.spec[context][:], w.limit)
	}
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
		{"two contexts, one attempt, three sends", world{limit: 1, sends: 3, ticks: 1, contexts: 2}, 100_000},
		{"two contexts, two attempts, two sends, codes expire, rows are purged", world{limit: 2, sends: 2, ticks: 3, contexts: 2}, 25_000},
		{"two contexts, two attempts, two sends, and the list is full", world{limit: 2, sends: 2, ticks: 1, contexts: 2, storm: true}, 20_000},
		{"a key, one attempt, three sends", world{limit: 1, sends: 3, keys: true}, 20_000},
		{"a key, one attempt, two sends, codes expire, rows are purged", world{limit: 1, sends: 2, ticks: 3, keys: true}, 5_000},
		{"a key, two contexts, one attempt, two sends", world{limit: 1, sends: 2, ticks: 1, contexts: 2, keys: true}, 5_000},
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
