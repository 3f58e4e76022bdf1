package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// The domains of google.rpc.ErrorInfo. A domain identifies the system that defines the reason.
const (
	aliyunDomain = "aliyun.com"
	ownDomain    = "phone-number-service"
)

// publicError is the form of an error that callers see. Its text contains nothing of the cause, except
// the names and valid forms of invalid fields, and the right that a caller lacks. For an error that the
// server itself detects, a publicError is the error value.
type publicError struct {
	code       codes.Code
	reason     string // of ErrorInfo; see docs/errors.md
	text       string
	retryAfter time.Duration     // for RetryInfo; 0 for none
	domain     string            // of ErrorInfo; "" for ownDomain
	metadata   map[string]string // of ErrorInfo
}

func (e publicError) Error() string { return e.text }

// errorTable lists the errors of other packages with their public form.
//
// Use UNAVAILABLE only if definitely no SMS was sent and no attempt was counted, because clients and
// service meshes retry it automatically.
var errorTable = []struct {
	err error
	publicError
}{
	{verify.ErrSendInProgress, publicError{
		code:       codes.Aborted,
		reason:     "SEND_IN_PROGRESS",
		text:       "too many sends to this number are under way; nothing was sent",
		retryAfter: 30 * time.Second,
	}},
	{verify.ErrKeyInProgress, publicError{
		code:       codes.Aborted,
		reason:     "SEND_IN_PROGRESS",
		text:       "a send with this idempotency key is under way; this call sent nothing",
		retryAfter: time.Second,
	}},
	{verify.ErrKeyReused, publicError{
		code:   codes.InvalidArgument,
		reason: "IDEMPOTENCY_KEY_REUSED",
		text:   "the idempotency key was used for another sign name, template code or verification context; nothing was sent",
	}},
	{verify.ErrSentNotConfirmed, publicError{
		code:   codes.Unknown,
		reason: "SENT_NOT_CONFIRMED",
		text:   "the SMS was sent and its code works, but earlier codes may still work too",
	}},
	{verify.ErrStateUnreadable, publicError{
		code:   codes.Internal,
		reason: "STATE_UNREADABLE",
		text:   "the state of this number was written by a later release",
	}},
	{verify.ErrCallerGone, publicError{
		code:   codes.Canceled,
		reason: "CALLER_GONE",
		text:   "the caller went away, or its deadline passed, before anything was sent or counted",
	}},
	{verify.ErrStoreUnavailable, publicError{
		code:       codes.Unavailable,
		reason:     "STORE_UNAVAILABLE",
		text:       "the database is not available; nothing was sent and nothing was counted",
		retryAfter: time.Second,
	}},
	{auth.ErrUnknown, publicError{
		code:   codes.Unauthenticated,
		reason: "CALLER_UNKNOWN",
		text:   "the caller is not known: send the bearer token, or show the client certificate, of a caller that this service knows; nothing was sent and nothing was counted",
	}},
	{sms.ErrCodeTTL, publicError{
		code:   codes.FailedPrecondition,
		reason: "CODE_TTL_TOO_SHORT",
		text:   "an SMS of this template has the lifetime of its code in whole minutes, and codes of this service live less than one; nothing was sent",
	}},
	{verify.ErrOutcomeUnknown, publicError{
		code:   codes.Unknown,
		reason: "CHECK_OUTCOME_UNKNOWN",
		text:   "the database did not confirm the check; it may have been counted, or have used the code",
	}},
}

// sendErrorTable maps the kinds of failed sends to their public form.
var sendErrorTable = map[verify.SendKind]publicError{
	verify.SendUnknown: {
		code:   codes.Unknown,
		reason: "SMS_OUTCOME_UNKNOWN",
		text:   "Aliyun did not say whether it took the SMS; if it arrives, its code works",
	},
	verify.SendTimedOut: {
		code:   codes.DeadlineExceeded,
		reason: "SMS_TIMEOUT",
		text:   "Aliyun did not answer in time; if the SMS arrives, its code works",
	},
	verify.SendNotAttempted: {
		code:       codes.Unavailable,
		reason:     "SMS_NOT_SENT",
		text:       "Aliyun could not be reached or is throttling; nothing was sent",
		retryAfter: time.Second,
	},
	verify.SendLimited: {
		code:   codes.ResourceExhausted,
		reason: "SMS_LIMITED",
		text:   "Aliyun's sending limit for this sign name and number is reached; nothing was sent",
	},
	verify.SendBadNumber: {
		code:   codes.InvalidArgument,
		reason: "SMS_BAD_NUMBER",
		text:   "Aliyun refused the phone number; nothing was sent",
	},
	verify.SendRejected: {
		code:   codes.FailedPrecondition,
		reason: "SMS_REFUSED",
		text:   "Aliyun refused the SMS: the number is blocked, or the account, sign name, template or key needs the operator's attention; nothing was sent",
	},
	verify.SendBadRequest: {
		code:   codes.Internal,
		reason: "SMS_BAD_REQUEST",
		text:   "Aliyun did not understand this service's request; nothing was sent",
	},
}

