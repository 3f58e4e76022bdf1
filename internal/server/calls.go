package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var errPanic = errors.New("panic")

// callInfo collects attributes for the log line of a call. The handlers fill it in.
type callInfo struct {
	caller  *auth.Caller // nil without authentication
	number  verify.Number
	receipt verify.Receipt
	outcome string // of Valid
}

type callInfoKey struct{}

func callInfoFrom(ctx context.Context) *callInfo {
	if n, ok := ctx.Value(callInfoKey{}).(*callInfo); ok {
		return n
	}
	return &callInfo{}
}

// An authenticator returns the caller that the values of the header authorization and the
// verified client certificate belong to. The certificate is nil if there is none.
type authenticator func(authorization []string, certificate *x509.Certificate) (*auth.Caller, error)

// caller returns the caller that makes the call of ctx. A nil authenticator returns a nil caller.
func (f authenticator) caller(ctx context.Context) (*auth.Caller, error) {
	if f == nil {
		return nil, nil
	}
	var certificate *x509.Certificate
	if a := connInfoFrom(ctx); a.tls != nil && len(a.tls.VerifiedChains) > 0 && time.Now().Before(a.tls.VerifiedChains[0][0].NotAfter) {
		certificate = a.tls.VerifiedChains[0][0]
	}
	return f(metadata.ValueFromIncomingContext(ctx, "authorization"), certificate)
}

// callInterceptor wraps every call, over gRPC and HTTP. It authenticates the caller, starts
// the span, recovers panics, converts errors to statuses, and records metrics and one log
// line.
func callInterceptor(tel telemetry.Telemetry, authenticate authenticator) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		start := time.Now()
		method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
		if strings.HasPrefix(info.FullMethod, "/grpc.health.") {
			// Frequent health probes would hide the calls in logs and metrics.
			return recoverPanic(ctx, tel.Log, method, func() (any, error) { return handler(ctx, req) })
		}
		if parent := metadata.ValueFromIncomingContext(ctx, "traceparent"); len(parent) == 1 {
			ctx = telemetry.WithTrace(ctx, parent[0], strings.Join(metadata.ValueFromIncomingContext(ctx, "tracestate"), ","))
		}
		caller, authErr := authenticate.caller(ctx)
		switch {
		case authErr != nil:
			ctx = telemetry.WithCaller(ctx, auth.Unknown)
		case caller != nil:
			ctx = telemetry.WithCaller(ctx, caller.Name)
			authErr = caller.AuthorizeCall(method)
		}
		n := &callInfo{caller: caller}
		ctx, span := tel.Call(context.WithValue(ctx, callInfoKey{}, n), info.FullMethod)
		res, err := recoverPanic(ctx, tel.Log, method, func() (any, error) {
			if authErr != nil {
				return nil, authErr
			}
			return handler(ctx, req)
		})
		var s *status.Status // nil is OK
		if err != nil {
			res, s = nil, toStatus(err)
		}
		took := time.Since(start)
		span.End(s.Code(), n.number)
		tel.Metrics.ObserveCall(ctx, method, s.Code().String(), took)
		logCall(ctx, tel.Log, method, s.Code(), n, took, err)
		return res, s.Err()
	}
}

// recoverPanic turns a panic into an error. It logs only the type of the panic's value,
// unless it is a runtime.Error, because the value could contain a code.
func recoverPanic(ctx context.Context, log *slog.Logger, method string, f func() (any, error)) (res any, err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		value := fmt.Sprintf("%T", p)
		if r, ok := p.(runtime.Error); ok {
			value = r.Error()
		}
		log.ErrorContext(ctx, "panic in a call", "method", method, "panic", value, "stack", string(debug.Stack()))
		res, err = nil, errPanic
	}()
	return f()
}

func logCall(ctx context.Context, log *slog.Logger, method string, code codes.Code, n *callInfo, took time.Duration, err error) {
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
	attrs := append(make([]slog.Attr, 0, 15),
		slog.String("method", method),
		slog.String("status", code.String()),
		slog.Float64("duration_ms", telemetry.Milliseconds(took)))
	text := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	text("peer", peerOf(ctx))
	if n.number != "" {
		text("number", n.number.Masked())
		text("country", numberplan.Country(n.number))
	}
	text("outcome", n.outcome)
	var send *verify.SendError
	switch {
	case errors.As(err, &send):
		text("result", send.Kind.String())
		text("aliyun_code", send.ProviderCode)
		text("request_id", send.RequestID)
	case n.receipt.BizID != "":
		text("result", "accepted")
		text("aliyun_code", "OK")
		text("request_id", n.receipt.RequestID)
		text("biz_id", n.receipt.BizID)
	}
	text("trace_id", telemetry.TraceID(ctx))
	if err != nil {
		text("error", err.Error())
	}
	// Bypass slog.Logger, which would call runtime.Callers for the source position.
	record := slog.NewRecord(time.Now(), level, "call", 0)
	record.AddAttrs(attrs...)
	log.Handler().Handle(ctx, record)
}

// peerOf returns the peer's address of a call, without its port.
func peerOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	if tcp, ok := p.Addr.(*net.TCPAddr); ok {
		return tcp.IP.String()
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return p.Addr.String()
	}
	return host
}
