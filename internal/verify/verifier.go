// Package verify implements the domain: parsing phone numbers, generating and
// checking codes, and the state kept for each number. It imports only the standard
// library; storage and SMS delivery are behind the Store and Sender interfaces.
package verify

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// A Version identifies one stored state of one number. It is random bytes chosen by
// the writer, so that a writer can recognise its own swap if the response was lost.
// The zero Version stands for "no row".
type Version [16]byte

// A Record is what a Store keeps for a number.
type Record struct {
	Version Version
	State   []byte // at most MaxStateBytes
	BegunAt int64  // last send, microseconds since 1970; for the purge
}

// MaxStateBytes bounds Record.State.
const MaxStateBytes = 1024

// A Store keeps one Record for each number. Any number of replicas may share it.
type Store interface {
	// Load returns n's record, or the zero Record if there is none. It sees every
	// Swap that returned before Load was called.
	Load(ctx context.Context, n Number) (Record, error)
	// Swap atomically and durably replaces n's record if its version is still old
	// (compare-and-swap). The zero old requires that no row exists. Swap returns
	// false, nil if another writer was first; Load again. An error that wraps
	// ErrOutcomeUnknown means that the swap may have been applied, or may still be.
	// Any other error means that it was not applied and never will be.
	Swap(ctx context.Context, n Number, old Version, next Record) (bool, error)
}

// A Message is one SMS to be sent. Its Code never goes into a log or an error.
type Message struct {
	Number       Number
	SignName     string // the sender's name at Aliyun: the text in 【】
	TemplateCode string
	Code         string // six decimal digits
	SendID       int64  // as in CodeStatus
}

// A Receipt holds the provider's identifiers of an accepted SMS.
type Receipt struct {
	BizID     string
	RequestID string
}

// A Sender asks the provider to deliver a message at most once: it never repeats a
// request that may have reached the provider. A nil error means that the provider
// accepted the SMS. An error that is not a *SendError means that the outcome is
// unknown.
type Sender interface {
	Send(ctx context.Context, m Message) (Receipt, error)
}

// A Verifier sends codes and checks them. Any number of Verifiers, in any number of
// processes, may share one database.
type Verifier struct {
	Rules      Rules
	Keys       Keys
	Store      Store
	Sender     Sender
	SMSTimeout time.Duration // of one call to Sender
	Now        func() time.Time
	Random     io.Reader
	Log        *slog.Logger

	replacedKeys   atomic.Pointer[Keys]
	cache          recordCache
	background     atomic.Int64 // send outcomes not stored yet
	makeStoreSlots sync.Once
	storeSlots     chan struct{} // semaphore of the foreground updates
}

// ReplaceKeys replaces the Keys. It is safe while calls are running.
func (v *Verifier) ReplaceKeys(k Keys) { v.replacedKeys.Store(&k) }

func (v *Verifier) keys() Keys {
	if k := v.replacedKeys.Load(); k != nil {
		return *k
	}
	return v.Keys
}

const (
	// How long a call waits for the store. It is short, so that the call can return
	// UNAVAILABLE before the caller's own deadline.
	storeTimeout = 3 * time.Second
	// How long the service tries to store the outcome of a send.
	outcomeTimeout = 60 * time.Second
	// Maximum number of foreground updates (storing a new code, checking one) that
	// use the store at once. Recording the outcome of a paid SMS is not limited, so
	// it never queues behind them.
	maxConcurrentUpdates = 256
	// Number of definite failures after which a call returns ErrStoreUnavailable.
	// The readiness probe tracks the store's overall health.
	maxStoreFailures = 5
)

