package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/connmux"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var errPanic = errors.New("panic")

// call has the data of one call. admission.tap creates it for gRPC, and unaryHandler for HTTP/1.1. It is
// stored in the context of the call. The interceptors and the handlers set more of its fields.
type call struct {
	peer    string               // address without the port
	tls     *tls.ConnectionState // nil for plaintext
	headers metadata.MD          // over HTTP/1.1 only those that the service reads

	// Set only over gRPC.
	stream          connmux.Stream
	headersTooLarge bool
	cancel          context.CancelFunc // of the context of the stream

	fullMethod string // "/package.Service/Method"
	req        any    // nil over HTTP/1.1
	handler    grpc.UnaryHandler

	caller  *auth.Caller // nil without authentication
	authErr error        // set if the caller is unknown

	response metadata.MD // metadata of the response

	// For the log line.
	number  verify.Number
	product sms.Product // of a send (SendSMS)
	receipt verify.Receipt
	outcome string // result of a check (Valid)

	hasContext  bool   // the call has a verification context
	idempotency string // of a send with an idempotency key
}

type callKey struct{}

// callFrom returns the call that is stored in ctx. It panics if ctx has no call: then a handler runs
// outside of the interceptors, and nothing authenticates, limits or logs its call.
func callFrom(ctx context.Context) *call { return ctx.Value(callKey{}).(*call) }

// method returns the name of the method without the name of the service.
func (c *call) method() string { return c.fullMethod[strings.LastIndexByte(c.fullMethod, '/')+1:] }

// A handler runs a call, and returns its response or its error.
type handler func(ctx context.Context, c *call) (any, error)

// An interceptor wraps the next handler of a call.
type interceptor func(ctx context.Context, c *call, next handler) (any, error)

// chain returns a handler that runs the interceptors around the handler of the call. The first
// interceptor is the outermost. The returned handler allocates no memory.
func chain(interceptors ...interceptor) handler {
	next := func(ctx context.Context, c *call) (any, error) { return c.handler(ctx, c.req) }
	for _, i := range slices.Backward(interceptors) {
		inner := next
		next = func(ctx context.Context, c *call) (any, error) { return i(ctx, c, inner) }
	}
	return next
}

// chains contains the chain of interceptors for each kind of unary call.
type chains struct{ calls, healthCheck, healthList handler }

func newChains(a *admission, f authenticator, tel telemetry.Telemetry) chains {
	return chains{
		calls: chain(authenticate(f), a.admit, observe(tel), recoverPanics(tel.Log), authorize),
		// A health check is not logged or counted, because frequent probes would hide the calls in
		// logs and metrics. It needs no slot and no caller, because a failed probe would restart
		// an overloaded replica.
		healthCheck: chain(recoverPanics(tel.Log)),
		// Probes do not list the health of all services, so this method is limited like a call.
		healthList: chain(authenticate(f), a.admit, recoverPanics(tel.Log)),
	}
}

// unary implements grpc.UnaryServerInterceptor.
func (h chains) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	c := callFrom(ctx)
	c.stream.Start()
	defer c.stream.End()
	if c.headersTooLarge {
		return nil, headersTooLarge.status().Err()
	}
	c.fullMethod, c.req, c.handler = info.FullMethod, req, handler
	switch info.FullMethod {
	case healthpb.Health_Check_FullMethodName:
		return h.healthCheck(ctx, c)
	case healthpb.Health_List_FullMethodName:
		return h.healthList(ctx, c)
	}
	res, err := h.calls(ctx, c)
	if c.response != nil {
		grpc.SetHeader(ctx, c.response) //nolint:errcheck // the stream has ended
	}
	return res, err
}

// An authenticator identifies a caller by its credential: the values of the header authorization, or the
// verified client certificate. A nil certificate means that there is none. An authenticator returns an
// error if the caller is unknown.
type authenticator func(authorization []string, certificate *x509.Certificate) (*auth.Caller, error)

// authenticate returns an interceptor that sets the caller of the call. It does not reject unknown
// callers: authorize does, so that their calls are logged. If f is nil, the caller is nil, and a nil
// caller may do everything.
func authenticate(f authenticator) interceptor {
	return func(ctx context.Context, c *call, next handler) (any, error) {
		if f != nil {
			var certificate *x509.Certificate
			if c.tls != nil && len(c.tls.VerifiedChains) > 0 && time.Now().Before(c.tls.VerifiedChains[0][0].NotAfter) {
				certificate = c.tls.VerifiedChains[0][0]
			}
			c.caller, c.authErr = f(c.headers["authorization"], certificate)
		}
		return next(ctx, c)
	}
}

