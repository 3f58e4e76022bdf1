package server

import (
	"context"
	"errors"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// Domains of google.rpc.ErrorInfo: the origin of the reason.
const (
	aliyunDomain = "aliyun.com"
	ownDomain    = "phone-number-service"
)

// publicError is the public form of an error. Its text is fixed and never that of a cause.
type publicError struct {
	code       codes.Code
	reason     string // of ErrorInfo in ownDomain; docs/errors.md lists them
	text       string
	retryAfter time.Duration // RetryInfo, 0 for none
}

// Errors of a request over HTTP/1.1 that are not about its fields.
var (
	errMessageTooLarge = errors.New("the message is too large")
	errOrigin          = errors.New("a web page of an origin that may not call")
	errUnknownEncoding = errors.New("the message's encoding is not known")
)

// Use UNAVAILABLE only if definitely nothing was sent and nothing was counted: clients and
// service meshes retry it automatically.
var (
	errorTable = []struct {
		err error
		publicError
	}{
		{verify.ErrSendInProgress, publicError{codes.Aborted, "SEND_IN_PROGRESS", "too many sends to this number are under way; nothing was sent", 30 * time.Second}},
		{verify.ErrSentNotConfirmed, publicError{codes.Unknown, "SENT_NOT_CONFIRMED", "the SMS was sent and its code works, but earlier codes may still work too", 0}},
		{verify.ErrStateUnreadable, publicError{codes.Internal, "STATE_UNREADABLE", "what is stored of this number was written by a version that this one does not know", 0}},
		{verify.ErrCallerGone, publicError{codes.Canceled, "CALLER_GONE", "the caller went away, or its deadline passed, before anything was sent or counted", 0}},
		{verify.ErrStoreUnavailable, publicError{codes.Unavailable, "STORE_UNAVAILABLE", "the database is not available; nothing was sent and nothing was counted", time.Second}},
		{auth.ErrUnknown, publicError{codes.Unauthenticated, "CALLER_UNKNOWN", "who calls is not known: send the bearer token, or show the client certificate, of a caller that this service knows; nothing was sent and nothing was counted", 0}},
		{errMessageTooLarge, publicError{codes.ResourceExhausted, "MESSAGE_TOO_LARGE", "the message is larger than this service takes; nothing was sent and nothing was counted", 0}},
		{errOrigin, publicError{codes.PermissionDenied, "ORIGIN_NOT_ALLOWED", "web pages of this origin may not make calls; nothing was sent and nothing was counted", 0}},
		{errUnknownEncoding, publicError{codes.Unimplemented, "UNKNOWN_ENCODING", "the message is compressed in a way that this service does not read: send it as it is, or as gzip; nothing was sent and nothing was counted", 0}},
		{verify.ErrOutcomeUnknown, publicError{codes.Unknown, "CHECK_OUTCOME_UNKNOWN", "the database did not confirm the check; it may have been counted, or have used the code", 0}},
	}
	sendErrorTable = map[verify.SendKind]publicError{
		verify.SendUnknown:      {codes.Unknown, "SMS_OUTCOME_UNKNOWN", "Aliyun did not say whether it took the SMS; if it arrives, its code works", 0},
		verify.SendTimedOut:     {codes.DeadlineExceeded, "SMS_TIMEOUT", "Aliyun did not answer in time; if the SMS arrives, its code works", 0},
		verify.SendNotAttempted: {codes.Unavailable, "SMS_NOT_SENT", "Aliyun could not be reached or is throttling; nothing was sent", time.Second},
		verify.SendLimited:      {codes.ResourceExhausted, "SMS_LIMITED", "Aliyun's sending limit for this sign name and number is reached; nothing was sent", 0},
		verify.SendBadNumber:    {codes.InvalidArgument, "SMS_BAD_NUMBER", "Aliyun refused the phone number; nothing was sent", 0},
		verify.SendRejected:     {codes.FailedPrecondition, "SMS_REFUSED", "Aliyun refused the SMS: the number is blocked, or the account, sign name, template or key needs the operator's attention; nothing was sent", 0},
		verify.SendBadRequest:   {codes.Internal, "SMS_BAD_REQUEST", "Aliyun did not understand this service's request; nothing was sent", 0},
	}
	overloaded      = publicError{codes.Unavailable, "OVERLOADED", "too many calls are in flight; nothing was sent and nothing was counted", time.Second}
	headersTooLarge = publicError{codes.ResourceExhausted, "HEADERS_TOO_LARGE", "the headers of this call are larger than this service takes; nothing was sent and nothing was counted", 0}
	notAllowed      = publicError{codes.PermissionDenied, "CALLER_NOT_ALLOWED", "this caller may not use this %s; nothing was sent and nothing was counted", 0}
	rateLimited     = publicError{codes.ResourceExhausted, "CALLER_RATE_LIMITED", "this caller's own rate is used up; nothing was sent", 0}
	unknownPath     = publicError{codes.Unimplemented, "UNKNOWN_PATH", "no call has this path; the two calls are POST " + pb.PhoneNumberService_SendSMS_FullMethodName + " and POST " + pb.PhoneNumberService_Valid_FullMethodName, 0}
	// For a panic, and for every error that is not listed above.
	unclassified = publicError{codes.Internal, "INTERNAL", "internal error", 0}
)

// toStatus converts an error to the status for the caller: a fixed text and details. The
// cause is only logged.
func toStatus(err error) *status.Status {
	var fields fieldErrors
	if errors.As(err, &fields) {
		bad := &errdetails.BadRequest{}
		for _, f := range fields {
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: f.Field, Description: f.Want})
		}
		return withDetails(status.New(codes.InvalidArgument, fields.Error()), info(ownDomain, "INVALID_FIELD", ""), bad)
	}
	var send *verify.SendError
	if errors.As(err, &send) {
		return sendStatus(send)
	}
	var refused *auth.NotAllowedError
	if errors.As(err, &refused) {
		reason := info(ownDomain, notAllowed.reason, "")
		reason.Metadata = map[string]string{"refused": refused.Denied}
		return withDetails(status.Newf(notAllowed.code, notAllowed.text, refused.Denied), reason)
	}
	var used *auth.RateError
	if errors.As(err, &used) {
		a := rateLimited
		a.retryAfter = used.RetryAfter
		return a.status()
	}
	for _, a := range errorTable {
		if !errors.Is(err, a.err) {
			continue
		}
		if errors.Is(err, context.DeadlineExceeded) {
			a.code = codes.DeadlineExceeded // only ErrCallerGone keeps its cause
		}
		return a.status()
	}
	return unclassified.status()
}