// Errors that the server itself detects, and the public forms of the errors of packages auth and verify
// that have parameters.
var (
	overloaded = publicError{
		code:       codes.Unavailable,
		reason:     "OVERLOADED",
		text:       "too many calls are in flight; nothing was sent and nothing was counted",
		retryAfter: time.Second,
	}
	messageTooLarge = publicError{
		code:   codes.ResourceExhausted,
		reason: "MESSAGE_TOO_LARGE",
		text:   "the message is larger than this service takes; nothing was sent and nothing was counted",
	}
	originNotAllowed = publicError{
		code:   codes.PermissionDenied,
		reason: "ORIGIN_NOT_ALLOWED",
		text:   "web pages of this origin may not make calls; nothing was sent and nothing was counted",
	}
	unknownEncoding = publicError{
		code:   codes.Unimplemented,
		reason: "UNKNOWN_ENCODING",
		text:   "the message is compressed in a way that this service does not read: send it as it is, or as gzip; nothing was sent and nothing was counted",
	}
	headersTooLarge = publicError{
		code:   codes.ResourceExhausted,
		reason: "HEADERS_TOO_LARGE",
		text:   "the headers of this call are larger than this service takes; nothing was sent and nothing was counted",
	}
	notAllowed = publicError{
		code:   codes.PermissionDenied,
		reason: "CALLER_NOT_ALLOWED",
		text:   "this caller may not use this %s; nothing was sent and nothing was counted",
	}
	rateLimited = publicError{
		code:   codes.ResourceExhausted,
		reason: "CALLER_RATE_LIMITED",
		text:   "this caller's own rate is used up; nothing was sent",
	}
	numberFull = publicError{
		code:   codes.ResourceExhausted,
		reason: "TOO_MANY_SENDS",
		text:   "the number has codes of eight verification contexts, or sends with eight idempotency keys; nothing was sent",
	}
	unknownPath = publicError{
		code:   codes.Unimplemented,
		reason: "UNKNOWN_PATH",
		text: "no call has this path; the two calls are POST " + pb.PhoneNumberService_SendSMS_FullMethodName +
			" and POST " + pb.PhoneNumberService_Valid_FullMethodName,
	}
	// unclassified is for panics, and for all errors that are not listed above.
	unclassified = publicError{
		code:   codes.Internal,
		reason: "INTERNAL",
		text:   "internal error",
	}
)

// toStatus converts an error to the status for the caller. The log line has the cause.
func toStatus(err error) *status.Status {
	var fields fieldErrors
	var field *verify.FieldError
	var send *verify.SendError
	var denied *auth.NotAllowedError
	var rate *auth.RateError
	var full *verify.FullError
	var public publicError
	switch {
	case errors.As(err, &fields):
		return publicError{code: codes.InvalidArgument, reason: "INVALID_FIELD", text: fields.Error()}.status(badRequest(fields...))
	case errors.As(err, &field):
		return toStatus(fieldErrors{field})
	case errors.As(err, &send):
		return sendStatus(send)
	case errors.As(err, &public):
		return public.status()
	case errors.As(err, &denied):
		e := notAllowed
		e.text, e.metadata = fmt.Sprintf(e.text, denied.Denied), map[string]string{"refused": denied.Denied}
		return e.status()
	case errors.As(err, &rate):
		e := rateLimited
		e.retryAfter = rate.RetryAfter
		return e.status()
	case errors.As(err, &full):
		e := numberFull
		e.retryAfter = full.RetryAfter
		return e.status()
	}
	for _, e := range errorTable {
		if errors.Is(err, e.err) {
			if errors.Is(err, context.DeadlineExceeded) { // as the cause of an ErrCallerGone
				e.code = codes.DeadlineExceeded
			}
			return e.status()
		}
	}
	return unclassified.status()
}

// sendStatus returns the status of a failed send. If Aliyun returned an error code, this code is the
// reason, in Aliyun's domain.
func sendStatus(err *verify.SendError) *status.Status {
	e, ok := sendErrorTable[err.Kind]
	if !ok {
		e = sendErrorTable[verify.SendUnknown]
	}
	e.retryAfter = cmp.Or(err.RetryAfter, e.retryAfter)
	if err.RequestID != "" {
		e.metadata = map[string]string{"request_id": err.RequestID}
	}
	if err.ProviderCode != "" {
		e.domain, e.reason = aliyunDomain, err.ProviderCode
	}
	if err.Kind == verify.SendBadNumber {
		return e.status(badRequest(&verify.FieldError{Field: "phone_number", Want: "must be a number that Aliyun can send to"}))
	}
	return e.status()
}

func badRequest(fields ...*verify.FieldError) *errdetails.BadRequest {
	bad := &errdetails.BadRequest{}
	for _, f := range fields {
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: f.Field, Description: f.Want})
	}
	return bad
}

// status returns the error as a status. Its details are ErrorInfo, RetryInfo if retryAfter is set, and
// more.
func (e publicError) status(more ...protoadapt.MessageV1) *status.Status {
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Domain: cmp.Or(e.domain, ownDomain), Reason: e.reason, Metadata: e.metadata}}
	if e.retryAfter != 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.retryAfter)})
	}
	s := status.New(e.code, e.text)
	for _, d := range append(details, more...) {
		// WithDetails fails for the code OK, which no error has, and for text that is not UTF-8.
		if detailed, err := s.WithDetails(d); err == nil {
			s = detailed
		}
	}
	return s
}
