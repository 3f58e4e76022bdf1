package verify

import (
	"context"
	"fmt"
	"math"
	"time"
)

// outcomeTimeout is the maximum time of a background update.
const outcomeTimeout = 60 * time.Second

// updateInBackground starts an update that continues if ctx ends. known is the record that the
// number probably has, or the zero Record. The channel receives true if the update was stored, or
// if there was nothing to store.
//
// next must be idempotent: it may run again after a swap that was applied.
func (v *Verifier) updateInBackground(ctx context.Context, n Number, known Record, next transition) <-chan bool {
	stored := make(chan bool, 1)
	v.background.Add(1)
	go func() {
		defer v.background.Add(-1)
		var err error
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
		u := update{v: v, number: n, next: next, maxFailures: math.MaxInt, known: known}
		_, err = u.run(ctx, ctx)
	}()
	return stored
}

// await waits at most storeTimeout for an update, and reports whether it was stored.
func await(stored <-chan bool) bool {
	select {
	case ok := <-stored:
		return ok
	case <-time.After(storeTimeout):
		return false
	}
}

// Pending returns the number of background updates, which store the outcomes of sends.
func (v *Verifier) Pending() int64 { return v.background.Load() }

// Wait stores the owed acceptances, and waits until no background update is running or ctx is
// done. After a forced stop of the server, calls that are still running can start background
// updates. So Wait polls a counter: a sync.WaitGroup can panic if Add is called during Wait.
func (v *Verifier) Wait(ctx context.Context) {
	v.Drain()
	for v.background.Load() > 0 && ctx.Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
}
