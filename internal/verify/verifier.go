// Package verify implements the domain: it parses phone numbers, generates and checks codes,
// and has the rules for the state of a number. It imports only the standard library.
package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"
)

// Version identifies one write of a Record. Its bytes are random, so that a writer can find out
// whether its swap was applied if the database's reply was lost. The zero Version means that the
// number has no record.
type Version [16]byte

// Record is the stored form of one number.
type Record struct {
	Version Version
	State   []byte // the output of encodeRecord, at most MaxStateBytes
	BegunAt int64  // time of the last begin, microseconds since 1970
}

// MaxStateBytes is the maximum length of Record.State.
const MaxStateBytes = 1024

// Store is the database: it keeps one Record for each number. Replicas may share it.
type Store interface {
	// Load returns the record of n, or the zero Record if n has none. Load returns the
	// record of the last Swap that returned before Load was called, or a later one.
	Load(ctx context.Context, n Number) (Record, error)
	// Swap replaces the record of n if the version of the stored record is equal to old
	// (compare-and-swap). If old is the zero Version, Swap inserts the record if n has
	// none. The write is atomic and durable. Swap returns:
	//
	//   - true and nil: the swap was applied.
	//   - false and nil: a conflict, usually because the stored record has another version.
	//   - false and an error that wraps ErrOutcomeUnknown: the swap was applied, may be
	//     applied later, or will never be applied.
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

// Sender asks the SMS provider to deliver an SMS.
type Sender interface {
	// Send makes at most one request that may reach the provider, so that one call never
	// sends two SMS. A nil error means that the provider accepted the SMS. A *SendError
	// has the kind of the failure. Any other error means SendUnknown.
	Send(ctx context.Context, m Message) (Receipt, error)
}

// Config is the configuration of a Verifier.
type Config struct {
	Rules      Rules
	Keys       Keys // until ReplaceKeys
	Store      Store
	Sender     Sender
	SMSTimeout time.Duration    // for one call of Sender.Send
	Now        func() time.Time // such as SteadyClock
	Random     io.Reader        // for the digits of codes
	Log        *slog.Logger
}

// Verifier sends codes and checks them. Several processes may share its Store.
type Verifier struct {
	Config
	keys       atomic.Pointer[Keys]
	background atomic.Int64 // number of running background updates
	owed       owed
	storeSlots chan struct{} // semaphore for foreground updates
}

// New returns a Verifier.
func New(c Config) *Verifier {
	v := &Verifier{Config: c, storeSlots: make(chan struct{}, maxConcurrentUpdates)}
	v.ReplaceKeys(c.Keys)
	return v
}

// ReplaceKeys replaces the Keys. It may run at the same time as other methods.
func (v *Verifier) ReplaceKeys(k Keys) { v.keys.Store(&k) }

// SendRequest is the input of Send.
type SendRequest struct {
	Number         Number
	SignName       string
	TemplateCode   string
	Context        string // verification context, "" for none
	IdempotencyKey string // "" for none
	Caller         string // each caller has its own idempotency keys
	// Allow is called before a code is stored, and Send returns its error. It is not called if an earlier
	// send has the same IdempotencyKey. Allow may be nil.
	Allow func() error
}

// SendResult is the result of Send.
type SendResult struct {
	Receipt Receipt // zero if Replayed
	// Replayed means that Send returns the result of an earlier send with the same idempotency key.
	Replayed bool
	BegunAt  time.Time // when the send began; if Replayed, the earlier one
}

// Send implements the call SendSMS. It generates a code, stores it, asks the provider to deliver
// it, and confirms it if older codes must be dropped. A nil error means that the provider accepted
// the SMS and that no older code of the number and the context is live. The errors are
// ErrSendInProgress, *FullError, ErrStoreUnavailable, ErrCallerGone, ErrSentNotConfirmed,
// ErrStateUnreadable, *SendError, and an error of Config.Random or of Allow.
//
// All calls of a Caller to a Number with one IdempotencyKey send one SMS at most until its code expires.
// If an earlier call may have sent an SMS, Send returns its result, ErrKeyInProgress or ErrKeyReused.
// Every replica needs the outcome for this, so Send waits until it is stored, storeTimeout at most.
//
// If ctx ends after Send called the provider, Send continues.
func (v *Verifier) Send(ctx context.Context, q SendRequest) (SendResult, error) {
	keys := v.keys.Load()
	s := sendCall{v: v, request: q, keys: *keys, context: keys.contextTags(q.Number, q.Context), key: keys.keyTags(q)}
	begun, err := v.updateForCaller(ctx, q.Number, Record{}, s.begin)
	if errors.Is(err, ErrOutcomeUnknown) {
		// The code may have been stored, and no SMS was sent.
		s.awaitIfKeyed(v.updateInBackground(ctx, q.Number, Record{}, s.withdrawIfStored))
		err = fmt.Errorf("%w: %s", ErrStoreUnavailable, err.Error())
	}
	result := SendResult{Replayed: s.begun.Replayed, BegunAt: time.UnixMicro(s.begun.At)}
	if err != nil || result.Replayed {
		return result, err
	}
	if ctx.Err() != nil {
		s.awaitIfKeyed(v.updateInBackground(ctx, q.Number, begun, s.withdraw))
		return result, callerGone(ctx)
	}

	sendCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.SMSTimeout)
	defer cancel()
	result.Receipt, err = v.Sender.Send(sendCtx, Message{
		Number: q.Number, SignName: q.SignName, TemplateCode: q.TemplateCode, Code: s.code, SendID: s.begun.SendID,
	})
	if err == nil {
		accepted := Accepted{s.begun.SendID, v.Now().UnixMicro(), result.Receipt.BizID}
		if s.begun.Sole && s.key == nil { // Confirm has nothing to change
			v.owe(q.Number, begun, accepted)
			return result, nil
		}
		if !await(s.storeOutcome(ctx, begun, func(in *snapshot) (State, error) {
			in.history.recordAccepted(accepted)
			return v.Rules.Confirm(in.state, s.begun.SendID, s.context, in.now), nil
		})) {
			return result, ErrSentNotConfirmed
		}
		return result, nil
	}
	sendErr := SendErrorOf(err)
	switch {
	// No person knows the code, so a call without a key need not wait.
	case sendErr.Kind.NotSent():
		s.awaitIfKeyed(s.storeOutcome(ctx, begun, func(in *snapshot) (State, error) {
			in.history.recordRejected(s.begun.SendID, in.now, sendErr)
			return s.withdraw(in)
		}))
	case s.key != nil:
		await(s.storeOutcome(ctx, begun, func(in *snapshot) (State, error) {
			return v.Rules.Doubt(in.state, s.begun.SendID, sendErr.Kind), nil
		}))
	}
	return SendResult{BegunAt: result.BegunAt}, sendErr
}

