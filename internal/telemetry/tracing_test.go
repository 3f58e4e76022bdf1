package telemetry

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

func TestCheckTracing_ErrorNamesVariableAndHidesValue(t *testing.T) {
	for _, c := range []struct {
		name, value string
		want        string // in the error; "" if the value is valid
	}{
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318", ""},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "OTEL_EXPORTER_OTLP_ENDPOINT must be http://"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:s3cret@bad host:4318", "OTEL_EXPORTER_OTLP_ENDPOINT must be http://"},
		{"OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "must be http/protobuf or grpc"},
		{"OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20s3cret, x=1", ""},
		{"OTEL_EXPORTER_OTLP_HEADERS", "Bearer-s3cret", "OTEL_EXPORTER_OTLP_HEADERS must be key=value"},
		{"OTEL_EXPORTER_OTLP_TRACES_HEADERS", "api-key=s3cret%zz", "OTEL_EXPORTER_OTLP_TRACES_HEADERS must be key=value"},
		{"OTEL_RESOURCE_ATTRIBUTES", "s3cret", "OTEL_RESOURCE_ATTRIBUTES must be key=value"},
		{"OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=production,a=b", ""},
	} {
		t.Run(c.name+" "+c.value, func(t *testing.T) {
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
			t.Setenv(c.name, c.value)
			err := CheckTracing()
			if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "s3cret")) {
				t.Errorf("got %v, want %q in it, and no value", err, c.want)
			}
		})
	}
}

func TestStart_TracingCanBeDisabled(t *testing.T) {
	for name, value := range map[string]string{
		"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "none",
		"OTEL_EXPORTER_OTLP_ENDPOINT": "",
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
			t.Setenv(name, value)
			if tel, _, err := Start(t.Context(), "test", nil); tel.Tracer != nil || err != nil {
				t.Errorf("got %v, %v, want no tracer and no error", tel.Tracer, err)
			}
		})
	}
}

func TestStart_LogOmitsTheCollectorsPage(t *testing.T) {
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		w.Write(bytes.Repeat([]byte("page "), 100_000))
	}))
	defer collector.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
	var out testutil.Output
	tel, stop, err := Start(t.Context(), "test", slog.New(slog.NewTextHandler(&out, nil)))
	if err != nil {
		t.Fatal(err)
	}
	_, span := tel.Tracer.Start(t.Context(), "a call")
	span.End()
	stop()
	if got := out.String(); !strings.Contains(got, "failed to export") || len(got) > 1000 {
		t.Errorf("got a log of %d bytes, want 1000 at most, with the failed export", len(got))
	}
}
