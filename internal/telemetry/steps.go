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

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/sms"
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
func (t Telemetry) Rejected(reason string) {
	t.Metrics.rejected.WithLabelValues(reason).Inc()
	level := slog.LevelDebug
	if reason == "calls" || reason == "connections" {
		level = slog.LevelWarn
	}
	t.Log.Log(context.Background(), level, "rejected", "reason", reason)
}

// Store returns next with instrumentation.
func (t Telemetry) Store(next verify.Store) verify.Store { return instrumentedStore{t, next} }

// Sender returns next with instrumentation.
func (t Telemetry) Sender(next verify.Sender) verify.Sender { return instrumentedSender{t, next} }

// BeginCall starts to measure a call, and its span in the trace of ctx. end records the gRPC status of
// the call, and returns its duration; n is "" if the number is unknown.
func (t Telemetry) BeginCall(ctx context.Context, fullMethod string) (
	_ context.Context, end func(status grpccodes.Code, n verify.Number) time.Duration,
) {
	start := time.Now()
	service, method, _ := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	var span trace.Span
	if t.Tracer != nil {
		ctx, span = t.Tracer.Start(ctx, service+"/"+method, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
			attribute.String("rpc.system", "grpc"), attribute.String("rpc.service", service), attribute.String("rpc.method", method)))
	}
	return ctx, func(status grpccodes.Code, n verify.Number) time.Duration {
		took := time.Since(start)
		t.Metrics.calls.WithLabelValues(method, status.String(), t.Metrics.caller(ctx)).Observe(took.Seconds())
		if span == nil {
			return took
		}
		span.SetAttributes(attribute.Int("rpc.grpc.status_code", int(status)))
		if n != "" {
			span.SetAttributes(attribute.String("phone_number.masked", n.Masked()))
		}
		if caller := CallerOf(ctx); caller != "" {
			span.SetAttributes(attribute.String("caller", caller))
		}
		switch status { // server errors, by the semantic conventions
		case grpccodes.Unknown, grpccodes.DeadlineExceeded, grpccodes.Unimplemented, grpccodes.Internal, grpccodes.Unavailable,
			grpccodes.DataLoss:
			span.SetStatus(codes.Error, status.String())
		}
		span.End()
		return took
	}
}

// instrumentedStore is a Store whose calls are measured, traced and logged.
type instrumentedStore struct {
	Telemetry
	next verify.Store
}

func (i instrumentedStore) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	ctx, step := i.begin(ctx, "load", n)
	record, err := i.next.Load(ctx, n)
	step.endDatabase(true, err)
	return record, err
}

func (i instrumentedStore) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	ctx, step := i.begin(ctx, "swap", n)
	done, err := i.next.Swap(ctx, n, old, next)
	step.endDatabase(done, err)
	return done, err
}

// instrumentedSender is a Sender whose calls are measured, traced and logged.
type instrumentedSender struct {
	Telemetry
	next verify.Sender
}

func (i instrumentedSender) Send(ctx context.Context, m verify.Message) (verify.Receipt, error) {
	ctx, step := i.begin(ctx, "aliyun", m.Number)
	receipt, err := i.next.Send(ctx, m)
	result, code, requestID := "accepted", "OK", receipt.RequestID
	var safeErr error // without the text of err, which could quote the message
	if err != nil {
		sendErr := verify.SendErrorOf(err)
		safeErr = sendErr
		result, code, requestID = sendErr.Kind.String(), cmp.Or(sendErr.ProviderCode, "none"), sendErr.RequestID
	}
	product := string(sms.ProductOf(m.TemplateCode))
	i.Metrics.sends.WithLabelValues(
		product, result, i.Metrics.aliyunCodes.value(code), numberplan.Country(m.Number), i.Metrics.caller(ctx)).Inc()
	i.Metrics.aliyun.WithLabelValues(product, result).Observe(step.took().Seconds())
	step.end(result, safeErr, slog.String("product", product), slog.String("aliyun_code", code),
		slog.String("request_id", requestID), slog.String("biz_id", receipt.BizID))
	return receipt, err
}

// step is a load, a swap or a send of a call.
type step struct {
	Telemetry
	ctx    context.Context
	name   string
	number verify.Number
	start  time.Time
	span   trace.Span // nil if traces are not exported
}

// begin starts a step, and its span in the trace of ctx.
func (t Telemetry) begin(ctx context.Context, name string, n verify.Number) (context.Context, *step) {
	s := &step{Telemetry: t, name: name, number: n, start: time.Now()}
	if t.Tracer != nil {
		ctx, s.span = t.Tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindClient))
	}
	s.ctx = ctx
	return ctx, s
}

func (s *step) took() time.Duration { return time.Since(s.start) }

// endDatabase ends a load or a swap. done is false if a swap found another version.
func (s *step) endDatabase(done bool, err error) {
	result := "ok"
	switch {
	case errors.Is(err, verify.ErrOutcomeUnknown):
		result = "unknown"
	case err != nil:
		result = "error"
	case !done:
		result = "conflict"
	}
	s.Metrics.database.WithLabelValues(s.name, result).Observe(s.took().Seconds())
	s.end(result, err)
}

// end records the result of the step. It drops details without a value.
func (s *step) end(result string, err error, details ...slog.Attr) {
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
	attrs := append([]slog.Attr{
		slog.String("step", s.name), slog.String("result", result), slog.String("number", s.number.Masked()),
		slog.Float64("duration_ms", Milliseconds(s.took())),
	}, details...)
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