// Send generates a code, stores it, asks the provider to deliver it and records the
// outcome. It returns nil if the SMS was accepted and every older code of the number
// is invalid; otherwise ErrSendInProgress, ErrStoreUnavailable, ErrCallerGone,
// ErrSentNotConfirmed, ErrStateUnreadable or a *SendError.
//
// Once Send has called the provider, it no longer stops if ctx ends.
func (v *Verifier) Send(ctx context.Context, n Number, signName, templateCode string) (Receipt, error) {
	code, sendID, err := v.storeNewCode(ctx, n)
	if err != nil {
		return Receipt{}, err
	}
	if ctx.Err() != nil {
		v.recordOutcome(ctx, n, func(s State, _ *History, now int64) State { return v.Rules.Withdraw(s, sendID, now) })
		return Receipt{}, callerGone(ctx)
	}

	sendCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.SMSTimeout)
	defer cancel()
	receipt, err := v.Sender.Send(sendCtx, Message{Number: n, SignName: signName, TemplateCode: templateCode, Code: code, SendID: sendID})
	if err == nil {
		if !v.recordOutcome(ctx, n, func(s State, t *History, now int64) State {
			t.recordAccepted(sendID, now, receipt)
			return v.Rules.Confirm(s, sendID, now)
		}) {
			return receipt, ErrSentNotConfirmed
		}
		return receipt, nil
	}
	sendErr := SendErrorOf(err)
	if sendErr.Kind.NotSent() {
		v.recordOutcome(ctx, n, func(s State, t *History, now int64) State {
			t.recordRejected(sendID, now, sendErr)
			return v.Rules.Withdraw(s, sendID, now)
		})
	}
	return Receipt{}, sendErr
}

// storeNewCode stores a new code and returns it with its send ID.
func (v *Verifier) storeNewCode(ctx context.Context, n Number) (code string, sendID int64, err error) {
	var mac MAC
	err = v.updateForCaller(ctx, n, func(s State, _ *History, now int64, inDoubt bool) (State, bool, error) {
		if inDoubt && s.contains(sendID, mac) {
			return s, false, nil
		}
		// Always a new code: a code that was stored twice could be used twice.
		if code, err = newCode(v.Random); err != nil {
			return s, false, err
		}
		mac = v.keys().sign(n, code)
		s, sendID, err = v.Rules.Begin(s, mac, now)
		return s, true, err
	})
	if errors.Is(err, ErrOutcomeUnknown) {
		// Nothing was sent, but the code may have been stored. Remove it if it is
		// there. Write a new version even if it is not, so that a delayed swap fails
		// its version check.
		v.updateInBackground(ctx, n, func(s State, _ *History, now int64) State {
			if s.contains(sendID, mac) {
				return v.Rules.Withdraw(s, sendID, now)
			}
			return s
		})
		err = fmt.Errorf("%w: %s", ErrStoreUnavailable, err.Error())
	}
	return code, sendID, err
}

// recordOutcome stores the outcome of a send. It reports whether the outcome was stored
// within storeTimeout; if not, the update continues in the background.
func (v *Verifier) recordOutcome(ctx context.Context, n Number, transition func(State, *History, int64) State) bool {
	stored := v.updateInBackground(ctx, n, transition)
	timer := time.NewTimer(storeTimeout)
	defer timer.Stop()
	select {
	case ok := <-stored:
		return ok
	case <-timer.C:
		return false
	}
}

// updateInBackground applies a transition in the background, even if ctx ends, and
// sends whether it was stored.
func (v *Verifier) updateInBackground(ctx context.Context, n Number, transition func(State, *History, int64) State) <-chan bool {
	stored := make(chan bool, 1)
	v.background.Add(1)
	go func() {
		defer v.background.Add(-1)
		err := errors.New("panic")
		defer func() {
			if p := recover(); p != nil { // its value could hold a code
				err = fmt.Errorf("panic with a %T", p)
			}
			if err != nil {
				v.Log.ErrorContext(ctx, "failed to store send outcome", "number", n.Masked(), "error", err)
			}
			stored <- err == nil
		}()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), outcomeTimeout)
		defer cancel()
		// Confirm and Withdraw are idempotent, so after an unknown outcome they are
		// simply applied again.
		err = v.update(ctx, ctx, n, 0, func(s State, t *History, now int64, _ bool) (State, bool, error) {
			return transition(s, t, now), true, nil
		})
	}()
	return stored
}

// Pending returns the number of send outcomes that are not stored yet.
func (v *Verifier) Pending() int64 { return v.background.Load() }

// Wait waits until all send outcomes are stored or ctx is done. It polls a counter
// instead of using a sync.WaitGroup: calls that outlive a forced stop may still begin
// updates, and a WaitGroup panics on an Add during Wait.
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

