// Package verify implements the domain: it parses phone numbers, generates and checks codes,
// and has the rules for the state of a number. It imports only the standard library. The
// interfaces Store and Sender stand for the database and the SMS provider.
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

// Version identifies one write of a Record. The writer chooses its bytes at random. So the
// writer recognises its own swap, even if the database's reply was lost. The zero Version
// means that the number has no record.
type Version [16]byte

// Record is the stored form of one number. A Store keeps it.
type Record struct {
	Version Version
	State   []byte // encoded State and History; at most MaxStateBytes
	BegunAt int64  // time of the last begin, microseconds since 1970
}

// MaxStateBytes is the maximum length of Record.State.
const MaxStateBytes = 1024

// Store keeps one Record for each number. Any number of replicas may share a Store.
type Store interface {
	// Load returns the record of n, or the zero Record if n has none. Load returns the
	// record of the last Swap that returned before Load was called, or a later one.
	Load(ctx context.Context, n Number) (Record, error)
	// Swap replaces the record of n if the version of the stored record is old
	// (compare-and-swap). If old is the zero Version, Swap inserts the record if n has
	// none. The write is atomic and durable. Swap returns:
	//
	//   - true and nil: the swap was applied.
	//   - false and nil: a conflict. The stored record has another version.
	//   - false and an error that wraps ErrOutcomeUnknown: the swap was applied, or may
	//     be applied later, or not at all.
	//   - false and another error: the swap was not applied and will not be applied.
	Swap(ctx context.Context, n Number, old Version, next Record) (bool, error)
}

// Message is one SMS for the Sender. Its Code must not be in a log or an error.
type Message struct {
	Number       Number
	SignName     string // shown in 【】 at the start of the SMS
	TemplateCode string
	Code         string // six decimal digits
	SendID       int64
}

// Receipt holds the provider's IDs for an accepted SMS.
type Receipt struct {
	BizID     string // ID of the SMS
	RequestID string // ID of the request
}

// Sender asks the provider to deliver an SMS.
type Sender interface {
	// Send makes at most one request that may reach the provider, so that one call never
	// sends two SMS. A nil error means that the provider accepted the SMS. A *SendError
	// has the kind of the failure. Any other error means that the outcome of the send is
	// unknown.
	Send(ctx context.Context, m Message) (Receipt, error)
}

// Verifier sends codes and checks them. Any number of Verifiers, in any number of processes,
// may share one Store.
type Verifier struct {
	Rules      Rules
	Keys       Keys
	Store      Store
	Sender     Sender
	SMSTimeout time.Duration // for one call of Sender.Send
	Now        func() time.Time
	Random     io.Reader
	Log        *slog.Logger

	currentKeys    atomic.Pointer[Keys]
	cache          recordCache
	background     atomic.Int64 // number of running background updates
	makeStoreSlots sync.Once
	storeSlots     chan struct{} // semaphore for foreground updates
}

// ReplaceKeys replaces the Keys. It may run at the same time as other methods.
func (v *Verifier) ReplaceKeys(k Keys) { v.currentKeys.Store(&k) }

func (v *Verifier) keys() Keys {
	if k := v.currentKeys.Load(); k != nil {
		return *k
	}
	return v.Keys
}

const (
	// storeTimeout is the maximum time that a call waits for the store. It is short, so
	// that the caller gets UNAVAILABLE before the caller's own deadline.
	storeTimeout = 3 * time.Second
	// outcomeTimeout is the maximum time of a background update.
	outcomeTimeout = 60 * time.Second
	// maxConcurrentUpdates is the maximum number of foreground updates (begin and check)
	// that use the store at once. Background updates are not limited, so the outcome of
	// a paid SMS never waits for a slot.
	maxConcurrentUpdates = 256
	// maxStoreFailures is the number of failures after which a foreground update gives
	// up. Only loads and swaps that were definitely not applied count.
	maxStoreFailures = 5
)

// Send implements the call SendSMS. It generates a code, stores it, asks the provider to
// deliver it, and stores the outcome of the send. A nil error means that the provider accepted
// the SMS and that no older code of the number is live. The other errors are
// ErrSendInProgress, ErrStoreUnavailable, ErrCallerGone, ErrSentNotConfirmed,
// ErrStateUnreadable and *SendError.
//
// If ctx ends after Send called the provider, Send continues.
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
		if !v.recordOutcome(ctx, n, func(s State, h *History, now int64) State {
			h.recordAccepted(sendID, now, receipt)
			return v.Rules.Confirm(s, sendID, now)
		}) {
			return receipt, ErrSentNotConfirmed
		}
		return receipt, nil
	}
	sendErr := SendErrorOf(err)
	if sendErr.Kind.NotSent() {
		v.recordOutcome(ctx, n, func(s State, h *History, now int64) State {
			h.recordRejected(sendID, now, sendErr)
			return v.Rules.Withdraw(s, sendID, now)
		})
	}
	return Receipt{}, sendErr
}

