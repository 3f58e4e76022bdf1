// Package telemetry implements metrics, tracing and logging: spans and debug lines for the
// steps of a call, and log sampling. No label, span or line contains a code or a whole phone
// number.
package telemetry

import (
	"context"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Metrics are the metrics of the process, except those that internal/store and internal/sms
// define; docs/monitoring.md lists all.
type Metrics struct {
	registry      *prometheus.Registry
	calls         *prometheus.HistogramVec
	sends         *prometheus.CounterVec
	aliyun        *prometheus.HistogramVec
	verifications *prometheus.CounterVec
	idempotency   *prometheus.CounterVec
	timeToVerify  prometheus.Observer
	database      *prometheus.HistogramVec
	ready         prometheus.Gauge
	rejected      *prometheus.CounterVec
	aliyunCodes   labelCap
	callers       labelCap
}

// NewMetrics returns metrics with their own registry, which includes those of the Go runtime
// and of the process.
func NewMetrics(version string) *Metrics {
	m := &Metrics{
		registry:    prometheus.NewRegistry(),
		aliyunCodes: labelCap{max: 64, used: map[string]time.Time{}},
		callers:     labelCap{max: 255, used: map[string]time.Time{}},
	}
	m.callers.forget = m.deleteCaller
	m.Register(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registered := promauto.With(m.registry)
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return registered.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return registered.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	}
	m.calls = histogram("phonenumber_call_duration_seconds", "Duration of calls over all protocols, by method, gRPC status and caller.",
		[]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}, "method", "status", "caller")
	m.sends = counter("phonenumber_sends_total", "SMS that Aliyun was asked for, by product and result.",
		"product", "result", "aliyun_code", "country", "caller")
	m.aliyun = histogram("phonenumber_aliyun_duration_seconds", "Duration of a request to Aliyun, by product and result of the send.",
		[]float64{.01, .025, .05, .1, .2, .3, .5, 1, 2, 5, 10, 20}, "product", "result")
	m.verifications = counter("phonenumber_verifications_total", "Results of Valid. Its caller learns only whether the outcome is match.",
		"outcome", "country", "caller")
	m.idempotency = counter("phonenumber_idempotent_sends_total", "Calls of SendSMS with an idempotency key, by result.", "result", "caller")
	m.timeToVerify = histogram("phonenumber_send_to_verification_seconds", "Time from the start of a send to the Valid that matched.",
		[]float64{2, 5, 10, 20, 30, 60, 120, 300, 600}).WithLabelValues()
	m.database = histogram("phonenumber_database_duration_seconds", "Duration of a call's loads and swaps, waiting included.",
		[]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5}, "operation", "result")
	m.rejected = counter("phonenumber_rejected_total", "Calls and connections that were rejected before their message was read, by reason.", "reason")
	m.ready = registered.NewGauge(prometheus.GaugeOpts{
		Name: "phonenumber_ready", Help: "1 while the service is ready, 0 while the database does not answer or the service drains.",
	})
	registered.NewGauge(prometheus.GaugeOpts{
		Name: "phonenumber_build_info", Help: "1, with the version.",
		ConstLabels: prometheus.Labels{"version": version, "go_version": runtime.Version()},
	}).Set(1)
	return m
}

// Register adds metrics of other packages.
func (m *Metrics) Register(c ...prometheus.Collector) { m.registry.MustRegister(c...) }

// Handler returns the handler for scrapes.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// ObserveCheck records the result of a Valid call.
func (m *Metrics) ObserveCheck(ctx context.Context, n verify.Number, found verify.Verification) {
	m.verifications.WithLabelValues(found.Result.String(), numberplan.Country(n), m.caller(ctx)).Inc()
	if found.Valid() {
		m.timeToVerify.Observe(found.After.Seconds())
	}
}

// ObserveIdempotency records the result of a SendSMS call with an idempotency key.
func (m *Metrics) ObserveIdempotency(ctx context.Context, result string) {
	m.idempotency.WithLabelValues(result, m.caller(ctx)).Inc()
}

// SetReady sets the readiness metric.
func (m *Metrics) SetReady(ready bool) {
	m.ready.Set(0)
	if ready {
		m.ready.Set(1)
	}
}

// KeepCallers deletes the metrics of callers with other names, so that removed callers do not
// count towards the label cap.
func (m *Metrics) KeepCallers(names []string) {
	m.callers.mu.Lock()
	defer m.callers.mu.Unlock()
	for name := range m.callers.used {
		if !slices.Contains(names, name) {
			m.deleteCaller(name)
		}
	}
}

// deleteCaller deletes the metrics of a caller. m.callers.mu must be locked.
func (m *Metrics) deleteCaller(name string) {
	delete(m.callers.used, name)
	for _, metric := range []*prometheus.MetricVec{
		m.calls.MetricVec, m.sends.MetricVec, m.verifications.MetricVec, m.idempotency.MetricVec,
	} {
		metric.DeletePartialMatch(prometheus.Labels{"caller": name})
	}
}

// caller returns the value of the label caller, "" without authentication.
func (m *Metrics) caller(ctx context.Context) string {
	name := CallerOf(ctx)
	if name == "" || name == auth.Unknown {
		return name
	}
	return m.callers.value(name)
}

// labelCap limits the number of distinct label values. Aliyun codes and certificate names come
// from outside and could otherwise grow without bound.
type labelCap struct {
	max    int
	forget func(value string) // deletes a value and its metrics; nil if values are never deleted
	mu     sync.Mutex
	used   map[string]time.Time // when each value was last used
}

// labelIdleTime is the time after which an unused value can give its place to a new one.
const labelIdleTime = time.Hour

// value returns value, or auth.Other if there are too many distinct values.
func (l *labelCap) value(value string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if _, known := l.used[value]; !known && len(l.used) >= l.max {
		for old, last := range l.used {
			if l.forget != nil && now.Sub(last) >= labelIdleTime {
				l.forget(old)
				break
			}
		}
		if len(l.used) >= l.max {
			return auth.Other
		}
	}
	l.used[value] = now
	return value
}
