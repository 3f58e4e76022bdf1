package ramrole

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/sms"
)

const (
	fetchTimeout = 10 * time.Second
	minWait      = time.Second
	maxWait      = time.Hour // also if a reply has a wrong time
	maxRetryWait = time.Minute
)

// A Renewer fetches credentials before a part of their lifetime is over. Only the goroutine of Run
// fetches: no send waits for it.
type Renewer struct {
	source  Source
	use     func(sms.Credentials) error
	log     *slog.Logger
	expired chan sms.Credentials // rejected by Aliyun
	expiry  *prometheus.GaugeVec
}

// NewRenewer returns a Renewer that calls use with each new set.
func NewRenewer(source Source, use func(sms.Credentials) error, log *slog.Logger) *Renewer {
	return &Renewer{
		source: source, use: use, log: log, expired: make(chan sms.Credentials, 1),
		expiry: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "phonenumber_aliyun_credentials_expiry_timestamp_seconds", Help: "When the temporary credentials for Aliyun end.",
		}, nil),
	}
}

// Collectors returns the metrics.
func (r *Renewer) Collectors() []prometheus.Collector { return []prometheus.Collector{r.expiry} }

// Expired makes Run renew credentials at once because Aliyun rejected them as expired. Run does this
// once for each set, and then tries as after any failure until the source has another set. Expired
// does not block.
func (r *Renewer) Expired(c sms.Credentials) {
	select {
	case r.expired <- c:
	default: // another rejection is waiting
	}
}

// Run fetches and renews credentials until ctx is done. If a renewal fails, the previous set stays in
// use.
func (r *Renewer) Run(ctx context.Context) {
	var current Set
	var rejected sms.Credentials // the last set that Aliyun rejected
	failures := 0
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case c := <-r.expired:
			if c != current.Credentials || c == rejected {
				continue
			}
			rejected = c
		case <-next.C:
		}
		set, err := r.fetch(ctx, rejected)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			failures++
			next.Reset(min(minWait<<min(failures-1, 10), maxRetryWait))
			attrs := []any{"provider", r.source.Provider(), "error", err}
			if !current.Expires.IsZero() {
				attrs = append(attrs, "expires", current.Expires.Format(time.RFC3339))
			}
			r.log.WarnContext(ctx, "failed to fetch Aliyun credentials", attrs...)
			continue
		}
		failures = 0
		// A quarter of the lifetime leaves the most time for an outage, and costs four requests in it.
		next.Reset(min(max(set.Lifetime/4, minWait), maxWait))
		r.expiry.WithLabelValues().Set(float64(set.Expires.Unix()))
		if set.Credentials == current.Credentials {
			continue // the metadata service returns one set until it has a new one
		}
		current = set
		r.log.InfoContext(ctx, "fetched Aliyun credentials", "provider", r.source.Provider(), "expires", set.Expires.Format(time.RFC3339))
	}
}

var errRejected = errors.New("got the credentials that Aliyun rejected as expired")

// fetch fetches a set and puts it into use, unless it is the rejected one.
func (r *Renewer) fetch(ctx context.Context, rejected sms.Credentials) (Set, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	set, err := r.source.Fetch(ctx)
	if err != nil {
		return Set{}, err
	}
	if set.Credentials == rejected {
		return Set{}, errRejected
	}
	return set, r.use(set.Credentials)
}
