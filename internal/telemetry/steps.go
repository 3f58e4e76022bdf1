package telemetry

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	grpccodes "google.golang.org/grpc/codes"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Telemetry instruments calls and their steps at the database and at Aliyun. Each step is
// measured, is a span if traces are exported, and is logged at debug level.
type Telemetry struct {
	Metrics *Metrics
	Tracer  trace.Tracer // nil if traces are not exported
	Log     *slog.Logger
}

type callerKey struct{}

// WithCaller returns ctx with the name of the caller of its call.
func WithCaller(ctx context.Context, name string) context.Context {
	return context.WithValue(ctx, callerKey{}, name)
}

// CallerOf returns the name of the caller of the call of ctx, "" without authentication.
func CallerOf(ctx context.Context) string {
	name, _ := ctx.Value(callerKey{}).(string)
	return name
}

// Rejected counts a call or connection that was rejected before it was handled.
func (s Telemetry) Rejected(reason string) {
	s.Metrics.rejected.WithLabelValues(reason).Inc()
	level := slog.LevelDebug
	if reason == "calls" || reason == "connections" {
		level = slog.LevelWarn
	}
	s.Log.Log(context.Background(), level, "rejected", "reason", reason)
}

// Store returns next with instrumentation.
func (s Telemetry) Store(next verify.Store) verify.Store { return instrumentedStore{s, next} }

// Sender returns next with instrumentation.
func (s Telemetry) Sender(next verify.Sender) verify.Sender { return instrumentedSender{s, next} }

// Span is the span of a call. The zero value does nothing.
type Span struct {
	span   trace.Span
	caller string
}

// Call starts the span of a call in the trace of ctx.
func (s Telemetry) Call(ctx context.Context, fullMethod string) (context.Context, Span) {
	if s.Tracer == nil {
		return ctx, Span{}
	}
	service, method, _ := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	ctx, span := s.Tracer.Start(ctx, service+"/"+method, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
		attribute.String("rpc.system", "grpc"), attribute.String("rpc.service", service), attribute.String("rpc.method", method)))
	return ctx, Span{span, CallerOf(ctx)}
}

// End ends the span with the gRPC status of the call. n is "" if the number is unknown.
func (s Span) End(status grpccodes.Code, n verify.Number) {
	if s.span == nil {
		return
	}
	s.span.SetAttributes(attribute.Int("rpc.grpc.status_code", int(status)))
	if n != "" {
		s.span.SetAttributes(attribute.String("phone_number.masked", n.Masked()))
	}
	if s.caller != "" {
		s.span.SetAttributes(attribute.String("caller", s.caller))
	}
	switch status { // server errors, by the semantic conventions
	case grpccodes.Unknown, grpccodes.DeadlineExceeded, grpccodes.Unimplemented, grpccodes.Internal, grpccodes.Unavailable, grpccodes.DataLoss:
		s.span.SetStatus(codes.Error, status.String())
	}
	s.span.End()
}

// instrumentedStore is a Store whose calls are measured, traced and logged.
type instrumentedStore struct {
	Telemetry
	next verify.Store
}

func (w instrumentedStore) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	ctx, step := w.begin(ctx, "load", n)
	record, err := w.next.Load(ctx, n)
	result := resultOf(true, err)
	w.Metrics.database.WithLabelValues("load", result).Observe(step.took().Seconds())
	step.end(result, err)
	return record, err
}

func (w instrumentedStore) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	ctx, step := w.begin(ctx, "swap", n)
	done, err := w.next.Swap(ctx, n, old, next)
	result := resultOf(done, err)
	w.Metrics.database.WithLabelValues("swap", result).Observe(step.took().Seconds())
	step.end(result, err)
	return done, err
}

func resultOf(done bool, err error) string {
	switch {
	case errors.Is(err, verify.ErrOutcomeUnknown):
		return "unknown"
	case err != nil:
		return "error"
	case !done:
		return "conflict"
	}
	return "ok"
}

// instrumentedSender is a Sender whose calls are measured, traced and logged.
type instrumentedSender struct {
	Telemetry
	next verify.Sender
}

func (w instrumentedSender) Send(ctx context.Context, m verify.Message) (verify.Receipt, error) {
	ctx, step := w.begin(ctx, "aliyun", m.Number)
	receipt, err := w.next.Send(ctx, m)
	result, code, requestID := "accepted", "OK", receipt.RequestID
	var safeErr error
	if err != nil {
		sendErr := verify.SendErrorOf(err)
		safeErr = sendErr
		result, code, requestID = sendErr.Kind.String(), cmp.Or(sendErr.ProviderCode, "none"), sendErr.RequestID
	}
	w.Metrics.observeSend(ctx, m.Number, result, code, step.took())
	step.end(result, safeErr, slog.String("aliyun_code", code), slog.String("request_id", requestID), slog.String("biz_id", receipt.BizID))
	return receipt, err
}

// span is one step of a call at the database or at Aliyun.
type span struct {
	Telemetry
	ctx    context.Context
	name   string
	number verify.Number
	start  time.Time
	span   trace.Span // nil if traces are not exported
}

func (s Telemetry) begin(ctx context.Context, name string, n verify.Number) (context.Context, *span) {
	started := &span{Telemetry: s, name: name, number: n, start: time.Now()}
	if s.Tracer != nil {
		ctx, started.span = s.Tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindClient))
	}
	started.ctx = ctx
	return ctx, started
}

func (s *span) took() time.Duration { return time.Since(s.start) }

// end records the result of the step. It drops details without a value.
func (s *span) end(result string, err error, details ...slog.Attr) {
	details = slices.DeleteFunc(details, func(d slog.Attr) bool { return d.Value.String() == "" })
	if s.span != nil {
		s.span.SetAttributes(attribute.String("result", result))
		for _, d := range details {
			s.span.SetAttributes(attribute.String(d.Key, d.Value.String()))
		}
		if err != nil {
			s.span.SetStatus(codes.Error, err.Error())
		}
		s.span.End()
	}
	if !s.Log.Enabled(s.ctx, slog.LevelDebug) {
		return
	}
	attrs := []slog.Attr{
		slog.String("step", s.name), slog.String("result", result), slog.String("number", s.number.Masked()),
		slog.Float64("duration_ms", Milliseconds(s.took())),
	}
	attrs = append(attrs, details...)
	if id := TraceID(s.ctx); id != "" {
		attrs = append(attrs, slog.String("trace_id", id))
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	s.Log.LogAttrs(s.ctx, slog.LevelDebug, "step", attrs...)
}

// Milliseconds returns d in the unit of log lines.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
