package verify

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// outcomeTimeout is the maximum time of a background update.
const outcomeTimeout = 60 * time.Second

// recordOutcome stores the outcome of a send: next is Confirm or Withdraw. begun is the record
// that the begin wrote. recordOutcome reports whether the outcome was stored within
// storeTimeout. If the time is over, the update continues in the background.
func (v *Verifier) recordOutcome(ctx context.Context, n Number, begun Record, next transition) bool {
	stored := v.updateInBackground(ctx, n, begun, next)
	timer := time.NewTimer(storeTimeout)
	defer timer.Stop()
	select {
	case ok := <-stored:
		return ok
	case <-timer.C:
		return false
	}
}

// updateInBackground starts a goroutine that applies next to the number's record. The goroutine
// continues if ctx ends. The first swap replaces known, or a loaded record if known is the zero Record. The
// channel receives true if the update was stored.
//
// After a swap of unknown outcome, next may be applied a second time.
func (v *Verifier) updateInBackground(ctx context.Context, n Number, known Record, next transition) <-chan bool {
	stored := make(chan bool, 1)
	v.background.Add(1)
	go func() {
		defer v.background.Add(-1)
		err := errors.New("panic")
		defer func() {
			if p := recover(); p != nil { // p could hold a code: do not log it
				err = fmt.Errorf("panic with a %T", p)
			}
			if err != nil {
				v.Log.ErrorContext(ctx, "failed to store send outcome", "number", n.Masked(), "error", err)
			}
			stored <- err == nil
		}()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), outcomeTimeout)
		defer cancel()
		u := update{v: v, number: n, next: next, known: known}
		_, err = u.run(ctx, ctx)
	}()
	return stored
}

// Pending returns the number of background updates, which store the outcomes of sends.
func (v *Verifier) Pending() int64 { return v.background.Load() }

// Wait waits until no background update is running or ctx is done. It polls a counter. A
// sync.WaitGroup would panic if Add is called during Wait. This can happen: after a forced
// stop of the server, calls that are still running can start background updates.
func (v *Verifier) Wait(ctx context.Context) {
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for v.background.Load() > 0 {
		select {
		case <-poll.C:
		case <-ctx.Done():
			return
		}
	}
}
