// Package verify is the domain: numbers, codes, the state of a number and the
// two calls on it. It imports the standard library only; databases, Aliyun and
// gRPC are rooms of their own that it knows through Store and Sender.
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

// A Version names one stored state of one number: random bytes chosen by the
// writer, so that a writer can recognise its own swap after a lost answer. The
// zero Version stands for "no row".
type Version [16]byte

// A Record is what a Store keeps for a number.
type Record struct {
	Version Version
	State   []byte // at most MaxStateBytes
	BegunAt int64  // time of the last begin in microseconds since 1970, for the purge
}

// MaxStateBytes bounds Record.State.
const MaxStateBytes = 1024

// A Store keeps one Record a number, for any number of replicas at once.
type Store interface {
	// Load returns the number's record, the zero Record where there is none. A
	// Swap that was answered before Load was called is seen by it.
	Load(ctx context.Context, n Number) (Record, error)
	// Swap atomically and durably replaces the record whose version is old by
	// next: of any number of swaps with the same old one at most one is done. The
	// zero old means "where there is no row". false says that another writer came
	// first: load again, the version may have changed. An error that is ErrOutcomeUnknown says that the swap may
	// have been done or may yet be; any other, that it surely had no effect.
	Swap(ctx context.Context, n Number, old Version, next Record) (bool, error)
}

// A Message is one SMS to be sent. Its Code never goes into a log or an error.
type Message struct {
	Number       Number
	SignName     string // Aliyun's name for who sends: the text in 【】
	TemplateCode string
	Code         string // six decimal digits
	SendID       int64  // names the send within its number, as CodeStatus does
}

// A Receipt is what the provider said of an accepted SMS.
type Receipt struct {
	BizID     string
	RequestID string
}

// A Sender asks the provider to deliver a message, at most once: it repeats
// nothing whose first copy may have gone out. A nil error says that the provider
// accepted it; an error that is not a *SendError says that the outcome is
// unknown.
type Sender interface {
	Send(ctx context.Context, m Message) (Receipt, error)
}

// A Verifier sends codes and checks them. Any number of them, in any number of
// processes, may share one database.
type Verifier struct {
	Rules      Rules
	Keys       Keys
	Store      Store
	Sender     Sender
	SMSTimeout time.Duration // for one answer of the Sender
	Now        func() time.Time
	Random     io.Reader
	Log        *slog.Logger

	replacedKeys   atomic.Pointer[Keys]
	cache          recordCache
	background     atomic.Int64 // outcomes that are still being stored
	makeStoreSlots sync.Once
	storeSlots     chan struct{} // one for each begin and check that is at the store
}

// ReplaceKeys replaces the Keys, while calls go on.
func (v *Verifier) ReplaceKeys(k Keys) { v.replacedKeys.Store(&k) }

func (v *Verifier) keys() Keys {
	if k := v.replacedKeys.Load(); k != nil {
		return *k
	}
	return v.Keys
}

const (
	// How long a call waits for the store, so that it can say UNAVAILABLE while
	// its caller still listens.
	storeTimeout = 3 * time.Second
	// How long an outcome that the provider told is tried to be stored.
	outcomeTimeout = 60 * time.Second
	// Begins and checks that are at the store at once; more wait in front of it, so
	// that outcomes of SMS that were paid for do not queue behind them.
	maxConcurrentUpdates = 256
	// Failures without effect that one call bears; the store's own state of
	// health is watched elsewhere.
	maxStoreFailures = 5
)

// Send draws a code, stores it, asks the provider to deliver it and records the
// outcome. It returns nil where the SMS was accepted and every older code of the
// number is dead; otherwise ErrSendInProgress, ErrStoreUnavailable, ErrCallerGone,
// ErrSentNotConfirmed, ErrStateUnreadable or a *SendError.
//
// Once the provider is asked, the caller going away no longer stops anything.
func (v *Verifier) Send(ctx context.Context, n Number, signName, templateCode string) (Receipt, error) {
	code, ticket, err := v.storeNewCode(ctx, n)
	if err != nil {
		return Receipt{}, err
	}
	if ctx.Err() != nil {
		v.recordOutcome(ctx, n, func(s State, _ *History, now int64) State { return v.Rules.Withdraw(s, ticket, now) })
		return Receipt{}, callerGone(ctx)
	}

	ask, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.SMSTimeout)
	defer cancel()
	receipt, err := v.Sender.Send(ask, Message{Number: n, SignName: signName, TemplateCode: templateCode, Code: code, SendID: ticket})
	if err == nil {
		if !v.recordOutcome(ctx, n, func(s State, t *History, now int64) State {
			t.recordAccepted(ticket, now, receipt)
			return v.Rules.Confirm(s, ticket, now)
		}) {
			return receipt, ErrSentNotConfirmed
		}
		return receipt, nil
	}
	sendErr := SendErrorOf(err)
	if sendErr.Kind.NotSent() {
		v.recordOutcome(ctx, n, func(s State, t *History, now int64) State {
			t.recordRejected(ticket, now, sendErr)
			return v.Rules.Withdraw(s, ticket, now)
		})
	}
	return Receipt{}, sendErr
}

