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
	timeToVerify  prometheus.Histogram
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
		aliyunCodes: labelCap{max: 64},
		callers:     labelCap{max: 255},
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "phonenumber_call_duration_seconds", Help: "Duration of calls over all protocols, by method, gRPC status and caller.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"method", "status", "caller"}),
		sends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "phonenumber_sends_total", Help: "SMS that Aliyun was asked for, by result.",
		}, []string{"result", "aliyun_code", "country", "caller"}),
		aliyun: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "phonenumber_aliyun_duration_seconds", Help: "Duration of a request to Aliyun, by result of the send.",
			Buckets: []float64{.01, .025, .05, .1, .2, .3, .5, 1, 2, 5, 10, 20},
		}, []string{"result"}),
		verifications: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "phonenumber_verifications_total", Help: "Results of Valid. Its caller learns only whether the outcome is match.",
		}, []string{"outcome", "country", "caller"}),
		timeToVerify: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "phonenumber_send_to_verification_seconds", Help: "Time from the start of a send to the Valid that matched.",
			Buckets: []float64{2, 5, 10, 20, 30, 60, 120, 300, 600},
		}),
		database: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "phonenumber_database_duration_seconds", Help: "Duration of a call's loads and swaps, waiting included.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5},
		}, []string{"operation", "result"}),
		ready: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "phonenumber_ready", Help: "1 while the service is ready, 0 while the database does not answer or the service drains.",
		}),
	}
	m.rejected = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "phonenumber_rejected_total", Help: "Calls and connections that were rejected before their message was read, by reason.",
	}, []string{"reason"})
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "phonenumber_build_info", Help: "1, with the version.",
		ConstLabels: prometheus.Labels{"version": version, "go_version": runtime.Version()},
	})
	build.Set(1)
	m.callers.forget = m.deleteCaller
	m.Register(m.calls, m.sends, m.aliyun, m.verifications, m.timeToVerify, m.database, m.ready, m.rejected, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Register adds metrics of other packages.
func (m *Metrics) Register(c ...prometheus.Collector) { m.registry.MustRegister(c...) }

// Handler returns the handler for scrapes.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// ObserveCall records the duration and the gRPC status of a call.
func (m *Metrics) ObserveCall(ctx context.Context, method, status string, duration time.Duration) {
	m.calls.WithLabelValues(method, status, m.caller(ctx)).Observe(duration.Seconds())
}

// ObserveCheck records the result of a Valid call.
func (m *Metrics) ObserveCheck(ctx context.Context, n verify.Number, found verify.Verification) {
	m.verifications.WithLabelValues(found.Result.String(), numberplan.Country(n), m.caller(ctx)).Inc()
	if found.Valid() {
		m.timeToVerify.Observe(found.After.Seconds())
	}
}

// SetReady sets the readiness metric.
func (m *Metrics) SetReady(ready bool) {
	m.ready.Set(0)
	if ready {
		m.ready.Set(1)
	}
}

func (m *Metrics) observeSend(ctx context.Context, n verify.Number, result, aliyunCode string, duration time.Duration) {
	m.sends.WithLabelValues(result, m.aliyunCodes.value(aliyunCode), numberplan.Country(n), m.caller(ctx)).Inc()
	m.aliyun.WithLabelValues(result).Observe(duration.Seconds())
}

// KeepCallers deletes the metrics of callers with other names, so that removed callers do not
// count towards the label cap.
func (m *Metrics) KeepCallers(names []string) {
	for _, name := range m.callers.keep(names) {
		m.deleteCaller(name)
	}
}

func (m *Metrics) deleteCaller(name string) {
	labels := prometheus.Labels{"caller": name}
	m.calls.DeletePartialMatch(labels)
	m.sends.DeletePartialMatch(labels)
	m.verifications.DeletePartialMatch(labels)
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
	forget func(value string) // deletes the series of a value; nil if values are never removed
	mu     sync.Mutex
	used   map[string]time.Time // when each value was last used
}

// labelIdleTime is the time after which an unused value can give its place to a new one.
const labelIdleTime = time.Hour

// value returns value, or auth.Other if there are too many distinct values.
func (b *labelCap) value(value string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used == nil {
		b.used = map[string]time.Time{}
	}
	now := time.Now()
	if _, known := b.used[value]; !known && len(b.used) >= b.max && !b.makeRoom(now) {
		return auth.Other
	}
	b.used[value] = now
	return value
}

// makeRoom removes a value that was unused for labelIdleTime, and reports whether there was one.
// The calling function must hold b.mu.
func (b *labelCap) makeRoom(now time.Time) bool {
	if b.forget == nil {
		return false
	}
	for value, last := range b.used {
		if now.Sub(last) >= labelIdleTime {
			delete(b.used, value)
			b.forget(value)
			return true
		}
	}
	return false
}

// keep removes all values except these, and returns the removed ones.
func (b *labelCap) keep(values []string) (removed []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for value := range b.used {
		if !slices.Contains(values, value) {
			delete(b.used, value)
			removed = append(removed, value)
		}
	}
	return removed
}