func sendStatus(err *verify.SendError) *status.Status {
	a, ok := sendErrorTable[err.Kind]
	if !ok {
		a = sendErrorTable[verify.SendUnknown]
	}
	if err.RetryAfter > 0 {
		a.retryAfter = err.RetryAfter
	}
	reason := info(ownDomain, a.reason, err.RequestID)
	if err.Code != "" {
		reason = info(aliyunDomain, err.Code, err.RequestID)
	}
	s := withDetails(status.New(a.code, a.text), reason, a.retryInfo())
	if err.Kind == verify.SendBadNumber {
		s = withDetails(s, &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
			{Field: "phone_number", Description: "must be a number that Aliyun can send to"},
		}})
	}
	return s
}

func (a publicError) status() *status.Status {
	return withDetails(status.New(a.code, a.text), info(ownDomain, a.reason, ""), a.retryInfo())
}

func (a publicError) retryInfo() protoadapt.MessageV1 {
	if a.retryAfter == 0 {
		return nil
	}
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(a.retryAfter)}
}

func info(domain, reason, requestID string) *errdetails.ErrorInfo {
	i := &errdetails.ErrorInfo{Domain: domain, Reason: reason}
	if requestID != "" {
		i.Metadata = map[string]string{"request_id": requestID}
	}
	return i
}

func withDetails(s *status.Status, details ...protoadapt.MessageV1) *status.Status {
	for _, d := range details {
		if d == nil {
			continue
		}
		// Fails only for code OK, which no error has.
		if detailed, err := s.WithDetails(d); err == nil {
			s = detailed
		}
	}
	return s
}
