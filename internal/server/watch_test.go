package server_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	traces "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
)

// scraped makes c serve metrics and probes, and returns a function that requests one of them.
func scraped(t *testing.T, c *server.Config) (get func(path string) (status int, body string)) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.Metrics = listener
	return func(path string) (int, string) {
		t.Helper()
		q, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+listener.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		return servertest.Do(t, q)
	}
}

func TestMetrics_CountCallsOfEveryProtocol(t *testing.T) {
	var get func(string) (int, string)
	fake := dysmsapitest.New(t)
	fake.Limits(true)
	r := servertest.Start(t, servertest.OpenStore(t, mysqltest.DSN(t)), aliyun(t, fake), func(c *server.Config) { get = scraped(t, c) })
	r.MustSend(t, "18699998888")
	r.SendSMS(t.Context(), servertest.SendRequest("18699998888"))
	r.Post(t, "SendSMS", `{"phone_number":"10086"}`)
	code := fake.LastCode(t, "18699998888")
	r.Post(t, "Valid", `{"phone_number":"18699998888","code":"`+wrong(code, 0)+`"}`)
	r.IsValid(t, "18699998888", code)
	status, body := get("/metrics")
	if status != 200 {
		t.Errorf("/metrics: got HTTP %d; want 200", status)
	}
	for _, want := range []string{
		`phonenumber_call_duration_seconds_count{caller="",method="SendSMS",status="OK"} 1`,
		`phonenumber_call_duration_seconds_count{caller="",method="SendSMS",status="ResourceExhausted"} 1`,
		`phonenumber_call_duration_seconds_count{caller="",method="SendSMS",status="InvalidArgument"} 1`,
		`phonenumber_call_duration_seconds_count{caller="",method="Valid",status="OK"} 2`,
		`phonenumber_sends_total{aliyun_code="OK",caller="",country="CN",product="sms",result="accepted"} 1`,
		`phonenumber_sends_total{aliyun_code="isv.BUSINESS_LIMIT_CONTROL",caller="",country="CN",product="sms",result="limited"} 1`,
		`phonenumber_verifications_total{caller="",country="CN",outcome="match"} 1`,
		`phonenumber_verifications_total{caller="",country="CN",outcome="mismatch"} 1`,
		`phonenumber_ready 1`,
	} {
		if !strings.Contains(body, "\n"+want+"\n") {
			t.Errorf("the metrics lack %s", want)
		}
	}
	for _, secret := range []string{code, "99998888", "10086"} {
		if strings.Contains(body, secret) {
			t.Errorf("the metrics contain %s", secret)
		}
	}
}

func TestProbes_ReadinessFollowsTheDatabaseLivenessDoesNot(t *testing.T) {
	var get func(string) (int, string)
	var down atomic.Bool
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), nil, func(c *server.Config) {
		get = scraped(t, c)
		ready := c.Ready
		c.Ready = func(ctx context.Context) error {
			if down.Load() {
				return errors.New("down")
			}
			return ready(ctx)
		}
	})
	is := func(path string, want int) bool { got, _ := get(path); return got == want }
	metric := func(want string) bool { _, body := get("/metrics"); return strings.Contains(body, want) }
	testutil.Eventually(t, "ready", func() bool { return is("/readyz", 200) })
	down.Store(true)
	testutil.Eventually(t, "not ready without the database", func() bool { return is("/readyz", 503) && metric("phonenumber_ready 0") })
	if !is("/healthz", 200) {
		t.Error("/healthz without the database: got no 200; want 200, since a restart would not help")
	}
	down.Store(false)
	testutil.Eventually(t, "ready again", func() bool { return is("/readyz", 200) && metric("phonenumber_ready 1") })
	if is("/", 200) || is("/inbox.json", 200) {
		t.Error("/ and /inbox.json at the metrics address: got 200; want an error")
	}
	if status, _ := r.Ask(t, "GET", "/metrics", ""); status != 404 {
		t.Errorf("/metrics at the callers' port: got %d; want 404", status)
	}
}

// A tracesReceiver receives OTLP over HTTP and gRPC.
type tracesReceiver struct {
	collector.UnimplementedTraceServiceServer
	mu    sync.Mutex
	spans []*traces.Span
	raw   bytes.Buffer
}

func (r *tracesReceiver) Export(_ context.Context, q *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, resource := range q.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			r.spans = append(r.spans, scope.GetSpans()...)
		}
	}
	raw, err := proto.Marshal(q)
	r.raw.Write(raw)
	return &collector.ExportTraceServiceResponse{}, err
}

func (r *tracesReceiver) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, _ := io.ReadAll(q.Body)
	var request collector.ExportTraceServiceRequest
	if q.URL.Path != "/v1/traces" || proto.Unmarshal(body, &request) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	r.Export(q.Context(), &request)
}