// storeNewCode stores a fresh code and returns it with its ticket.
func (v *Verifier) storeNewCode(ctx context.Context, n Number) (code string, ticket int64, err error) {
	var mac MAC
	err = v.updateForCaller(ctx, n, func(s State, _ *History, now int64, inDoubt bool) (State, bool, error) {
		if inDoubt && s.contains(ticket, mac) {
			return s, false, nil
		}
		// Always a fresh code: one that was begun twice could be used twice.
		if code, err = newCode(v.Random); err != nil {
			return s, false, err
		}
		mac = v.keys().sign(n, code)
		s, ticket, err = v.Rules.Begin(s, mac, now)
		return s, true, err
	})
	if errors.Is(err, ErrOutcomeUnknown) {
		// The provider was not asked, and nobody knows the code: it must not take a
		// place in the list. Another version is written in any case, so that a swap
		// that is still on its way finds its old one gone.
		v.updateInBackground(ctx, n, func(s State, _ *History, now int64) State {
			if s.contains(ticket, mac) {
				return v.Rules.Withdraw(s, ticket, now)
			}
			return s
		})
		err = fmt.Errorf("%w: %s", ErrStoreUnavailable, err.Error())
	}
	return code, ticket, err
}

// recordOutcome stores what became of a send. It goes on in the background when the
// store is slow or away, and reports whether it was done while the caller waits.
func (v *Verifier) recordOutcome(ctx context.Context, n Number, transition func(State, *History, int64) State) bool {
	stored := v.updateInBackground(ctx, n, transition)
	patience := time.NewTimer(storeTimeout)
	defer patience.Stop()
	select {
	case ok := <-stored:
		return ok
	case <-patience.C:
		return false
	}
}

// updateInBackground applies a transition in the background, whatever becomes of the caller,
// and tells whether it was stored.
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
				v.Log.ErrorContext(ctx, "the outcome of a send could not be stored; its code stays as it is", "number", n.Masked(), "error", err)
			}
			stored <- err == nil
		}()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), outcomeTimeout)
		defer cancel()
		// An unknown outcome that somebody moved on from is simply applied again:
		// to confirm or withdraw twice is to do it once.
		err = v.update(ctx, ctx, n, 0, func(s State, t *History, now int64, _ bool) (State, bool, error) {
			return transition(s, t, now), true, nil
		})
	}()
	return stored
}

// Pending is how many outcomes of sends are still being stored.
func (v *Verifier) Pending() int64 { return v.background.Load() }

// Wait waits for what Send still stores in the background, as long as ctx lives.
// Calls that a forced stop left behind may go on sending meanwhile, for which a
// sync.WaitGroup panics; so it asks now and then.
func (v *Verifier) Wait(ctx context.Context) {
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for v.background.Load() > 0 {
		select {
		case <-again.C:
		case <-ctx.Done():
			return
		}
	}
}

