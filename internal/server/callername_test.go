package server_test

import (
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
)

// A certificate can contain a name that metrics and logs reserve: auth.Unknown, for a call
// without a credential, or auth.Other, for callers over the label limit.
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
		if _, err := secureClient(t, r, config).SendSMS(t.Context(), servertest.SendRequest(servertest.FreshNumber())); err != nil {
			t.Fatalf("a certificate named %s: got %v; want OK", name, err)
		}
	}
	w := httptest.NewRecorder()
	metrics.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body := w.Body.String()
	if got := strings.Count(body, `phonenumber_call_duration_seconds_count{caller="sha256:`); got != 2 {
		t.Errorf("callers named by the hash of their certificate: got %d; want 2", got)
	}
	for _, name := range []string{auth.Unknown, auth.Other} {
		if strings.Contains(body, `caller="`+name+`"`) || r.Log.Contains("caller="+name) {
			t.Errorf("metrics or log: got a caller named %s; want its hash", name)
		}
	}
}
