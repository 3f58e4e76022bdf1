package verify

import (
	"errors"
	"fmt"
	"time"
)

// Send and Check return these errors. Send can also return a *SendError or a *FullError.
// NumberParser.Parse returns a *FieldError.
var (
	// ErrSendInProgress means that the list of codes is full, that no code may be dropped,
	// and that some may belong to sends in flight. Nothing was sent.
	ErrSendInProgress = errors.New("too many sends to this number are under way")
	// ErrKeyInProgress means that a send with the same idempotency key is in flight. This
	// call sent nothing.
	ErrKeyInProgress = errors.New("a send with this idempotency key is under way")
	// ErrKeyReused means that a send with the same idempotency key had another sign name,
	// template code or context. This call sent nothing.
	ErrKeyReused = errors.New("the idempotency key was used for another request")
	// ErrStoreUnavailable means that the call could not use the store. No SMS was sent
	// and no attempt was counted.
	ErrStoreUnavailable = errors.New("store unavailable")
	// ErrOutcomeUnknown means that a swap may have been applied, or may be applied later.
	// Store.Swap returns it. Check returns it if the attempt may have been counted or the
	// code may have been used.
	ErrOutcomeUnknown = errors.New("outcome unknown")
	// ErrSentNotConfirmed means that the provider accepted the SMS, but that Confirm was
	// not stored in time. The new code is live. Older codes may be live too.
	ErrSentNotConfirmed = errors.New("sent, but the store did not confirm it")
	// ErrCallerGone means that the caller disconnected, or that its deadline passed,
	// before an SMS was sent or an attempt was counted. The error also wraps
	// context.Canceled or context.DeadlineExceeded.
	ErrCallerGone = errors.New("the caller went away")
	// ErrStateUnreadable means that the stored state has a format that this release of
	// the service cannot read.
	ErrStateUnreadable = errors.New("stored state is unreadable")
)

// FieldError is the error of a request with an invalid field.
type FieldError struct {
	Field string // the field's name in the proto file
	Want  string // the valid form, never with a part of the input
}

func (e *FieldError) Error() string { return e.Field + " " + e.Want }

// FullError means that the list of codes or of keyed sends is full, and that no entry may be dropped.
// Nothing was sent.
type FullError struct {
	RetryAfter time.Duration // until the first entry expires
}

func (e *FullError) Error() string { return "the number has too many codes or idempotency keys" }

// SendKind classifies a send that the provider did not clearly accept.
type SendKind int

// SendUnknown and SendTimedOut mean that the SMS may arrive, so the code stays live.
// SendUnknown is the zero value, so that the code also stays live after an unclassified
// error. All other kinds mean that the SMS was not sent. The values are stored in
// histories: do not renumber them.
const (
	SendUnknown SendKind = iota
	// SendTimedOut means that the provider did not reply within the deadline.
	SendTimedOut
	// SendNotAttempted means that no byte of the request was sent, or that the provider
	// throttled the request.
	SendNotAttempted
	// SendLimited means that the provider's limit for this sign name and number is reached.
	SendLimited
	// SendBadNumber means that the provider rejected the number as invalid.
	SendBadNumber
	// SendRejected means that the provider blocks the number, or that the operator must
	// correct the account, sign name, template, access key or clock.
	SendRejected
	// SendBadRequest means that this service built an invalid request.
	SendBadRequest
)

func (k SendKind) String() string {
	names := []string{"unknown", "timed_out", "not_attempted", "limited", "bad_number", "rejected", "bad_request"}
	if k < 0 || int(k) >= len(names) {
		return names[SendUnknown]
	}
	return names[k]
}

// NotSent reports whether the SMS was definitely not sent.
func (k SendKind) NotSent() bool { return k >= SendNotAttempted }

// SendError is the error of Sender.Send if the provider did not clearly accept the SMS. It
// holds no part of the message and no text of the provider. Error leaves out ProviderCode
// and RequestID, since log lines and metrics have them as separate fields.
type SendError struct {
	Kind         SendKind
	ProviderCode string        // the provider's error code, "" if none
	RequestID    string        // the provider's request ID, "" if none
	RetryAfter   time.Duration // 0 if a retry does not help
	HTTPStatus   int           // 0 if there was no response
	Detail       string        // text of this service, for the log
}

// SendErrorOf returns the *SendError in err. If err contains none, it returns one of the kind
// SendUnknown, without the text of err, which could quote the message.
func SendErrorOf(err error) *SendError {
	e := &SendError{Kind: SendUnknown, Detail: "unclassified"}
	errors.As(err, &e)
	return e
}

func (e *SendError) Error() string {
	text := "sms: " + e.Detail
	if e.HTTPStatus != 0 {
		text += fmt.Sprintf(" (HTTP %d)", e.HTTPStatus)
	}
	return text
}
