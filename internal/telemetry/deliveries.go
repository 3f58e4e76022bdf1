package telemetry

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Deliveries asks Aliyun what became of a share of the accepted SMS, and counts the answers. No call
// waits for it, and it stores nothing: a restart loses the SMS that it follows.
type Deliveries struct {
	ctx     context.Context
	ask     AskDeliveries
	share   float64
	limit   slidingWindow
	after   []time.Duration // the times of the questions after the send
	log     *slog.Logger
	total   *prometheus.CounterVec
	arrival *prometheus.HistogramVec
	codes   labelCap
}

// AskDeliveries is the method of *sms.Aliyun.
type AskDeliveries func(ctx context.Context, p sms.Product, n verify.Number, day time.Time, bizID string) ([]sms.Delivery, error)

const (
	samplesPerMinute = 60 // SMS that are followed
	askTimeout       = 5 * time.Second
)

// UnknownDelivery is the outcome of an SMS for which Aliyun gave no record. The other outcomes are the
// names of sms.DeliveryStatus.
const UnknownDelivery = "unknown"

// NewDeliveries returns Deliveries that follow a share of the SMS, from 0 to 1, until ctx is done.
func NewDeliveries(ctx context.Context, ask AskDeliveries, share float64, log *slog.Logger) *Deliveries {
	return &Deliveries{
		ctx: ctx, ask: ask, share: share, log: log,
		after: []time.Duration{15 * time.Second, time.Minute, 5 * time.Minute},
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "phonenumber_deliveries_total", Help: "Accepted SMS of the sample, by what Aliyun says became of them within five minutes.",
		}, []string{"outcome", "error_code", "country", "product"}),
		arrival: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "phonenumber_send_to_delivery_seconds", Help: "Time from a send to the delivery of its SMS, by Aliyun's clock, of the sample.",
			Buckets: []float64{2, 5, 10, 20, 30, 60, 120, 300},
		}, []string{"country", "product"}),
		codes: labelCap{max: 64, used: map[string]time.Time{}},
	}
}

// Collectors returns the metrics.
func (d *Deliveries) Collectors() []prometheus.Collector {
	return []prometheus.Collector{d.total, d.arrival}
}

// Accepted takes an accepted SMS into the sample, or not. It does not block.
func (d *Deliveries) Accepted(ctx context.Context, m verify.Message, r verify.Receipt) {
	if r.BizID == "" || rand.Float64() >= d.share || !d.limit.allow() { //nolint:gosec // no secret
		return
	}
	m.Code = ""
	go d.follow(WithCaller(d.ctx, CallerOf(ctx)), m, r.BizID, time.Now())
}

// slidingWindow allows samplesPerMinute events in any minute (sliding window log). A token bucket that
// keeps this bound allows only about half as many in the long run, or no bursts.
type slidingWindow struct {
	mu    sync.Mutex
	times [samplesPerMinute]time.Time // of the last events, a ring
	next  int                         // index of the oldest
}

func (w *slidingWindow) allow() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if now.Sub(w.times[w.next]) < time.Minute {
		return false
	}
	w.times[w.next] = now
	w.next = (w.next + 1) % len(w.times)
	return true
}

// follow asks up to three times, until the carrier has answered.
func (d *Deliveries) follow(ctx context.Context, m verify.Message, bizID string, sent time.Time) {
	product := sms.ProductOf(m.TemplateCode)
	var records []sms.Delivery
	var err error
	for _, after := range d.after {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Until(sent.Add(after))):
		}
		askCtx, cancel := context.WithTimeout(ctx, askTimeout)
		records, err = d.ask(askCtx, product, m.Number, sent, bizID)
		cancel()
		if ctx.Err() != nil {
			return
		}
		var e *sms.QueryError
		if errors.As(err, &e) && e.NoRight() || len(records) > 0 && records[0].Status != sms.Waiting {
			break
		}
	}
	outcome, errorCode := UnknownDelivery, ""
	var e *sms.QueryError
	switch {
	case errors.As(err, &e):
		errorCode = e.Code
		d.log.WarnContext(ctx, "failed to ask if an SMS was delivered", "product", string(product),
			"needs", sms.QueryRight(product), "error", e.Cause(), "request_id", e.RequestID)
	case len(records) > 0:
		outcome, errorCode = records[0].Status.String(), records[0].ErrorCode
	}
	country, label := numberplan.Country(m.Number), cmp.Or(errorCode, "none")
	if !sms.IsToken(label) {
		label = auth.Other
	}
	d.total.WithLabelValues(outcome, d.codes.value(label), country, string(product)).Inc()
	switch outcome {
	case sms.Delivered.String():
		if sent, received := records[0].SentAt, records[0].ReceivedAt; !sent.IsZero() && !received.Before(sent) { // a record can lack times
			d.arrival.WithLabelValues(country, string(product)).Observe(received.Sub(sent).Seconds())
		}
	case sms.Failed.String(), sms.Waiting.String():
		d.log.WarnContext(ctx, "SMS not delivered", "outcome", outcome, "error_code", cmp.Or(errorCode, "none"), "number", m.Number.Masked(),
			"country", country, "product", string(product), "sign_name", m.SignName, "template_code", m.TemplateCode, "biz_id", bizID)
	}
}