// observe returns an interceptor that records a trace span, metrics and one log line for each call. The
// log line has the error; the caller gets its status (toStatus).
func observe(tel telemetry.Telemetry) interceptor {
	return func(ctx context.Context, c *call, next handler) (any, error) {
		if parent := c.headers["traceparent"]; len(parent) == 1 {
			ctx = telemetry.WithTrace(ctx, parent[0], strings.Join(c.headers["tracestate"], ","))
		}
		switch {
		case c.authErr != nil:
			ctx = telemetry.WithCaller(ctx, auth.Unknown)
		case c.caller != nil:
			ctx = telemetry.WithCaller(ctx, c.caller.Name)
		}
		ctx, end := tel.BeginCall(ctx, c.fullMethod)
		res, err := next(ctx, c)
		var s *status.Status // nil is OK
		if err != nil {
			s = toStatus(err)
		}
		logCall(ctx, tel.Log, c, err, s.Code(), end(s.Code(), c.number))
		return res, s.Err()
	}
}

// recoverPanics returns an interceptor that turns a panic into errPanic.
func recoverPanics(log *slog.Logger) interceptor {
	return func(ctx context.Context, c *call, next handler) (res any, err error) {
		defer recoverPanic(ctx, log, c.method(), &err)
		return next(ctx, c)
	}
}

// recoverPanic must be deferred. If the function panics, it sets *err to errPanic and logs the panic. It
// logs only the type of the panic's value, because the value can contain a code. It logs the text of a
// runtime.Error.
func recoverPanic(ctx context.Context, log *slog.Logger, method string, err *error) {
	p := recover()
	if p == nil {
		return
	}
	value := fmt.Sprintf("%T", p)
	if r, ok := p.(runtime.Error); ok {
		value = r.Error()
	}
	log.ErrorContext(ctx, "recovered from a panic", "method", method, "panic", value, "stack", string(debug.Stack()))
	*err = errPanic
}

// authorize is an interceptor. It rejects unknown callers, and callers that are not allowed to use the
// method.
func authorize(ctx context.Context, c *call, next handler) (any, error) {
	if c.authErr != nil {
		return nil, c.authErr
	}
	if err := c.caller.AuthorizeCall(c.method()); err != nil {
		return nil, err
	}
	return next(ctx, c)
}

// logCall writes the log line of a call. err is the error before its conversion to a status.
func logCall(ctx context.Context, log *slog.Logger, c *call, err error, code codes.Code, took time.Duration) {
	level := slog.LevelWarn
	switch code {
	case codes.OK, codes.InvalidArgument, codes.ResourceExhausted, codes.Aborted:
		level = slog.LevelInfo
	}
	if errors.Is(err, verify.ErrCallerGone) {
		level = slog.LevelInfo
	}
	if !log.Enabled(ctx, level) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 16),
		slog.String("method", c.method()),
		slog.String("status", code.String()),
		slog.Float64("duration_ms", telemetry.Milliseconds(took)))
	text := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	text("peer", c.peer)
	if c.number != "" {
		text("number", c.number.Masked())
		text("country", numberplan.Country(c.number))
	}
	text("product", string(c.product))
	text("outcome", c.outcome)
	if c.hasContext {
		text("verification_context", "present")
	}
	text("idempotency", c.idempotency)
	var send *verify.SendError
	switch {
	case errors.As(err, &send):
		text("result", send.Kind.String())
		text("aliyun_code", send.ProviderCode)
		text("request_id", send.RequestID)
	case c.receipt.BizID != "":
		text("result", "accepted")
		text("aliyun_code", "OK")
		text("request_id", c.receipt.RequestID)
		text("biz_id", c.receipt.BizID)
	}
	text("trace_id", telemetry.TraceID(ctx))
	if err != nil {
		text("error", err.Error())
	}
	// Use the Handler directly: slog.Logger would call runtime.Callers for the source position.
	record := slog.NewRecord(time.Now(), level, "call", 0)
	record.AddAttrs(attrs...)
	log.Handler().Handle(ctx, record)
}