// Check reports whether code is a live code of the number, and uses it up. A code that
// is not six digits is a wrong code. The attempt is stored before Check returns. Its
// errors are ErrStoreUnavailable and ErrCallerGone (no attempt was counted),
// ErrOutcomeUnknown and ErrStateUnreadable.
func (v *Verifier) Check(ctx context.Context, n Number, code string) (Verification, error) {
	macs := v.keys().macs(n, code)
	var found Verification
	var valid bool
	err := v.updateForCaller(ctx, n, func(s State, t *History, now int64, inDoubt bool) (next State, changed bool, err error) {
		if inDoubt {
			// The swap that used the code may have been our own.
			return s, false, ErrOutcomeUnknown
		}
		next, valid, changed = v.Rules.Check(s, macs, now)
		found = t.recordCheck(v.Rules, s, next, valid, changed, now)
		return next, changed, nil
	})
	if err != nil {
		return Verification{}, err
	}
	return found, nil
}

// An Inspection is the information about a number that an operator may see.
type Inspection struct {
	LastSendID int64        // of the last send, 0 if none
	BegunAt    time.Time    // when that send began
	Alive      []CodeStatus // codes that can still be verified, oldest first
	History    History
}

// Inspect returns the information stored about the number. It counts no attempt. It
// fails only if the store fails or the stored state is unreadable.
func (v *Verifier) Inspect(ctx context.Context, n Number) (Inspection, error) {
	record, err := v.Store.Load(ctx, n)
	if err != nil {
		return Inspection{}, err
	}
	state, err := decodeState(record.State)
	if err != nil {
		return Inspection{}, err
	}
	return Inspection{
		state.LastSendID, time.UnixMicro(record.BegunAt), v.Rules.Alive(state, v.Now().UnixMicro()),
		decodeHistory(record.State),
	}, nil
}

// LongestSend returns the longest time that Send takes.
func (v *Verifier) LongestSend() time.Duration { return 2*storeTimeout + v.SMSTimeout }

func callerGone(ctx context.Context) error { return fmt.Errorf("%w: %w", ErrCallerGone, ctx.Err()) }

// updateForCaller runs update with a timeout of storeTimeout. It does not cancel a
// running statement when the client disconnects: that would close the database
// connection and leave the outcome unknown.
func (v *Verifier) updateForCaller(callerCtx context.Context, n Number, f transitionFunc) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(callerCtx), storeTimeout)
	defer cancel()
	v.makeStoreSlots.Do(func() { v.storeSlots = make(chan struct{}, maxConcurrentUpdates) })
	select {
	case v.storeSlots <- struct{}{}:
		defer func() { <-v.storeSlots }()
	case <-callerCtx.Done():
		return callerGone(callerCtx)
	case <-ctx.Done():
		return fmt.Errorf("%w: too many calls at once", ErrStoreUnavailable)
	}
	return v.update(callerCtx, ctx, n, maxStoreFailures, f)
}

// transitionFunc computes the next state. If changed is false, nothing is stored.
// inDoubt means that an earlier result of this transition may have been stored, and
// that another writer has written since.
type transitionFunc func(s State, t *History, now int64, inDoubt bool) (next State, changed bool, err error)

