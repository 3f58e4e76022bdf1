package verify

import (
	"errors"
	"fmt"
	"time"
)

// What can go wrong apart from a wrong field (FieldError) and what the SMS
// provider said (SendError).
var (
	// ErrSendInProgress: the number has as many live or unsettled codes as its
	// state can hold. Nothing was sent.
	ErrSendInProgress = errors.New("too many sends to this number are under way")
	// ErrStoreUnavailable: the store could not be reached. Surely nothing was
	// sent and nothing counted.
	ErrStoreUnavailable = errors.New("store unavailable")
	// ErrOutcomeUnknown: the store may have done what it was asked, or may yet.
	// A Store returns it from Swap; Check returns it where the look may have
	// been counted, or have used the code.
	ErrOutcomeUnknown = errors.New("outcome unknown")
	// ErrSentNotConfirmed: the SMS was accepted, but that could not be stored in
	// time. Its code works; older ones may too.
	ErrSentNotConfirmed = errors.New("sent, but the store did not confirm it")
	// ErrCallerGone: the caller went away or its deadline passed (the error is
	// context.Canceled or context.DeadlineExceeded too), before anything was sent
	// or counted.
	ErrCallerGone = errors.New("the caller went away")
	// ErrStateUnreadable: the stored state is in a format that this version does
	// not know.
	ErrStateUnreadable = errors.New("stored state is unreadable")
)

// A FieldError is a request's field that cannot be taken.
type FieldError struct {
	Field string // as the proto spells it
	Want  string // what would be right; never repeats the input
}

func (e *FieldError) Error() string { return e.Field + " " + e.Want }

// A SendKind is what became of an SMS that was not plainly accepted.
type SendKind int

// The first two leave the code alive, since the SMS may arrive; SendUnknown is the
// zero value, so that what nobody classified does too. The others are sure: it was
// not sent. They are stored: a number never changes its meaning.
const (
	SendUnknown      SendKind = iota
	SendTimedOut              // no answer within the deadline
	SendNotAttempted          // not a byte of the request left, or the provider throttles
	SendLimited               // the provider's limit for this sign name and number
	SendBadNumber             // the provider says that the number is no number
	SendRejected              // recipient blocked, or account, sign name, template, key, clock
	SendBadRequest            // our own request was wrong
)

func (k SendKind) String() string {
	names := []string{"unknown", "timed_out", "not_asked", "limited", "bad_number", "refused", "bad_request"}
	if k < 0 || int(k) >= len(names) {
		return names[SendUnknown]
	}
	return names[k]
}

// NotSent reports whether the SMS was surely not sent.
func (k SendKind) NotSent() bool { return k >= SendNotAttempted }

// A SendError is what a Sender returns for an SMS that was not plainly
// accepted. It holds nothing of the message and no text of the provider's. Its
// Error leaves Code and RequestID to whoever has a field for them.
type SendError struct {
	Kind       SendKind
	Code       string        // the provider's own code, "" where it gave none
	RequestID  string        // the provider's, "" where it gave none
	RetryAfter time.Duration // 0 where waiting is no cure
	HTTPStatus int           // 0 where no answer came
	Detail     string        // our own words for the log
}

// SendErrorOf is err as a SendError: of what nobody classified, which could quote the
// message, nothing is kept.
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
