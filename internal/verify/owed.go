package verify

import (
	"context"
	"math"
	"slices"
	"sync"
	"time"
)

const (
	// owedDelay is the time that an acceptance waits for another swap of its number. A person
	// needs about as long to type the code, and the check then stores the acceptance.
	owedDelay    = 10 * time.Second
	owedInterval = time.Second // between two rounds of storeDue
	// maxOwedSwaps has two uses: storeDue runs at most this many swaps together, and it starts
	// none while this many foreground updates run. So under load, acceptances wait for longer
	// than owedDelay.
	maxOwedSwaps = 32
	maxOwed      = 10_000
)

// owed holds acceptances that are not stored yet. Their codes are sole, and stored. Send has
// returned OK. Only the operator needs them, for the time and the BizID.
//
// The next swap of the number in this process stores an acceptance, without a write of its own. If
// there is none within owedDelay, storeDue swaps. The acceptance is lost if the process crashes
// before, if another replica removed the code, or if the swap fails for outcomeTimeout. No code is
// lost then. The log line of the call has the acceptance.
type owed struct {
	mu        sync.Mutex
	accepted  map[Number]Accepted
	scheduled bool // storeDue runs, or will run
	draining  bool
}

// owe adds an acceptance. If too many are owed, or the process stops, it starts to store it. begun
// is the record that the begin wrote.
func (v *Verifier) owe(n Number, begun Record, a Accepted) {
	o := &v.owed
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.draining || len(o.accepted) >= maxOwed {
		v.storeAccepted(n, begun, a)
		return
	}
	if o.accepted == nil {
		o.accepted = map[Number]Accepted{}
	}
	if a.SendID > o.accepted[n].SendID {
		o.accepted[n] = a
	}
	if !o.scheduled {
		o.scheduled = true
		time.AfterFunc(owedInterval, v.storeDue)
	}
}

// of returns the acceptance that is owed for n, or zero.
func (o *owed) of(n Number) Accepted {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.accepted[n]
}

// settle removes an acceptance, unless that of a later send replaced it.
func (o *owed) settle(n Number, a Accepted) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.accepted[n] == a {
		delete(o.accepted, n)
	}
}

// storeDue stores the acceptances that waited for owedDelay. It runs again owedInterval after it
// ended, while any is owed.
func (v *Verifier) storeDue() {
	due := v.Now().Add(-owedDelay).UnixMicro()
	for len(v.storeSlots) < maxOwedSwaps && v.storeOwed(due, maxOwedSwaps) > 0 {
	}
	v.owed.mu.Lock()
	defer v.owed.mu.Unlock()
	if v.owed.scheduled = len(v.owed.accepted) > 0; v.owed.scheduled {
		time.AfterFunc(owedInterval, v.storeDue)
	}
}

// drainOwed starts to store all acceptances. From then on, owe adds none.
func (v *Verifier) drainOwed() {
	v.owed.mu.Lock()
	defer v.owed.mu.Unlock()
	v.owed.draining = true
	if len(v.owed.accepted) == 0 {
		return
	}
	v.background.Add(1)
	go func() {
		defer v.background.Add(-1)
		v.storeOwed(math.MaxInt64, maxOwed)
	}()
}

// storeOwed stores acceptances whose At is not later than until, at most limit of them, and waits
// for their swaps. It returns how many swaps it started.
func (v *Verifier) storeOwed(until int64, limit int) int {
	type storing struct {
		n      Number
		a      Accepted
		stored <-chan bool
	}
	var all []storing
	v.owed.mu.Lock()
	for n, a := range v.owed.accepted {
		if len(all) == limit {
			break
		}
		if a.At <= until {
			all = append(all, storing{n, a, v.storeAccepted(n, Record{}, a)})
		}
	}
	v.owed.mu.Unlock()
	for _, s := range all {
		<-s.stored
		v.owed.settle(s.n, s.a) // also if it failed, which is logged
	}
	return len(all)
}

// storeAccepted starts to store an acceptance, if its code is still in the list.
func (v *Verifier) storeAccepted(n Number, known Record, a Accepted) (stored <-chan bool) {
	return v.updateInBackground(context.Background(), n, known, func(in *snapshot) (State, error) {
		if !slices.ContainsFunc(v.Rules.unexpired(in.state.Codes, in.now), func(c Code) bool { return c.SendID == a.SendID }) {
			return in.state, errUnchanged
		}
		in.history.recordAccepted(a)
		return in.state, nil
	})
}
