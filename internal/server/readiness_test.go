package server

import (
	"context"
	"testing"

	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

// A probe that succeeds after the drain began does not set SERVING again.
func TestReadiness_ProbeCannotUndoTheDrain(t *testing.T) {
	r := &readiness{health: health.NewServer(), metrics: telemetry.NewMetrics("test")}
	ctx, drain := context.WithCancel(t.Context())
	defer drain()
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{
		healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING,
	} {
		r.set(ctx, healthpb.HealthCheckResponse_SERVING)
		res, err := r.health.Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if res.GetStatus() != want {
			t.Errorf("drain %v: got %v; want %v", ctx.Err() != nil, res.GetStatus(), want)
		}
		drain()
	}
}