// sendCall is one call of Send, with the code that begin generated last. Its methods are
// transitions, except storeOutcome and awaitIfKeyed.
type sendCall struct {
	v       *Verifier
	request SendRequest
	keys    Keys
	context ContextTags
	key     []KeyTag
	code    string
	mac     MAC
	begun   Begun
	allowed bool // Allow returned nil
}

// begin adds a new code. It generates another one each time that it is called: if one code were
// stored twice, it could be used twice. It sets begun together with the code, so begun.Sole describes
// the state that the applied swap replaced.
func (s *sendCall) begin(in *snapshot) (next State, err error) {
	if in.maybeApplied && in.state.contains(s.begun.SendID, s.mac) {
		return in.state, errUnchanged
	}
	// If the code is not in the list but its key is stored, Begin returns ErrKeyInProgress. The key may
	// be of another call that began in the same microsecond.
	if s.code, err = newCode(s.v.Random); err != nil {
		return in.state, err
	}
	s.mac = s.keys.sign(s.request.Number, s.code, s.request.Context)
	next, s.begun, err = s.v.Rules.Begin(in.state, NewSend{s.mac, s.context, s.key}, in.now)
	switch {
	case err != nil:
	case s.begun.Replayed:
		err = errUnchanged
	case !s.allowed && s.request.Allow != nil:
		err = s.request.Allow()
		s.allowed = err == nil
	}
	return next, err
}

