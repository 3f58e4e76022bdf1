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
	// storeTimeout is the maximum time that a call waits for one update. It is short, so
	// that the caller gets UNAVAILABLE before the caller's own deadline.
	storeTimeout = 3 * time.Second
	// maxConcurrentUpdates is the maximum number of foreground updates (begin and check)
	// that use the store at once. Background updates are not limited, so the outcome of
	// a paid SMS never waits for a slot.
	maxConcurrentUpdates = 256
	// maxStoreFailures is the number of errors of the store after which a foreground
	// update gives up.
	maxStoreFailures = 5
)

// transition computes the next state of a number. If there is nothing to store, it returns
// errUnchanged. After a conflict it is called again, with a newer snapshot.
type transition func(*snapshot) (State, error)

var errUnchanged = errors.New("unchanged")

// snapshot is the input of a transition. The transition may change history, which is stored
// with the next state.
type snapshot struct {
	state        State
	history      History
	now          int64 // microseconds since 1970
	maybeApplied bool  // as in update
}

// update changes the record of one number with optimistic concurrency control: it loads the
// record, computes the next record and swaps. After a conflict it starts again.
//
// If a swap may have been applied, because its reply was lost, the version of the next loaded
// record decides:
//   - the new version: the swap was applied, and the update is done.
//   - the old version: the same swap is repeated. It takes effect at most once.
//   - another version: another writer replaced the record, before the swap or after it. The
//     update starts again, with maybeApplied.
type update struct {
	v           *Verifier
	number      Number
	next        transition
	maxFailures int // errors of the store; conflicts do not count

	known      Record   // the record that the number probably has, or the zero Record
	base       Version  // the version that the last swap replaces
	swap       Record   // the record that the last swap writes
	acceptance Accepted // the last swap also stores this owed acceptance

	unresolved   bool // the last swap may have been applied; the next load shows this
	maybeApplied bool // an earlier swap may have been applied; no load can show this
}

// updateForCaller runs a foreground update: with a timeout of storeTimeout and with one of the
// storeSlots. known is the record that the number probably has, or the zero Record.
//
// If the caller disconnects, updateForCaller does not cancel a running statement. A cancelled
// statement would close the database connection and leave the outcome of the swap unknown.
func (v *Verifier) updateForCaller(callerCtx context.Context, n Number, known Record, next transition) (Record, error) {
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
	u := update{v: v, number: n, next: next, maxFailures: maxStoreFailures, known: known}
	return u.run(callerCtx, ctx)
}

func callerGone(ctx context.Context) error { return fmt.Errorf("%w: %w", ErrCallerGone, ctx.Err()) }

// run repeats the step until the update is done, and returns the record that the number then
// had. It returns an error of next or of decodeRecord unchanged. It gives up:
//   - if callerCtx ended before ctx, and no swap may have been applied. It returns ErrCallerGone.
//   - if ctx ended, or if the store returned maxFailures errors and unresolved is false. It returns
//     ErrOutcomeUnknown if a swap may have been applied, otherwise ErrStoreUnavailable.
func (u *update) run(callerCtx, ctx context.Context) (Record, error) {
	var cause error
	failures := 0
	for retries := 1; ; retries++ {
		if callerCtx.Err() != nil && ctx.Err() == nil && !u.unresolved && !u.maybeApplied {
			return Record{}, callerGone(callerCtx)
		}
		done, err := u.step(ctx)
		if done {
			return u.known, err
		}
		if err != nil {
			cause = err
			failures++
		}
		if err == nil || failures < u.maxFailures || u.unresolved {
			if backOff(ctx, retries); ctx.Err() == nil {
				continue
			}
		}
		reason := ErrStoreUnavailable
		if u.unresolved || u.maybeApplied {
			reason = ErrOutcomeUnknown
		}
		// The error has the cause only as text. The cause may be another error of this
		// package, and a caller that tests for one of them must not find two.
		return Record{}, fmt.Errorf("%w: %s", reason, cmp.Or(cause, ctx.Err()).Error())
	}
}

// step loads, computes and swaps once. It reports whether the update is done. If it is not, err
// is the error of the store, or nil after a conflict or if the next step must load.
func (u *update) step(ctx context.Context) (done bool, err error) {
	current := u.known
	loaded := current.Version == (Version{}) // otherwise current may be old; a conflict shows this
	if loaded {
		if current, err = u.v.Store.Load(ctx, u.number); err != nil {
			return false, err
		}
	}
	u.known = Record{}
	if u.swap.Version != (Version{}) && current.Version == u.swap.Version {
		return u.applied() // also after a conflict: a proxy may have repeated the swap
	}
	if u.unresolved && current.Version != u.base {
		u.unresolved, u.maybeApplied = false, true
	}
	if !u.unresolved {
		next, err := u.compute(current)
		if err != nil && !loaded {
			return false, nil // load in the next step
		}
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
	if applied {
		return u.applied()
	}
	if errors.Is(err, ErrOutcomeUnknown) {
		u.unresolved = true
	}
	return false, err
}

// applied ends the update after its swap was applied.
func (u *update) applied() (done bool, err error) {
	u.known = u.swap
	u.v.owed.remove(u.number, u.acceptance)
	return true, nil
}

// compute returns the record that follows current, with a new random version.
func (u *update) compute(current Record) (Record, error) {
	state, history, err := decodeRecord(current.State)
	if err != nil {
		return Record{}, err
	}
	s := snapshot{state, history, u.v.Now().UnixMicro(), u.maybeApplied}
	u.acceptance = u.v.owed.of(u.number)
	s.history.recordAccepted(u.acceptance)
	next, err := u.next(&s)
	if err != nil {
		return Record{}, err
	}
	record := Record{State: encodeRecord(next, s.history), BegunAt: current.BegunAt}
	if next.LastSendID != state.LastSendID {
		record.BegunAt = s.now
	}
	rand.Read(record.Version[:])
	return record, nil
}

// backOff waits before a retry (exponential backoff with jitter). The time is random, so that two
// writers do not conflict again. Its maximum doubles up to a quarter of a second, so that retries do
// not overload a store that recovers from a failure.
func backOff(ctx context.Context, retries int) {
	select {
	case <-time.After(mathrand.N(time.Millisecond << min(retries, 8))): //nolint:gosec // jitter, not a secret
	case <-ctx.Done():
	}
}
