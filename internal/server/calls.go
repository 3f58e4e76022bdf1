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

	"github.com/liulinhuai/phone-number-service/internal/callers"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/observe"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var errPanic = errors.New("panic")

// callInfo are what a call's log line says beyond its outcome.
type callInfo struct {
	caller  *callers.Caller // nil where nobody asks
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

// An authenticator function returns who makes a call with these values of the header
// authorization and this verified client certificate, nil for none.
type authenticator func(authorization []string, certificate *x509.Certificate) (*callers.Caller, error)

// authenticate returns who makes the call of ctx. A nil function asks nobody, and returns nil.
func (f authenticator) authenticate(ctx context.Context) (*callers.Caller, error) {
	if f == nil {
		return nil, nil
	}
	var certificate *x509.Certificate
	if a := connInfoFrom(ctx); a.tls != nil && len(a.tls.VerifiedChains) > 0 && time.Now().Before(a.tls.VerifiedChains[0][0].NotAfter) {
		certificate = a.tls.VerifiedChains[0][0]
	}
	return f(metadata.ValueFromIncomingContext(ctx, "authorization"), certificate)
}

// callInterceptor is what every call of every protocol passes through: who makes it, its
// trace, a net under panics, the status for its error, its count and its one log line.
func callInterceptor(watch observe.Telemetry, who authenticator) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		start := time.Now()
		method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
		if strings.HasPrefix(info.FullMethod, "/grpc.health.") {
			// The probes of every few seconds would drown the calls.
			return recoverPanic(ctx, watch.Log, method, func() (any, error) { return handler(ctx, req) })
		}
		if parent := metadata.ValueFromIncomingContext(ctx, "traceparent"); len(parent) == 1 {
			ctx = observe.WithTrace(ctx, parent[0], strings.Join(metadata.ValueFromIncomingContext(ctx, "tracestate"), ","))
		}
		caller, refused := who.authenticate(ctx)
		switch {
		case refused != nil:
			ctx = observe.WithCaller(ctx, callers.Unknown)
		case caller != nil:
			ctx = observe.WithCaller(ctx, caller.Name)
			refused = caller.AuthorizeCall(method)
		}
		n := &callInfo{caller: caller}
		ctx, span := watch.Call(context.WithValue(ctx, callInfoKey{}, n), info.FullMethod)
		res, err := recoverPanic(ctx, watch.Log, method, func() (any, error) {
			if refused != nil {
				return nil, refused
			}
			return handler(ctx, req)
		})
		var s *status.Status // nil is OK
		if err != nil {
			res, s = nil, toStatus(err)
		}
		took := time.Since(start)
		span.End(s.Code(), n.number)
		watch.Metrics.ObserveCall(ctx, method, s.Code().String(), took)
		logCall(ctx, watch.Log, method, s.Code(), n, took, err)
		return res, s.Err()
	}
}

// recoverPanic turns a panic into an error. Of the panic's value only the kind is
// logged, unless it is the runtime's own: it could hold a code.
func recoverPanic(ctx context.Context, log *slog.Logger, method string, f func() (any, error)) (res any, err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		what := fmt.Sprintf("%T", p)
		if r, ok := p.(runtime.Error); ok {
			what = r.Error()
		}
		log.ErrorContext(ctx, "panic in a call", "method", method, "panic", what, "stack", string(debug.Stack()))
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
		slog.Float64("duration_ms", observe.Milliseconds(took)))
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
		text("aliyun_code", send.Code)
		text("request_id", send.RequestID)
	case n.receipt.BizID != "":
		text("result", "accepted")
		text("aliyun_code", "OK")
		text("request_id", n.receipt.RequestID)
		text("biz_id", n.receipt.BizID)
	}
	text("trace_id", observe.TraceID(ctx))
	if err != nil {
		text("error", err.Error())
	}
	// Not by the Logger, which would find out the line of the source.
	record := slog.NewRecord(time.Now(), level, "call", 0)
	record.AddAttrs(attrs...)
	log.Handler().Handle(ctx, record)
}

// peerOf is the address that a call came from, without its port.
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
