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
	// needs about this time to type the code, and the check then stores the acceptance.
	owedDelay    = 10 * time.Second
	owedInterval = time.Second // between two rounds of storeDue
	// maxOwedSwaps has two uses: storeDue runs at most this many swaps together, and it starts
	// none while this many foreground updates run. So under load, acceptances wait for longer
	// than owedDelay.
	maxOwedSwaps  = 32
	maxDrainSwaps = 256    // swaps that Drain runs together
	maxOwed       = 10_000 // acceptances in memory
)

// owed holds acceptances that are not stored yet (write-behind). Their codes are sole, and stored.
// Send has returned OK. Only operators need the acceptances, for the time and the BizID.
//
// The next swap of the number in this process stores an acceptance, without a write of its own. If
// there is no such swap within owedDelay, storeDue swaps. The acceptance is lost if the process
// crashes or another replica removes the code before that, or if the swap fails for outcomeTimeout.
// The code is not lost. The log line of the call has the acceptance.
//
// The next check uses the record that the begin wrote, so that it loads none.
type owed struct {
	mu        sync.Mutex
	accepted  map[Number]owedAcceptance
	scheduled bool // storeDue runs, or will run
	draining  bool // Drain was called
}

// owedAcceptance is an acceptance and the record that the begin of its send wrote. The record is
// zero after takeRecord.
type owedAcceptance struct {
	Accepted
	begun Record
}

// owe adds an acceptance. If maxOwed are owed, or Drain was called, owe starts to store it instead.
// begun is the record that the begin wrote.
func (v *Verifier) owe(n Number, begun Record, a Accepted) {
	o := &v.owed
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.draining || len(o.accepted) >= maxOwed {
		v.storeAccepted(n, begun, a)
		return
	}
	if o.accepted == nil {
		o.accepted = map[Number]owedAcceptance{}
	}
	if a.SendID > o.accepted[n].SendID {
		o.accepted[n] = owedAcceptance{a, begun}
	}
	if !o.scheduled {
		o.scheduled = true
		time.AfterFunc(owedInterval, v.storeDue)
	}
}

// of returns the owed acceptance of n, or the zero Accepted.
func (o *owed) of(n Number) Accepted {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.accepted[n].Accepted
}

// takeRecord returns the record that the begin of the owed acceptance wrote, or the zero Record.
// Another writer may have replaced this record. takeRecord returns it only once, so that a stale
// record causes at most one conflict. It returns no record that Forget may delete before the check
// swaps.
func (o *owed) takeRecord(n Number, now int64) Record {
	o.mu.Lock()
	defer o.mu.Unlock()
	a, ok := o.accepted[n]
	if !ok || !isInFlight(a.begun.BegunAt, now+(storeTimeout+clockTolerance).Microseconds()) {
		return Record{}
	}
	o.accepted[n] = owedAcceptance{Accepted: a.Accepted}
	return a.begun
}

// remove removes an acceptance, unless the acceptance of a later send replaced it.
func (o *owed) remove(n Number, a Accepted) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.accepted[n].Accepted == a {
		delete(o.accepted, n)
	}
}

// storeDue stores the acceptances that waited for owedDelay. As long as an acceptance is owed, it
// runs again owedInterval after its end.
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

// Drain starts to store the owed acceptances. Later acceptances are stored at once. A shutdown begins
// with Drain, and ends with Wait.
func (v *Verifier) Drain() {
	v.owed.mu.Lock()
	defer v.owed.mu.Unlock()
	if v.owed.draining {
		return
	}
	v.owed.draining = true
	v.background.Add(1)
	go func() {
		defer v.background.Add(-1)
		for v.storeOwed(math.MaxInt64, maxDrainSwaps) > 0 {
		}
	}()
}

// storeOwed stores at most limit acceptances whose At is not later than until, and waits for their
// swaps. It returns the number of swaps that it started.
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
			all = append(all, storing{n, a.Accepted, v.storeAccepted(n, Record{}, a.Accepted)})
		}
	}
	v.owed.mu.Unlock()
	for _, s := range all {
		<-s.stored
		v.owed.remove(s.n, s.a) // also if it failed, which is logged
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
