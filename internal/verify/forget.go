package verify

import (
	"context"
	"errors"
	"time"
)

// Deleter deletes records. It uses the database of the Store.
type Deleter interface {
	// Delete deletes the record of n if its version is equal to old. Its results are those of Store.Swap.
	Delete(ctx context.Context, n Number, old Version) (bool, error)
}

// Forget deletes the record of a number, and returns its content. deleted is false if the number has
// no record.
//
// A deletion during a send would make its code invalid. So if a send may be in flight, Forget calls
// waiting with the time that is left of longestInFlight, and waits for this time. If a new send begins
// meanwhile, Forget waits again.
func (v *Verifier) Forget(ctx context.Context, n Number, d Deleter, waiting func(time.Duration)) (
	held Inspection, deleted bool, err error,
) {
	for {
		record, err := v.Store.Load(ctx, n)
		if err != nil {
			return Inspection{}, false, err
		}
		if record.Version == (Version{}) {
			return held, deleted, nil
		}
		if left := time.UnixMicro(record.BegunAt).Add(longestInFlight).Sub(v.Now()); left > 0 {
			waiting(left)
			select {
			case <-time.After(left):
				continue
			case <-ctx.Done():
				return Inspection{}, false, ctx.Err()
			}
		}
		// An unreadable state is deleted too. Forget then returns the zero Inspection.
		held, err = v.inspection(n, record)
		if err != nil && !errors.Is(err, ErrStateUnreadable) {
			return Inspection{}, false, err
		}
		switch deleted, err = d.Delete(ctx, n, record.Version); {
		case err == nil && deleted:
			return held, true, nil
		case errors.Is(err, ErrOutcomeUnknown):
			deleted = true // if the next load finds no record
		case err != nil:
			return Inspection{}, false, err
		}
	}
}
