package server_test

import (
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/catest"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

// A certificate can hold the name that metrics and logs give to no caller at all, or to
// all beyond the ones they tell apart.
func TestMetrics_CertificateNamedUnknownHasItsOwnLabel(t *testing.T) {
	ca, clients := catest.New(t), catest.New(t)
	var metrics *telemetry.Metrics
	r, _ := startDev(t, func(c *server.Config) {
		c.TLS, _ = certificates(t, ca, clients)
		c.Authenticate, metrics = auth.AnyCertificate, c.Telemetry.Metrics
	})
	for _, name := range []string{auth.Unknown, auth.Other} {
		config := clients.Client(name)
		config.RootCAs = ca.Pool
		if _, err := secureClient(t, r, config).SendSMS(t.Context(), request(freshNumber())); err != nil {
			t.Fatalf("with a certificate named %s: %v", name, err)
		}
	}
	w := httptest.NewRecorder()
	metrics.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	scraped := w.Body.String()
	if got := strings.Count(scraped, `phonenumber_call_duration_seconds_count{caller="sha256:`); got != 2 {
		t.Errorf("got %d callers named by their certificate's hash; want 2", got)
	}
	for _, name := range []string{auth.Unknown, auth.Other} {
		if strings.Contains(scraped, `caller="`+name+`"`) || strings.Contains(r.log.String(), "caller="+name) {
			t.Errorf("a certificate is called %s", name)
		}
	}
}
