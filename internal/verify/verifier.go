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

// Version identifies one write of a Record. The writer chooses its bytes at random, so that it
// recognises its own swap if the database's reply was lost. The zero Version means that the
// number has no record.
type Version [16]byte

// Record is the stored form of one number.
type Record struct {
	Version Version
	State   []byte // encoded State and History; at most MaxStateBytes
	BegunAt int64  // time of the last begin, microseconds since 1970
}

// MaxStateBytes is the maximum length of Record.State.
const MaxStateBytes = 1024

// Store keeps one Record for each number: the database. Replicas may share it.
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
	SMSTimeout time.Duration // for one call of Sender.Send
	Now        func() time.Time
	Random     io.Reader
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

// Send implements the call SendSMS. It generates a code, stores it, asks the provider to deliver
// it, and confirms it if older codes must be dropped. A nil error means that the provider accepted
// the SMS and that no older code of the number is live. The errors are
// ErrSendInProgress, ErrStoreUnavailable, ErrCallerGone, ErrSentNotConfirmed,
// ErrStateUnreadable, *SendError, and an error of Config.Random.
//
// If ctx ends after Send called the provider, Send continues.
func (v *Verifier) Send(ctx context.Context, n Number, signName, templateCode string) (Receipt, error) {
	s := sendCall{v: v, number: n}
	begun, err := v.updateForCaller(ctx, n, s.begin)
	if errors.Is(err, ErrOutcomeUnknown) {
		// The code may have been stored, and no SMS was sent.
		v.updateInBackground(ctx, n, Record{}, s.withdrawIfStored)
		err = fmt.Errorf("%w: %s", ErrStoreUnavailable, err.Error())
	}
	if err != nil {
		return Receipt{}, err
	}
	if ctx.Err() != nil {
		v.updateInBackground(ctx, n, begun, s.withdraw)
		return Receipt{}, callerGone(ctx)
	}

	sendCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), v.SMSTimeout)
	defer cancel()
	receipt, err := v.Sender.Send(sendCtx, Message{Number: n, SignName: signName, TemplateCode: templateCode, Code: s.code, SendID: s.sendID})
	if err == nil {
		accepted := Accepted{s.sendID, v.Now().UnixMicro(), receipt.BizID}
		if s.sole { // Confirm has no code to drop
			v.owe(n, begun, accepted)
			return receipt, nil
		}
		confirmed := v.updateInBackground(ctx, n, begun, func(in *snapshot) (State, error) {
			in.history.recordAccepted(accepted)
			return v.Rules.Confirm(in.state, s.sendID, in.now), nil
		})
		select {
		case ok := <-confirmed:
			if ok {
				return receipt, nil
			}
		case <-time.After(storeTimeout):
		}
		return receipt, ErrSentNotConfirmed
	}
	sendErr := SendErrorOf(err)
	if sendErr.Kind.NotSent() { // no person knows the code, so the call need not wait
		v.updateInBackground(ctx, n, begun, func(in *snapshot) (State, error) {
			in.history.recordRejected(s.sendID, in.now, sendErr)
			return s.withdraw(in)
		})
	}
	return Receipt{}, sendErr
}

// sendCall is one call of Send, with the code that begin generated last. Its methods are
// transitions.
type sendCall struct {
	v      *Verifier
	number Number
	code   string
	mac    MAC
	sendID int64
	sole   bool
}

// begin adds a new code. It generates another one each time that it is called: if one code were
// stored twice, it could be used twice. It sets sole together with the code, so sole describes the
// state that the applied swap replaced.
func (s *sendCall) begin(in *snapshot) (next State, err error) {
	if in.maybeApplied && in.state.contains(s.sendID, s.mac) {
		return in.state, errUnchanged
	}
	if s.code, err = newCode(s.v.Random); err != nil {
		return in.state, err
	}
	s.mac = s.v.keys.Load().sign(s.number, s.code)
	next, s.sendID, s.sole, err = s.v.Rules.Begin(in.state, s.mac, in.now)
	return next, err
}

func (s *sendCall) withdraw(in *snapshot) (State, error) {
	return s.v.Rules.Withdraw(in.state, s.sendID, in.now), nil
}

// withdrawIfStored withdraws the code of a begin that may have been applied. If the code is not
// stored, withdrawIfStored writes the unchanged state with a new version: a delayed copy of the
// begin's swap then conflicts.
func (s *sendCall) withdrawIfStored(in *snapshot) (State, error) {
	if in.state.contains(s.sendID, s.mac) {
		return s.withdraw(in)
	}
	return in.state, nil
}

// Check implements the call Valid. It reports whether code is a live code of the number, and
// uses the code if it is. A text that is not six digits is a wrong code. The attempt is stored
// before Check returns. The errors are
// ErrStoreUnavailable and ErrCallerGone (no attempt was counted), ErrOutcomeUnknown and
// ErrStateUnreadable.
func (v *Verifier) Check(ctx context.Context, n Number, code string) (Verification, error) {
	c := checkCall{rules: v.Rules, macs: v.keys.Load().macs(n, code)}
	if _, err := v.updateForCaller(ctx, n, c.count); err != nil {
		return Verification{}, err
	}
	return c.found, nil
}

// checkCall is one call of Check, with the result of the last count.
type checkCall struct {
	rules Rules
	macs  []MAC
	found Verification
}

// count is the transition of a check: it counts the attempt.
func (c *checkCall) count(in *snapshot) (State, error) {
	if in.maybeApplied {
		// This call's own swap may have counted the attempt or used the code.
		return in.state, ErrOutcomeUnknown
	}
	next, valid, changed := c.rules.Check(in.state, c.macs, in.now)
	c.found = in.history.recordCheck(c.rules, in.state, next, valid, changed, in.now)
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
	history := decodeHistory(record.State)
	history.recordAccepted(v.owed.of(n))
	live := v.Rules.live(state, history.Accepted.SendID, v.Now().UnixMicro())
	return Inspection{state.LastSendID, time.UnixMicro(record.BegunAt), live, history}, nil
}

// LongestSend returns the maximum time that Send takes with this Config.SMSTimeout.
func LongestSend(smsTimeout time.Duration) time.Duration { return 2*storeTimeout + smsTimeout }
