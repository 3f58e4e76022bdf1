package verify

// This file has the sequential specification of the service, and an oracle that decides if
// a concurrent history fits it. It does not depend on the implementation.
//
// The state of the specification (rules 2 to 4 of docs/guarantees.md) is the current code of
// the number, if there is one, and the number of calls that it has left:
//
//	a send succeeds        its code becomes current, with AttemptLimit calls left
//	a send fails           no change
//	a check of any code    true if that code is current and within its life; then no
//	                       code is current. Otherwise false, and the current code has
//	                       one call less.
//
// A history is linearizable if the results of overlapping calls can be explained by running
// them one after the other, each at one instant between its begin and its return. A check is
// one transition, so its instant is known. The instant of a send is not known: it may have
// succeeded at any time since its begin. So the oracle keeps *every* state that the
// specification may be in, as in the simulation of a nondeterministic automaton. Each step
// adds the states that are possible now, and removes those that contradict the result. If no
// state is left, the history is illegal.
//
//	begin                  the send may succeed at any later instant, once
//	returned OK            removes the states in which it has not succeeded
//	returned a rejection   removes the states in which it has succeeded, unless its
//	                       code was accepted before (a lucky guess: see the known
//	                       limitations in docs/architecture.md)
//	crashed, or unknown    never returns: may succeed at any later instant, or never

// none is the bit of "no code is current".
const none = 0

// An oracle is the set of states that the specification may be in. possible has one word
// for each set of sends that have succeeded (the index, one bit a send). A word has one bit
// for each possible pair of current code and calls left. It is a slice, since model_test.go
// keeps three sends in an array, and property_test.go ten.
type oracle struct {
	possible []uint64
	limit    int // AttemptLimit
}

// newOracle returns the oracle of a number without a send. possible is its storage, with
// 1<<sends words.
func newOracle(possible []uint64, limit int) oracle {
	clear(possible)
	possible[0] = 1 << none
	return oracle{possible, limit}
}

// bit returns the bit of "the code of send is current and has left calls left". Sends are
// counted from 0. A code without calls left is not current: its bit is that of none.
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

// letSucceed adds every state that is reached if any of the pending sends (one bit each)
// succeed now, in any order.
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

// letStrangerSucceed adds to every state that a send succeeded whose code no caller types:
// then no known code is current.
func (o oracle) letStrangerSucceed() {
	for succeeded, states := range o.possible {
		if states != 0 {
			o.possible[succeeded] |= 1 << none
		}
	}
}

// letLose adds to every state in which the code of send is current one in which it is lost.
func (o oracle) letLose(send int) {
	for succeeded, states := range o.possible {
		for left := 1; left <= o.limit; left++ {
			if states&o.bit(send, left) != 0 {
				o.possible[succeeded] |= 1 << none
			}
		}
	}
}

// expire ends the life of the code of send: if it is current, no code is current now.
func (o oracle) expire(send int) {
	for succeeded, states := range o.possible {
		for left := 1; left <= o.limit; left++ {
			if bit := o.bit(send, left); states&bit != 0 {
				o.possible[succeeded] = o.possible[succeeded]&^bit | 1<<none
			}
		}
	}
}

// checked removes the states that contradict the result valid of a check of the code of send
// (-1: of no send), and advances the others. alive reports whether the code was within its
// life.
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

// returnedOK removes the states in which send has not succeeded.
func (o oracle) returnedOK(send int) {
	for succeeded := range o.possible {
		if succeeded>>send&1 == 0 {
			o.possible[succeeded] = 0
		}
	}
}

// returnedRejected removes the states in which send has succeeded, unless its code was
// accepted.
func (o oracle) returnedRejected(send int, accepted bool) {
	for succeeded := range o.possible {
		if succeeded>>send&1 == 1 && !accepted {
			o.possible[succeeded] = 0
		}
	}
}
