package verify

// This file says what the service promises, without a word of how it does it.
//
// The sequential specification (rules 2 to 4 of docs/guarantees.md) knows one thing
// of a number: which code is current, if any, and how many calls it has left.
//
//	a send succeeds        its code is current, with AttemptLimit calls left
//	a send fails           nothing changes
//	a check of any code    true when that code is current and within its life,
//	                       and then none is current; otherwise false, and the
//	                       current code has one call less
//
// Linearizability asks whether the answers of overlapping calls can be explained
// by running them one after the other, each at one instant between its begin and
// its return. A check is one transition, so its instant is known. A send's is not:
// it may have succeeded at any instant from its begin on. The oracle therefore
// keeps *every* state that the specification may be in, as one does to run a
// nondeterministic automaton: each step adds what may have happened and strikes
// what contradicts the answer. Where nothing is left, no explanation exists and
// the history is illegal.
//
//	begin      from here on the send may succeed at any instant, once
//	returned OK            states in which it has not succeeded are struck
//	returned a refusal     states in which it has succeeded are struck, unless
//	                       its code was accepted meanwhile (a limit that
//	                       docs/architecture.md states: a lucky guess)
//	crashed, or unknown    never returns: may succeed at any instant, or never

// none stands for no current code.
const none = 0

// An oracle is the set of states that the specification may be in: for every set
// of sends that have succeeded (the index, one bit a send) the possible pairs of
// current code and calls left (a bit each). A slice, so that the explorer of
// model_test.go can keep three sends in an array and the random histories of
// property_test.go ten.
type oracle struct {
	possible []uint64
	limit    int // AttemptLimit
}

// newOracle returns the oracle of a number that was never sent to. possible is
// its memory, 1<<sends words.
func newOracle(possible []uint64, limit int) oracle {
	clear(possible)
	possible[0] = 1 << none
	return oracle{possible, limit}
}

// bit stands for "the code of send is current and has left calls left", send
// counted from 0. Bit 0 stands for "none is current": a code without calls left
// is none.
func (o oracle) bit(send, left int) uint64 {
	if left == 0 {
		return 1 << none
	}
	return 1 << (1 + send*o.limit + left - 1)
}

// legal reports whether the history so far can be explained.
func (o oracle) legal() bool {
	for _, states := range o.possible {
		if states != 0 {
			return true
		}
	}
	return false
}

// letSucceed adds every state that is reached when any of the pending sends (one
// bit each) succeed in any order, now.
func (o oracle) letSucceed(pending int) {
	for succeeded, states := range o.possible { // a set comes after its subsets
		if states == 0 {
			continue
		}
		for send := 0; pending>>send != 0; send++ {
			if bit := 1 << send; pending&bit != 0 && succeeded&bit == 0 {
				o.possible[succeeded|bit] |= o.bit(send, o.limit)
			}
		}
	}
}

// letStrangerSucceed adds, to every state, that a send whose code nobody will
// ever type has succeeded: no known code is current then.
func (o oracle) letStrangerSucceed() {
	for succeeded, states := range o.possible {
		if states != 0 {
			o.possible[succeeded] |= 1 << none
		}
	}
}

// expire expires the code of send: if it is current, none is.
func (o oracle) expire(send int) {
	for succeeded, states := range o.possible {
		for left := 1; left <= o.limit; left++ {
			if bit := o.bit(send, left); states&bit != 0 {
				o.possible[succeeded] = o.possible[succeeded]&^bit | 1<<none
			}
		}
	}
}

// checked strikes the states that contradict the answer valid to a check of the
// code of send (-1: of no send), and steps the others. alive says whether that
// code was within its life.
func (o oracle) checked(send int, alive, valid bool, sends int) {
	for succeeded, states := range o.possible {
		var next uint64
		if states&(1<<none) != 0 && !valid {
			next |= 1 << none
		}
		for current := range sends {
			for left := 1; left <= o.limit; left++ {
				if states&o.bit(current, left) == 0 {
					continue
				}
				switch right := current == send && alive; {
				case right && valid:
					next |= 1 << none
				case !right && !valid:
					next |= o.bit(current, left-1)
				}
			}
		}
		o.possible[succeeded] = next
	}
}

// returnedOK strikes the states in which send has not succeeded.
func (o oracle) returnedOK(send int) {
	for succeeded := range o.possible {
		if succeeded>>send&1 == 0 {
			o.possible[succeeded] = 0
		}
	}
}

// returnedRefused strikes the states in which send has succeeded, unless its
// code was accepted.
func (o oracle) returnedRefused(send int, accepted bool) {
	for succeeded := range o.possible {
		if succeeded>>send&1 == 1 && !accepted {
			o.possible[succeeded] = 0
		}
	}
}
