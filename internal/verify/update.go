package verify

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"time"
)

const (
	// storeTimeout is the maximum time that a call waits for the store. It is short, so
	// that the caller gets UNAVAILABLE before the caller's own deadline.
	storeTimeout = 3 * time.Second
	// maxConcurrentUpdates is the maximum number of foreground updates (begin and check)
	// that use the store at once. Background updates are not limited, so the outcome of
	// a paid SMS never waits for a slot.
	maxConcurrentUpdates = 256
	// maxStoreFailures is the number of failures after which a foreground update gives
	// up. Only loads and swaps that were definitely not applied count.
	maxStoreFailures = 5
)

// transition computes the next state of a number. If there is nothing to store, it returns
// errUnchanged. After a conflict it is called again, with a newer snapshot.
type transition func(*snapshot) (State, error)

var errUnchanged = errors.New("unchanged")

// snapshot is the input of a transition. The transition may change history, which is stored
// with the next state.
type snapshot struct {
	state   State
	history History
	now     int64 // microseconds since 1970
	// inDoubt means that an earlier swap of the same update has an unknown outcome that
	// can no longer be found out. The swap may have been applied, and another writer has
	// replaced the record since.
	inDoubt bool
}

// update changes the record of one number with optimistic concurrency control. Each step loads
// the record, computes the next one and swaps it in. After a conflict, the next step computes it
// again.
//
// After a swap of unknown outcome, the next step loads the record and compares its version:
//   - the new version: the swap was applied, and the update is done.
//   - the old version: the step repeats the same swap, which takes effect at most once.
//   - another version: the step computes the next record again, inDoubt.
type update struct {
	v           *Verifier
	number      Number
	next        transition
	maxFailures int // of loads and swaps, 0 means no limit; conflicts do not count

	// known is the record of the number, as far as the update knows. Another writer may
	// have replaced it. If it is the zero Record, the next step loads the record.
	known    Record
	base     Version // the version that the last swap replaces
	swap     Record  // the record that the last swap writes
	unknown  bool    // the outcome of the last swap is unknown
	inDoubt  bool    // see snapshot
	failures int
	lastErr  error
}

// updateForCaller runs a foreground update: with a timeout of storeTimeout and with one of the
// storeSlots. If the caller disconnects, it does not cancel a running statement. That would
// close the database connection and leave the outcome of a swap unknown.
func (v *Verifier) updateForCaller(callerCtx context.Context, n Number, next transition) (Record, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(callerCtx), storeTimeout)
	defer cancel()
	select {
	case v.storeSlots <- struct{}{}:
		defer func() { <-v.storeSlots }()
	case <-callerCtx.Done():
		return Record{}, callerGone(callerCtx)
	case <-ctx.Done():
		return Record{}, fmt.Errorf("%w: too many calls at once", ErrStoreUnavailable)
	}
	u := update{v: v, number: n, next: next, maxFailures: maxStoreFailures}
	return u.run(callerCtx, ctx)
}

func callerGone(ctx context.Context) error { return fmt.Errorf("%w: %w", ErrCallerGone, ctx.Err()) }

// run repeats the step until the update is done, and returns the record that the number then
// had. It returns an error of next or of decodeState unchanged.
//
// run gives up if ctx ends. If no swap has an unknown outcome, it also gives up after
// maxFailures, and between two steps if callerCtx ended. With inDoubt, it gives up after
// maxFailures too. The error is ErrOutcomeUnknown if a swap has an unknown outcome, ErrCallerGone
// if run gave up because of callerCtx, and ErrStoreUnavailable otherwise.
func (u *update) run(callerCtx, ctx context.Context) (Record, error) {
	for retries := 1; ; retries++ {
		if done, err := u.step(callerCtx, ctx); done {
			return u.known, err
		}
		if err := backOff(ctx, retries); err != nil {
			return Record{}, u.giveUp(cmp.Or(u.lastErr, err))
		}
	}
}

// step loads, computes and swaps once. It reports whether the update is done.
func (u *update) step(callerCtx, ctx context.Context) (done bool, err error) {
	if callerCtx.Err() != nil && ctx.Err() == nil && !u.unknown && !u.inDoubt {
		return true, callerGone(callerCtx)
	}
	current := u.known
	if current.Version == (Version{}) {
		if current, err = u.v.Store.Load(ctx, u.number); err != nil {
			return u.failed(err)
		}
	}
	u.known = Record{}
	if u.swap.Version != (Version{}) && current.Version == u.swap.Version {
		u.known = current // the swap was applied; also after a conflict, since a proxy may repeat swaps
		return true, nil
	}
	if u.unknown && current.Version != u.base {
		// Another writer replaced the record, before this swap or after it.
		u.unknown, u.inDoubt = false, true
	}
	if !u.unknown {
		next, err := u.compute(current)
		if errors.Is(err, errUnchanged) {
			u.known = current
			return true, nil
		}
		if err != nil {
			return true, err
		}
		u.base, u.swap = current.Version, next
	}
	applied, err := u.v.Store.Swap(ctx, u.number, u.base, u.swap)
	switch {
	case applied:
		u.known = u.swap
		return true, nil
	case errors.Is(err, ErrOutcomeUnknown):
		u.unknown, u.lastErr = true, err
	case err != nil:
		return u.failed(err)
	}
	return false, nil
}

// compute returns the record that follows current, with a new random version.
func (u *update) compute(current Record) (Record, error) {
	state, err := decodeState(current.State)
	if err != nil {
		return Record{}, err
	}
	s := snapshot{state, decodeHistory(current.State), u.v.Now().UnixMicro(), u.inDoubt}
	next, err := u.next(&s)
	if err != nil {
		return Record{}, err
	}
	record := Record{State: s.history.appendTo(next.encode()), BegunAt: current.BegunAt}
	if next.LastSendID != state.LastSendID {
		record.BegunAt = s.now
	}
	rand.Read(record.Version[:])
	return record, nil
}

// failed counts a load or a swap that failed without effect. It is the end of a step.
func (u *update) failed(err error) (done bool, _ error) {
	u.lastErr = err
	if u.failures++; u.maxFailures > 0 && u.failures >= u.maxFailures && !u.unknown {
		return true, u.giveUp(err)
	}
	return false, nil
}

// giveUp formats the cause with %s, not %w. An error that wraps two errors of this package would
// get the status of the one that is tested first.
func (u *update) giveUp(cause error) error {
	if u.unknown || u.inDoubt {
		return fmt.Errorf("%w: %s", ErrOutcomeUnknown, cause.Error())
	}
	return fmt.Errorf("%w: %s", ErrStoreUnavailable, cause.Error())
}

// backOff waits before a retry. The time is random, so that writers that conflicted do not
// conflict again. Its maximum grows to a quarter of a second, so that retries do not overload a
// store that recovers from a failure.
func backOff(ctx context.Context, retries int) error {
	longest := time.Millisecond << min(retries, 8)
	timer := time.NewTimer(mathrand.N(longest)) //nolint:gosec // jitter, not a secret
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
