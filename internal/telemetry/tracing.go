package telemetry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// CheckTracing returns an error if an OpenTelemetry variable is invalid. It quotes no values:
// addresses and headers can contain credentials.
func CheckTracing() error {
	if endpoint := tracesEndpoint(); endpoint != "" {
		u, err := url.Parse(endpoint)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return errors.New("OTEL_EXPORTER_OTLP_ENDPOINT must be http:// or https:// with a host and a port, such as http://collector:4318")
		}
		if p := tracesProtocol(); p != protocolHTTP && p != protocolGRPC {
			return errors.New("OTEL_EXPORTER_OTLP_PROTOCOL must be " + protocolHTTP + " or " + protocolGRPC)
		}
	}
	for _, name := range []string{"OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_RESOURCE_ATTRIBUTES"} {
		for pair := range strings.SplitSeq(os.Getenv(name), ",") {
			key, value, ok := strings.Cut(pair, "=")
			_, err := url.PathUnescape(value)
			if strings.TrimSpace(pair) != "" && (!ok || strings.TrimSpace(key) == "" || err != nil) {
				return errors.New(name + " must be key=value, with commas between several and % before two hexadecimal digits")
			}
		}
	}
	return nil
}

const protocolHTTP, protocolGRPC = "http/protobuf", "grpc"

// tracesEndpoint returns the address of the collector, "" if traces are not exported.
func tracesEndpoint() string {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") || os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return ""
	}
	return cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT"))
}

func tracesProtocol() string {
	return cmp.Or(os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL"), protocolHTTP)
}

// Start returns the telemetry of the process. It exports spans by OTLP as configured by the
// OpenTelemetry variables (https://opentelemetry.io/docs/specs/otel/protocol/exporter), and none
// without an OTEL_EXPORTER_OTLP_ENDPOINT. stop exports the remaining spans.
func Start(ctx context.Context, version string, log *slog.Logger) (t Telemetry, stop func(), err error) {
	t = Telemetry{Metrics: NewMetrics(version), Log: log}
	if tracesEndpoint() == "" {
		return t, func() {}, nil
	}
	// OpenTelemetry's default logger writes to stderr, and quotes invalid values.
	otel.SetLogger(logr.Discard())
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		log.Warn("failed to export traces", "error", truncate(err))
	}))
	var exporter sdktrace.SpanExporter
	if tracesProtocol() == protocolGRPC {
		exporter, err = otlptracegrpc.New(ctx)
	} else {
		exporter, err = otlptracehttp.New(ctx)
	}
	if err != nil {
		return t, nil, fmt.Errorf("traces cannot be exported: %s", truncate(err))
	}
	attributes, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithHost(), resource.WithAttributes(
		attribute.String("service.name", "phone-number-service"), attribute.String("service.version", version)), resource.WithFromEnv())
	if err != nil {
		log.Warn("failed to read all resource attributes of traces", "error", truncate(err))
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(attributes),
		sdktrace.WithoutPanicRecording()) // a panic's value could contain a code
	t.Tracer = provider.Tracer("github.com/liulinhuai/phone-number-service")
	return t, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			log.Warn("failed to export the last traces", "error", truncate(err))
		}
	}, nil
}

// truncate shortens the text of an error, which can contain a whole page of the collector.
func truncate(err error) string {
	const maxBytes = 200
	text := err.Error()
	return text[:min(len(text), maxBytes)]
}

// WithTrace returns ctx with the trace of a caller's W3C trace context.
func WithTrace(ctx context.Context, traceparent, tracestate string) context.Context {
	return propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": traceparent, "tracestate": tracestate})
}

// TraceID returns the ID of the trace of ctx, "" for none.
func TraceID(ctx context.Context) string {
	if c := trace.SpanContextFromContext(ctx); c.HasTraceID() {
		return c.TraceID().String()
	}
	return ""
}