// Check finds out whether code is a live code of the number, and uses it up. A
// code of any other shape is a wrong code. The look is stored before the answer
// is given. Its errors are ErrStoreUnavailable and ErrCallerGone (nothing was
// counted), ErrOutcomeUnknown and ErrStateUnreadable.
func (v *Verifier) Check(ctx context.Context, n Number, code string) (Verification, error) {
	macs := v.keys().macs(n, code)
	var found Verification
	var valid bool
	err := v.updateForCaller(ctx, n, func(s State, t *History, now int64, inDoubt bool) (next State, changed bool, err error) {
		if inDoubt {
			// Ours may have been the swap that used the code.
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

// An Inspection is what may be told of a number.
type Inspection struct {
	LastSendID int64        // the ticket of the last send that had begun, 0 for none
	BegunAt    time.Time    // when it had begun
	Alive      []CodeStatus // codes that can still be verified, oldest first
	History    History
}

// Inspect tells what is stored of the number. It counts nothing, and errors only
// where the store does or holds what is unreadable.
func (v *Verifier) Inspect(ctx context.Context, n Number) (Inspection, error) {
	record, err := v.Store.Load(ctx, n)
	if err != nil {
		return Inspection{}, err
	}
	state, err := decodeState(record.State)
	if err != nil {
		return Inspection{}, err
	}
	return Inspection{state.LastSendID, time.UnixMicro(record.BegunAt), v.Rules.Alive(state, v.Now().UnixMicro()), decodeHistory(record.State)}, nil
}

// LongestSend is the longest that Send takes.
func (v *Verifier) LongestSend() time.Duration { return 2*storeTimeout + v.SMSTimeout }

func callerGone(ctx context.Context) error { return fmt.Errorf("%w: %w", ErrCallerGone, ctx.Err()) }

// updateForCaller applies f for a caller who hears of it within storePatience.
// What is at the store is not broken off when the caller goes away: that would
// cost the connection, and leave the outcome unknown.
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

// transitionFunc computes the next state. changed = false stores nothing; inDoubt
// says that an earlier result of this same transition may have been stored, and
// that others wrote after it.
type transitionFunc func(s State, t *History, now int64, inDoubt bool) (next State, changed bool, err error)

// update loads the number's state, computes the next one and swaps it in, until a
// swap held. It gives up after tries failures without effect (0: never), when ctx
// ends, and between two steps when the caller has gone: with ErrOutcomeUnknown
// while a swap's outcome is unknown, else with ErrStoreUnavailable or
// ErrCallerGone.
func (v *Verifier) update(callerCtx, ctx context.Context, n Number, maxFailures int, f transitionFunc) error {
	var (
		unconfirmed *Record // the swap whose outcome is unknown
		base        Version // what it wanted to replace
		lastWritten Version // of the last swap
		inDoubt     bool
		failures    int
		lastErr     error
	)
	current, cached := v.cache.take(n)
	if v.Now().UnixMicro()-current.BegunAt >= v.Rules.CodeTTL.Microseconds() {
		cached = false // a lot can have happened elsewhere
	}
	// The cause as text only: an error that is both answers would mean the one
	// that is asked for first.
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
			return nil // perhaps though the answer was false: a proxy that repeats a swap loses to itself
		}
		if unconfirmed != nil && current.Version != base {
			unconfirmed, inDoubt = nil, true // somebody moved on, perhaps from our state
		}
		next := unconfirmed
		if next == nil {
			next, err = v.nextRecord(current, inDoubt, f)
			if cached && (err != nil || next == nil) {
				cached, round = false, -1 // others may have written since: only a swap that holds proves that not
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
			unconfirmed, lastErr = next, err // the same swap again takes effect once at most
		case err != nil:
			lastErr = err
			if failures++; maxFailures > 0 && failures >= maxFailures && unconfirmed == nil {
				return giveUp(err)
			}
		case cached:
			round = -1 // others wrote since: no reason to wait
		}
		cached = false
	}
}

// recordCache are records of numbers that have codes, as this process swapped them in:
// the next swap need not load what it replaces. It forgets what it gives, and the
// oldest where there is no room.
type recordCache struct {
	mu                sync.Mutex
	current, previous map[Number]Record
}

const maxGeneration = 1 << 15 // with as many old ones some 15 MB

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
		return // no codes: the next to come is a send, whenever and wherever
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil || len(r.current) >= maxGeneration {
		r.current, r.previous = map[Number]Record{}, r.current
	}
	r.current[n] = record
}

// nextRecord returns the record that f makes of current, nil where nothing is to be
// stored.
func (v *Verifier) nextRecord(current Record, inDoubt bool, f transitionFunc) (*Record, error) {
	state, err := decodeState(current.State)
	if err != nil {
		return nil, err
	}
	now, trail := v.Now().UnixMicro(), decodeHistory(current.State)
	next, changed, err := f(state, &trail, now, inDoubt)
	if err != nil || !changed {
		return nil, err
	}
	record := &Record{State: trail.append(next.encode()), BegunAt: current.BegunAt}
	if next.LastSendID != state.LastSendID {
		record.BegunAt = now
	}
	rand.Read(record.Version[:])
	return record, nil
}

// backOff waits between two rounds of apply: random, so that contenders fall out
// of step, and up to a quarter of a second, so that a store that is away is not
// stormed.
func backOff(ctx context.Context, round int) error {
	longest := time.Millisecond << min(round, 8)
	timer := time.NewTimer(mathrand.N(longest)) //nolint:gosec // spreads load, decides nothing
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