func TestTracing_EveryStepIsInTheCallersTrace(t *testing.T) {
	for protocol, listen := range map[string]func(*tracesReceiver) string{
		"http/protobuf": func(r *tracesReceiver) string {
			s := httptest.NewServer(r)
			t.Cleanup(s.Close)
			return s.URL
		},
		"grpc": func(r *tracesReceiver) string {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s := grpc.NewServer()
			collector.RegisterTraceServiceServer(s, r)
			go s.Serve(listener)
			t.Cleanup(s.Stop)
			return "http://" + listener.Addr().String()
		},
	} {
		t.Run(protocol, func(t *testing.T) {
			var received tracesReceiver
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", listen(&received))
			t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
			t.Setenv("OTEL_SERVICE_NAME", "login-codes")
			fake := dysmsapitest.New(t)
			fake.Limits(true)
			var stop func()
			r := servertest.Start(t, servertest.OpenStore(t, mysqltest.DSN(t)), aliyun(t, fake), func(c *server.Config) {
				var err error
				if c.Telemetry, stop, err = telemetry.Start(t.Context(), "test", c.Telemetry.Log); err != nil {
					t.Fatal(err)
				}
			})
			const trace1, trace2, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "5bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
			ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+trace1+"-"+parent+"-01")
			number := servertest.FreshNumber()
			if _, err := r.SendSMS(ctx, servertest.SendRequest(number)); err != nil {
				t.Fatal(err)
			}
			if _, err := r.SendSMS(ctx, servertest.SendRequest(number)); err == nil {
				t.Fatal("a second send within a minute: got OK; want an error")
			}
			testutil.Eventually(t, "the rejected code is withdrawn", func() bool {
				return strings.Count(r.Log.String(), "step=swap result=ok") == 3
			})
			code := fake.LastCode(t, number)
			r.Post(t, "Valid", `{"phone_number":"`+number+`","code":"`+code+`"}`, "traceparent", "00-"+trace2+"-"+parent+"-01")
			stop()

			received.mu.Lock()
			defer received.mu.Unlock()
			got := map[string][]string{}
			for _, s := range received.spans {
				id := hex.EncodeToString(s.GetTraceId())
				got[id] = append(got[id], s.GetName())
				if s.GetKind() == traces.Span_SPAN_KIND_SERVER {
					if p := hex.EncodeToString(s.GetParentSpanId()); p != parent {
						t.Errorf("parent of %s: got %s; want %s, the caller's span", s.GetName(), p, parent)
					}
				}
			}
			for _, names := range got {
				slices.Sort(names)
			}
			const sends, valid = "phonenumberservice.PhoneNumberService/SendSMS", "phonenumberservice.PhoneNumberService/Valid"
			// Begin, Aliyun; begin, Aliyun, withdraw. Withdraw has begin's record.
			if want := []string{"aliyun", "aliyun", "load", "load", sends, sends, "swap", "swap", "swap"}; !slices.Equal(got[trace1], want) {
				t.Errorf("spans of two sends: got %q; want %q", got[trace1], want)
			}
			if want := []string{"load", valid, "swap"}; !slices.Equal(got[trace2], want) {
				t.Errorf("spans of a check: got %q; want %q", got[trace2], want)
			}
			for _, secret := range []string{code, strings.TrimPrefix(number, "186")} {
				if bytes.Contains(received.raw.Bytes(), []byte(secret)) {
					t.Errorf("the traces contain %s", secret)
				}
			}
			for _, want := range []string{
				"login-codes", "+86186****", "isv.BUSINESS_LIMIT_CONTROL", fake.Accepted()[0].BizID,
				fake.RequestIDs()[1],
			} {
				if !bytes.Contains(received.raw.Bytes(), []byte(want)) {
					t.Errorf("the traces lack %s", want)
				}
			}
			if log := r.Log.String(); strings.Count(log, "msg=call") != 3 || strings.Count(log, "trace_id="+trace1) < 2 ||
				!strings.Contains(log, "trace_id="+trace2) {
				t.Errorf("the log lacks the trace IDs of the calls:\n%s", log)
			}
		})
	}
}

func TestLog_HasTheCallersTraceIDWithoutExport(t *testing.T) {
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), nil)
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	r.Post(t, "Valid", `{"phone_number":"18600000000"}`, "traceparent", "00-"+trace+"-00f067aa0ba902b7-01")
	r.Post(t, "Valid", `{"phone_number":"18600000000"}`, "traceparent", "nonsense\ttrace_id=1")
	if log := r.Log.String(); strings.Count(log, "trace_id="+trace) < 1 || strings.Contains(log, "trace_id=1") ||
		strings.Contains(log, "nonsense") {
		t.Errorf("the log: want the trace ID of the first call, and nothing of the second:\n%s", log)
	}
}