// storeOutcome starts to store the outcome of the send. If Forget deleted the record, it stores nothing.
func (s *sendCall) storeOutcome(ctx context.Context, begun Record, next transition) (stored <-chan bool) {
	return s.v.updateInBackground(ctx, s.request.Number, begun, func(in *snapshot) (State, error) {
		if in.state.LastSendID < s.begun.SendID {
			return in.state, errUnchanged
		}
		return next(in)
	})
}

func (s *sendCall) withdraw(in *snapshot) (State, error) {
	return s.v.Rules.Withdraw(in.state, s.begun.SendID, in.now), nil
}

// withdrawIfStored withdraws the code of a begin that may have been applied. If the code is not
// stored, withdrawIfStored writes the unchanged state with a new version: a delayed copy of the
// begin's swap then conflicts.
func (s *sendCall) withdrawIfStored(in *snapshot) (State, error) {
	if in.state.contains(s.begun.SendID, s.mac) {
		return s.withdraw(in)
	}
	return in.state, nil
}

// awaitIfKeyed waits for an update if the send has an idempotency key, so that a repeated call finds
// the outcome.
func (s *sendCall) awaitIfKeyed(stored <-chan bool) {
	if s.key != nil {
		await(stored)
	}
}

// Check implements the call Valid. It reports whether code is a live code of the number in this
// verification context ("" for none). If it is, Check makes it used. A text that is not six digits is
// a wrong code. The attempt is stored before Check returns. The errors are ErrStoreUnavailable and
// ErrCallerGone (no attempt was counted), ErrOutcomeUnknown and ErrStateUnreadable.
func (v *Verifier) Check(ctx context.Context, n Number, code, verificationContext string) (Verification, error) {
	keys := v.keys.Load()
	c := checkCall{rules: v.Rules, macs: keys.macs(n, code, verificationContext), context: keys.contextTags(n, verificationContext)}
	if _, err := v.updateForCaller(ctx, n, v.owed.takeRecord(n, v.Now().UnixMicro()), c.count); err != nil {
		return Verification{}, err
	}
	return c.found, nil
}

// checkCall is one call of Check, with the result of the last count.
type checkCall struct {
	rules   Rules
	macs    []MAC
	context ContextTags
	found   Verification
}

// count is the transition of a check: it counts the attempt.
func (c *checkCall) count(in *snapshot) (State, error) {
	if in.maybeApplied {
		// This call's own swap may have counted the attempt or used the code.
		return in.state, ErrOutcomeUnknown
	}
	next, valid, changed := c.rules.Check(in.state, c.macs, c.context, in.now)
	c.found = in.history.recordCheck(c.rules, in.state, next, c.context, valid, changed, in.now)
	if !changed {
		return in.state, errUnchanged
	}
	return next, nil
}

// Inspection is the stored information about a number that an operator may see.
type Inspection struct {
	LastSendID int64        // send ID of the last send, 0 if none
	BegunAt    time.Time    // time when that send began
	Live       []CodeStatus // the live codes, oldest first
	Keyed      int          // number of sends whose idempotency key still has an effect
	History    History
}

// Inspect returns the stored information about a number. It counts no attempt. Its error is an
// error of Store.Load or ErrStateUnreadable.
func (v *Verifier) Inspect(ctx context.Context, n Number) (Inspection, error) {
	record, err := v.Store.Load(ctx, n)
	if err != nil {
		return Inspection{}, err
	}
	return v.inspection(n, record)
}

// inspection returns the information in a record of n.
func (v *Verifier) inspection(n Number, record Record) (Inspection, error) {
	state, history, err := decodeRecord(record.State)
	if err != nil {
		return Inspection{}, err
	}
	history.recordAccepted(v.owed.of(n))
	now := v.Now().UnixMicro()
	live, keyed := v.Rules.live(state, history.Accepted.SendID, now), v.Rules.unexpiredKeyed(state.Keyed, now)
	return Inspection{state.LastSendID, time.UnixMicro(record.BegunAt), live, len(keyed), history}, nil
}

// LongestSend returns the maximum time that Send takes with this Config.SMSTimeout.
func LongestSend(smsTimeout time.Duration) time.Duration { return 2*storeTimeout + smsTimeout }