// storeNewCode generates a code, stores it by Begin, and returns it with its send ID.
func (v *Verifier) storeNewCode(ctx context.Context, n Number) (code string, sendID int64, err error) {
	var mac MAC
	err = v.updateForCaller(ctx, n, func(s State, _ *History, now int64, inDoubt bool) (State, bool, error) {
		if inDoubt && s.contains(sendID, mac) {
			return s, false, nil
		}
		// Generate a new code in each round: if one code were stored twice, it could be
		// used twice.
		if code, err = newCode(v.Random); err != nil {
			return s, false, err
		}
		mac = v.keys().sign(n, code)
		s, sendID, err = v.Rules.Begin(s, mac, now)
		return s, true, err
	})
	if errors.Is(err, ErrOutcomeUnknown) {
		// Nothing was sent, but the code may have been stored: withdraw it. If it is not
		// stored, write the unchanged state with a new version. A delayed copy of the
		// swap then conflicts and cannot store the code.
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

// recordOutcome stores the outcome of a send: transition is Confirm or Withdraw. It reports
// whether the outcome was stored within storeTimeout. If the time is over, the update
// continues in the background.
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

// updateInBackground starts a goroutine that applies transition to the number's record. The
// goroutine continues if ctx ends. The channel receives true if the update was stored.
func (v *Verifier) updateInBackground(ctx context.Context, n Number, transition func(State, *History, int64) State) <-chan bool {
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
		// Confirm and Withdraw are idempotent. So after a swap of unknown outcome they
		// may be applied again, and inDoubt is ignored.
		err = v.update(ctx, ctx, n, 0, func(s State, h *History, now int64, _ bool) (State, bool, error) {
			return transition(s, h, now), true, nil
		})
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

// Check implements the call Valid. It reports whether code is a live code of the number. If it
// is, the code is then used and Check does not accept it again. A text that is not six digits
// is a wrong code. The attempt is stored before Check returns. The errors are
// ErrStoreUnavailable and ErrCallerGone (no attempt was counted), ErrOutcomeUnknown and
// ErrStateUnreadable.
func (v *Verifier) Check(ctx context.Context, n Number, code string) (Verification, error) {
	macs := v.keys().macs(n, code)
	var found Verification
	var valid bool
	err := v.updateForCaller(ctx, n, func(s State, h *History, now int64, inDoubt bool) (next State, changed bool, err error) {
		if inDoubt {
			// This call's own swap may have counted the attempt or used the code.
			return s, false, ErrOutcomeUnknown
		}
		next, valid, changed = v.Rules.Check(s, macs, now)
		found = h.recordCheck(v.Rules, s, next, valid, changed, now)
		return next, changed, nil
	})
	if err != nil {
		return Verification{}, err
	}
	return found, nil
}

// Inspection is the information about a number that an operator may see.
type Inspection struct {
	LastSendID int64        // send ID of the last send, 0 if none
	BegunAt    time.Time    // time when that send began
	Live       []CodeStatus // the live codes, oldest first
	History    History
}

// Inspect returns the stored information about a number. It counts no attempt. Its error is an
// error of Store.Load or ErrStateUnreadable.
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
		state.LastSendID, time.UnixMicro(record.BegunAt), v.Rules.Live(state, v.Now().UnixMicro()),
		decodeHistory(record.State),
	}, nil
}

// LongestSend returns the maximum time that Send takes with this Verifier.SMSTimeout.
func LongestSend(smsTimeout time.Duration) time.Duration { return 2*storeTimeout + smsTimeout }

func callerGone(ctx context.Context) error { return fmt.Errorf("%w: %w", ErrCallerGone, ctx.Err()) }

// updateForCaller runs a foreground update: update with a timeout of storeTimeout and with one
// of the storeSlots. If the caller disconnects, it does not cancel a running statement. That
// would close the database connection and leave the outcome of a swap unknown.
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

// transitionFunc computes the next state from the loaded state s. It may change h. If changed is
// false, update stores nothing.
//
// inDoubt means that an earlier swap of the same update has an unknown outcome that can no
// longer be found out. The swap may have been applied, and another writer has replaced the
// record since.
type transitionFunc func(s State, h *History, now int64, inDoubt bool) (next State, changed bool, err error)

// update implements optimistic concurrency control. In each round it loads the number's record,
// computes the next one with f and swaps it in. It returns nil when a swap was applied, or when
// f has nothing to store. It returns an error of f or of decodeState unchanged. After a
// conflict, the next round applies f again.
//
// After a swap of unknown outcome, the next round loads the record and compares its version:
//   - the new version: the swap was applied, and update returns nil.
//   - the old version: update repeats the same swap, which takes effect at most once.
//   - another version: update applies f again, with inDoubt.
//
// update gives up if ctx ends. If no swap has an unknown outcome, it also gives up:
//   - after maxFailures failed loads and swaps (0 means no limit). Conflicts do not count.
//   - between two steps, if callerCtx ended.
//
// With inDoubt, it gives up after maxFailures too. The error is ErrOutcomeUnknown if a swap has
// an unknown outcome, ErrCallerGone if update gave up because of callerCtx, and
// ErrStoreUnavailable otherwise.
func (v *Verifier) update(callerCtx, ctx context.Context, n Number, maxFailures int, f transitionFunc) error {
	var (
		unknownSwap *Record // next record of the swap of unknown outcome
		base        Version // the version that the last swap replaces
		lastWritten Version // the version that the last swap writes
		inDoubt     bool
		failures    int
		lastErr     error
	)
	current, cached := v.cache.take(n)
	if v.Now().UnixMicro()-current.BegunAt >= v.Rules.CodeTTL.Microseconds() {
		cached = false // another replica has probably written since
	}
	// Format the cause with %s, not %w. An error that wraps two errors of this package would
	// get the status of the one that is tested first.
	giveUp := func(cause error) error {
		if unknownSwap != nil || inDoubt {
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
		if callerCtx.Err() != nil && ctx.Err() == nil && unknownSwap == nil && !inDoubt {
			return callerGone(callerCtx)
		}
		var err error
		if !cached {
			current, err = v.Store.Load(ctx, n)
		}
		if err != nil {
			lastErr = err
			if failures++; maxFailures > 0 && failures >= maxFailures && unknownSwap == nil {
				return giveUp(err)
			}
			continue
		}
		if lastWritten != (Version{}) && current.Version == lastWritten {
			return nil // also after a conflict: a proxy may repeat swaps
		}
		if unknownSwap != nil && current.Version != base {
			// Another writer replaced the record, before this swap or after it.
			unknownSwap, inDoubt = nil, true
		}
		next := unknownSwap
		if next == nil {
			next, err = v.nextRecord(current, inDoubt, f)
			if cached && (err != nil || next == nil) {
				// The cached record may be stale, and without a swap nothing shows that it is
				// not. So load the record, and apply f again.
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
			unknownSwap, lastErr = next, err // the next round loads and compares
		case err != nil:
			lastErr = err
			if failures++; maxFailures > 0 && failures >= maxFailures && unknownSwap == nil {
				return giveUp(err)
			}
		case cached:
			round = -1 // the cached record was stale: load now
		}
		cached = false
	}
}

// recordCache keeps the records that this process wrote last, so that the next swap of a number
// needs no load. It keeps only records that have codes. It has two generations: if current is
// full, previous is dropped, and current becomes previous.
type recordCache struct {
	mu                sync.Mutex
	current, previous map[Number]Record
}

const maxGeneration = 1 << 15 // two generations take about 15 MB

// take removes the record of n from the cache and returns it.
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

// put adds a record that this process has just written.
func (r *recordCache) put(n Number, record Record) {
	if record.State[headerBytes-1] == 0 {
		return // without codes, a call is not expected soon
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil || len(r.current) >= maxGeneration {
		r.current, r.previous = map[Number]Record{}, r.current
	}
	r.current[n] = record
}

// nextRecord returns the record that f computes from current, with a new random version. It
// returns nil if f has nothing to store.
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
	record := &Record{State: history.appendTo(next.encode()), BegunAt: current.BegunAt}
	if next.LastSendID != state.LastSendID {
		record.BegunAt = now
	}
	rand.Read(record.Version[:])
	return record, nil
}

// backOff waits between two rounds of update. The time is random, so that writers that
// conflicted do not conflict again. Its maximum grows to a quarter of a second, so that retries
// do not overload a store that recovers from a failure.
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
