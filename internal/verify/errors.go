package verify

import (
	"errors"
	"fmt"
	"time"
)

// Errors of Send and Check, besides FieldError (an invalid field) and SendError (an SMS
// that the provider did not accept).
var (
	// ErrSendInProgress: the number has as many codes that are live or in flight as
	// its state can hold. Nothing was sent.
	ErrSendInProgress = errors.New("too many sends to this number are under way")
	// ErrStoreUnavailable: the store could not be reached. No SMS was sent and no
	// attempt was counted.
	ErrStoreUnavailable = errors.New("store unavailable")
	// ErrOutcomeUnknown: the store may have applied a swap, or may still apply it. A
	// Store returns it from Swap. Check returns it if the attempt may have been
	// counted or may have used the code.
	ErrOutcomeUnknown = errors.New("outcome unknown")
	// ErrSentNotConfirmed: the provider accepted the SMS, but this could not be stored
	// in time. Its code is valid; older codes may be valid too.
	ErrSentNotConfirmed = errors.New("sent, but the store did not confirm it")
	// ErrCallerGone: the caller disconnected or its deadline passed before an SMS was
	// sent or an attempt counted. The error also wraps context.Canceled or
	// context.DeadlineExceeded.
	ErrCallerGone = errors.New("the caller went away")
	// ErrStateUnreadable: the stored state is in a format that this version does
	// not know.
	ErrStateUnreadable = errors.New("stored state is unreadable")
)

// A FieldError is an invalid field of a request.
type FieldError struct {
	Field string // as the proto spells it
	Want  string // the valid form; never repeats the input
}

func (e *FieldError) Error() string { return e.Field + " " + e.Want }

// A SendKind classifies the outcome of a send that the provider did not clearly accept.
type SendKind int

// SendUnknown and SendTimedOut leave the code live, since the SMS may arrive.
// SendUnknown is the zero value, so that an unclassified error does the same. All other
// kinds mean that the SMS was not sent. The values are stored: do not renumber them.
const (
	SendUnknown      SendKind = iota
	SendTimedOut              // no answer within the deadline
	SendNotAttempted          // no byte was sent, or the provider throttles
	SendLimited               // the provider's limit for this sign name and number
	SendBadNumber             // the provider says that the number is invalid
	SendRejected              // blocked recipient, account, sign name, template, key, clock
	SendBadRequest            // the service's request was malformed
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

// A SendError is the error of a Sender whose provider did not clearly accept the SMS. It
// holds no part of the message and no text of the provider. Error omits Code and
// RequestID, which log lines and metrics have as fields.
type SendError struct {
	Kind       SendKind
	Code       string        // the provider's error code, "" if none
	RequestID  string        // the provider's, "" if none
	RetryAfter time.Duration // 0 if a retry does not help
	HTTPStatus int           // 0 if there was no response
	Detail     string        // the service's own text, for the log
}

// SendErrorOf returns err as a SendError. It keeps nothing of an unclassified error,
// whose text could quote the message.
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