// update implements optimistic concurrency control: it loads the number's state,
// computes the next one and swaps it in, and repeats that until a swap succeeds. It
// gives up after maxFailures definite failures (0 means no limit), if ctx ends, and
// between two steps if callerCtx ends. It then returns ErrOutcomeUnknown if the outcome
// of a swap is unknown, and ErrStoreUnavailable or ErrCallerGone if not.
func (v *Verifier) update(callerCtx, ctx context.Context, n Number, maxFailures int, f transitionFunc) error {
	var (
		unconfirmed *Record // the swap whose outcome is unknown
		base        Version // the version that it replaces
		lastWritten Version // of the last swap
		inDoubt     bool
		failures    int
		lastErr     error
	)
	current, cached := v.cache.take(n)
	if v.Now().UnixMicro()-current.BegunAt >= v.Rules.CodeTTL.Microseconds() {
		cached = false // probably stale
	}
	// Format the cause with %s, not %w: an error that wraps two sentinels would map to
	// the one that is tested first.
	giveUp := func(cause error) error {
		if unconfirmed != nil || inDoubt {
			return fmt.Errorf("%w: %s", ErrOutcomeUnknown, cause.Error())
		}
		return fmt.Errorf("%w: %s", ErrStoreUnavailable, cause.Error())
	}
	for round := 0; ; round++ {
		if round > 0 {
			if err := backOff(ctx, round); err != nil {
				return giveUp(cmp.Or(lastErr, err))
			}
		}
		if callerCtx.Err() != nil && ctx.Err() == nil && unconfirmed == nil && !inDoubt {
			return callerGone(callerCtx)
		}
		var err error
		if !cached {
			current, err = v.Store.Load(ctx, n)
		}
		if err != nil {
			lastErr = err
			if failures++; maxFailures > 0 && failures >= maxFailures && unconfirmed == nil {
				return giveUp(err)
			}
			continue
		}
		if lastWritten != (Version{}) && current.Version == lastWritten {
			return nil // even after false: a proxy may repeat a swap
		}
		if unconfirmed != nil && current.Version != base {
			unconfirmed, inDoubt = nil, true // another writer, perhaps after our swap
		}
		next := unconfirmed
		if next == nil {
			next, err = v.nextRecord(current, inDoubt, f)
			if cached && (err != nil || next == nil) {
				// The cached record may be stale; only a successful swap proves that it is not.
				cached, round = false, -1
				continue
			}
			if err != nil || next == nil {
				return err
			}
			base = current.Version
		}
		lastWritten = next.Version
		done, err := v.Store.Swap(ctx, n, base, *next)
		switch {
		case done:
			v.cache.put(n, *next)
			return nil
		case errors.Is(err, ErrOutcomeUnknown):
			unconfirmed, lastErr = next, err // repeating this swap applies it at most once
		case err != nil:
			lastErr = err
			if failures++; maxFailures > 0 && failures >= maxFailures && unconfirmed == nil {
				return giveUp(err)
			}
		case cached:
			round = -1 // the cached record was stale: reload at once
		}
		cached = false
	}
}

// recordCache holds the records that this process wrote last, of numbers that have
// codes, so that the next swap of a number needs no load. take removes the record that it
// returns. The cache has two generations: if current is full, previous is dropped.
type recordCache struct {
	mu                sync.Mutex
	current, previous map[Number]Record
}

const maxGeneration = 1 << 15 // two generations take about 15 MB

func (r *recordCache) take(n Number) (record Record, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, records := range []map[Number]Record{r.current, r.previous} {
		if record, ok = records[n]; ok {
			delete(records, n)
			break
		}
	}
	return record, ok
}

func (r *recordCache) put(n Number, record Record) {
	if record.State[headerBytes-1] == 0 {
		return // no codes: no check follows soon
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil || len(r.current) >= maxGeneration {
		r.current, r.previous = map[Number]Record{}, r.current
	}
	r.current[n] = record
}

// nextRecord returns the record that f computes from current, or nil if there is nothing
// to store.
func (v *Verifier) nextRecord(current Record, inDoubt bool, f transitionFunc) (*Record, error) {
	state, err := decodeState(current.State)
	if err != nil {
		return nil, err
	}
	now, history := v.Now().UnixMicro(), decodeHistory(current.State)
	next, changed, err := f(state, &history, now, inDoubt)
	if err != nil || !changed {
		return nil, err
	}
	record := &Record{State: history.append(next.encode()), BegunAt: current.BegunAt}
	if next.LastSendID != state.LastSendID {
		record.BegunAt = now
	}
	rand.Read(record.Version[:])
	return record, nil
}

// backOff waits between two rounds of update. The time is random, so that contending
// writers do not collide again, and grows up to a quarter of a second, so that retries do
// not overload a store that is recovering.
func backOff(ctx context.Context, round int) error {
	longest := time.Millisecond << min(round, 8)
	timer := time.NewTimer(mathrand.N(longest)) //nolint:gosec // jitter, not a secret
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
