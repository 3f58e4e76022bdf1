package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var errPanic = errors.New("panic")

// notes are what a call's log line says beyond its outcome.
type notes struct {
	number  string // masked
	receipt verify.Receipt
}

type notesKey struct{}

func notesOf(ctx context.Context) *notes {
	if n, ok := ctx.Value(notesKey{}).(*notes); ok {
		return n
	}
	return &notes{}
}

// withDeadline gives a call that brings no deadline the default one. ctx must end
// with the call: what the deadline takes ends with it.
func withDeadline(ctx context.Context, standard time.Duration) context.Context {
	if _, ok := ctx.Deadline(); ok {
		return ctx
	}
	bounded, cancel := context.WithTimeout(ctx, standard) //nolint:gosec // ctx ends it
	_ = cancel
	return bounded
}

// aroundCall is what every call of every protocol passes through: a net under
// panics, the status for its error, and its one log line.
func aroundCall(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		start := time.Now()
		n := &notes{}
		res, err := recovered(log, info.FullMethod, func() (any, error) {
			return handler(context.WithValue(ctx, notesKey{}, n), req)
		})
		if strings.HasPrefix(info.FullMethod, "/grpc.health.") {
			return res, err // the probes of every few seconds would drown the calls
		}
		var s *status.Status // nil is OK
		if err != nil {
			res, s = nil, toStatus(err)
		}
		logCall(log, info.FullMethod, s.Code(), n, start, err)
		return res, s.Err()
	}
}

// recovered turns a panic into an error. Of the panic's value only the kind is
// logged, unless it is the runtime's own: it could hold a code.
func recovered(log *slog.Logger, method string, f func() (any, error)) (res any, err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		what := fmt.Sprintf("%T", p)
		if r, ok := p.(runtime.Error); ok {
			what = r.Error()
		}
		log.Error("panic in a call", "method", method, "panic", what, "stack", string(debug.Stack()))
		res, err = nil, errPanic
	}()
	return f()
}

func logCall(log *slog.Logger, method string, code codes.Code, n *notes, start time.Time, err error) {
	level := slog.LevelWarn
	switch code {
	case codes.OK, codes.InvalidArgument, codes.ResourceExhausted, codes.Aborted:
		level = slog.LevelInfo
	}
	if errors.Is(err, verify.ErrCallerGone) {
		level = slog.LevelInfo
	}
	attrs := append(make([]slog.Attr, 0, 7),
		slog.String("method", method[strings.LastIndexByte(method, '/')+1:]),
		slog.String("status", code.String()),
		slog.Float64("duration_ms", float64(time.Since(start).Microseconds())/1000))
	if n.number != "" {
		attrs = append(attrs, slog.String("number", n.number))
	}
	if n.receipt.BizID != "" {
		attrs = append(attrs, slog.String("biz_id", n.receipt.BizID), slog.String("request_id", n.receipt.RequestID))
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	log.LogAttrs(context.Background(), level, "call", attrs...)
}
