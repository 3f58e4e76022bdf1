// Package server serves all protocols of the service on one port. Over HTTP/2, with grpc-go's own
// transport, these are gRPC, health and reflection. Over HTTP/1.1 they are JSON, gRPC-Web, gRPC and the
// Connect protocol. The package also implements the graceful shutdown. Only errors.go converts errors,
// such as those of package verify, to gRPC statuses.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/connmux"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const (
	drainTimeout        = 10 * time.Second // minimum; see callsTimeout
	outcomeFlushTimeout = 5 * time.Second  // after the calls have finished
	readinessInterval   = time.Second
)

// Liveness is the name of the health service whose status stays SERVING if the database is
// unavailable.
const Liveness = "liveness"

// Config configures Serve.
type Config struct {
	Listener     net.Listener
	Verifier     *verify.Verifier
	Numbers      verify.NumberParser
	Ready        func(context.Context) error // returns nil if calls can be served
	DrainDelay   time.Duration               // from NOT_SERVING to the close of Listener
	TLS          *connmux.Certificates       // nil for plaintext
	Authenticate authenticator               // nil for no authentication
	Origins      []string                    // of web pages that may make calls; "*" needs AnyPage
	Reflection   bool
	Limits       config.Limits
	Version      string
	Telemetry    telemetry.Telemetry
	Metrics      net.Listener // serves metrics and probes; nil for none

	// Only internal/dev sets the following fields.

	OptionalTemplate bool // accept an empty sign name and template code
	AnyPage          bool // accept all origins; Origins only sets CORS headers
	DetailsForAll    bool // unknown callers that want details get them too
	WrapCalls        func(pb.PhoneNumberServiceServer) pb.PhoneNumberServiceServer
	WrapHTTP         func(stopping context.Context, next http.Handler) http.Handler // stopping is done when the listener is closed
}

// Serve serves until ctx is done, or until a server fails. If ctx is done, it reports NOT_SERVING, but
// accepts connections for DrainDelay. It then closes the listener, waits for the calls in flight, and
// stores the outcomes of their sends. It returns the error of a failed server. If calls do not end in
// time, it returns an error without waiting longer.
func Serve(ctx context.Context, c Config) error {
	stopping, stop := context.WithCancel(context.Background()) // done when the listener is closed
	defer stop()
	var svc pb.PhoneNumberServiceServer = &service{
		verifier: c.Verifier, numbers: c.Numbers, metrics: c.Telemetry.Metrics, optionalTemplate: c.OptionalTemplate,
		detailsForAll: c.DetailsForAll,
	}
	if c.WrapCalls != nil {
		svc = c.WrapCalls(svc)
	}
	admission := newAdmission(stopping, c.Limits, c.Telemetry)
	chains := newChains(admission, c.Authenticate, c.Telemetry)
	options := append(grpcOptions(c.Limits),
		grpc.InTapHandle(admission.tap),
		grpc.UnaryInterceptor(chains.unary),
		grpc.StreamInterceptor(admission.stream),
		grpc.Creds(completedHandshakeCreds{insecure.NewCredentials()}))
	grpcServer := grpc.NewServer(options...)
	pb.RegisterPhoneNumberServiceServer(grpcServer, svc)
	healthServer := health.NewServer()
	healthpb.RegisterHealthServer(grpcServer, healthServer)
	if c.Reflection {
		reflection.Register(grpcServer)
	}
	httpServer := newHTTPServer(svc, chains.calls, c)
	if c.WrapHTTP != nil {
		httpServer.Handler = c.WrapHTTP(stopping, httpServer.Handler)
	}

	mux := connmux.New(connmux.Config{
		Listener: c.Listener, TLS: c.TLS, Connections: c.Limits.Connections, Timeout: c.Limits.ConnectionTimeout,
		RequestTimeout: c.Limits.CallTimeout, WaitingStreams: c.Limits.Calls / 2, Rejected: c.Telemetry.Rejected,
	})
	sweepCtx, stopSweeping := context.WithCancel(context.Background())
	defer stopSweeping()
	go mux.Sweep(sweepCtx)
	failed := make(chan error, 3)
	go func() { failed <- grpcServer.Serve(mux.HTTP2) }()
	go func() { failed <- httpServer.Serve(mux.HTTP1) }()
	go func() { failed <- mux.Serve() }()

	healthServer.SetServingStatus(Liveness, healthpb.HealthCheckResponse_SERVING)
	ready := &readiness{health: healthServer, metrics: c.Telemetry.Metrics}
	ready.set(ctx, healthpb.HealthCheckResponse_NOT_SERVING) // until the first probe succeeds
	if c.Metrics != nil {
		metricsServer := newMetricsServer(c.Telemetry.Metrics, healthServer)
		go metricsServer.Serve(c.Metrics)
		defer metricsServer.Close() // last: it shows metrics of the shutdown
	}
	pollCtx, stopPolling := context.WithCancel(ctx)
	defer stopPolling()
	go ready.watch(pollCtx, c.Ready, c.Telemetry.Log)

	var failure error
	select {
	case <-ctx.Done():
		ready.set(ctx, healthpb.HealthCheckResponse_NOT_SERVING)
		c.Telemetry.Log.Info("draining", "drain_delay", c.DrainDelay.String())
		c.Verifier.Drain()
		time.Sleep(c.DrainDelay)
	case failure = <-failed:
		failure = fmt.Errorf("serving %s: %w", c.Listener.Addr(), failure)
	}
	c.Listener.Close()
	stop()
	stopCalls(grpcServer, httpServer, c.callsTimeout())
	flushCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), outcomeFlushTimeout)
	defer cancel()
	abandoned := admission.wait(flushCtx)
	c.Verifier.Wait(flushCtx)
	if abandoned > 0 {
		c.Telemetry.Log.Error("abandoned calls that did not end", "calls", abandoned)
		failure = errors.Join(failure, fmt.Errorf("abandoned %d calls that did not end within %v", abandoned,
			c.callsTimeout()+outcomeFlushTimeout))
	}
	c.Telemetry.Log.Info("stopped")
	return failure
}

func grpcOptions(l config.Limits) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time:              time.Minute, // detects dead peers
			MaxConnectionIdle: l.IdleTimeout, MaxConnectionAge: l.ConnectionAge, MaxConnectionAgeGrace: l.ConnectionAgeGrace,
		}),
		// Timers are inexact. So allow pings slightly earlier than PingInterval.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: l.PingInterval * 3 / 4, PermitWithoutStream: true}),
		// The stacks of these goroutines need not grow for each call. If all are busy, grpc-go starts more.
		grpc.NumStreamWorkers(64),
		grpc.MaxConcurrentStreams(uint32(l.Streams)),
		grpc.MaxRecvMsgSize(l.MessageBytes),
		grpc.MaxHeaderListSize(connmux.MaxHeaderBytes), // the tap enforces Limits.HeaderBytes
		grpc.ReadBufferSize(0),                         // see connmux.HTTP2Conn
		grpc.ConnectionTimeout(l.ConnectionTimeout),
		grpc.StaticStreamWindowSize(64 << 10), // messages are small
		grpc.StaticConnWindowSize(64 << 10),
	}
}

// callsTimeout returns the time that calls in flight have after the listener is closed: at least
// drainTimeout, and long enough for the longest send.
func (c Config) callsTimeout() time.Duration {
	return max(drainTimeout, verify.LongestSend(c.Verifier.SMSTimeout)+time.Second)
}

// StopTimeout returns the maximum time from the end of Serve's context until Serve returns, even if a
// handler, the store or the sender hangs.
func (c Config) StopTimeout() time.Duration {
	return c.DrainDelay + c.callsTimeout() + outcomeFlushTimeout
}

// stopCalls waits until the calls in flight end, at most for timeout, and then closes the connections.
// After the timeout it does not wait for grpc-go, because GracefulStop waits for handlers without a
// time limit, and Stop waits for connections.
func stopCalls(grpcServer *grpc.Server, httpServer *http.Server, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	go func() {
		defer cancel()
		var stopping sync.WaitGroup
		stopping.Go(func() {
			if httpServer.Shutdown(ctx) != nil {
				httpServer.Close()
			}
		})
		grpcServer.GracefulStop()
		stopping.Wait()
	}()
	<-ctx.Done()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		go grpcServer.Stop()
	}
}

// readiness sets the health status of the services "" and PhoneNumberService, and the metric.
type readiness struct {
	health  *health.Server
	metrics *telemetry.Metrics
	mu      sync.Mutex
}

// watch calls ready each second until ctx is done, and sets the status to its result. It does not change
// Liveness, because a restart does not help if the database is unavailable.
func (r *readiness) watch(ctx context.Context, ready func(context.Context) error, log *slog.Logger) {
	tick := time.NewTicker(readinessInterval)
	defer tick.Stop()
	last := healthpb.HealthCheckResponse_UNKNOWN
	for {
		probe, cancel := context.WithTimeout(ctx, 2*readinessInterval)
		err := func() (err error) {
			defer recoverPanic(ctx, log, "readiness", &err)
			return ready(probe)
		}()
		cancel()
		now := healthpb.HealthCheckResponse_SERVING
		if err != nil {
			now = healthpb.HealthCheckResponse_NOT_SERVING
		}
		if ctx.Err() == nil && now != last {
			r.set(ctx, now)
			if err != nil {
				log.Error("not serving", "error", err)
			} else {
				log.Info("serving")
			}
			last = now
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// set sets the status. If ctx is done, it sets NOT_SERVING instead, because a probe that runs when the
// drain starts can succeed later.
func (r *readiness) set(ctx context.Context, status healthpb.HealthCheckResponse_ServingStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ctx.Err() != nil {
		status = healthpb.HealthCheckResponse_NOT_SERVING
	}
	r.metrics.SetReady(status == healthpb.HealthCheckResponse_SERVING)
	r.health.SetServingStatus("", status)
	r.health.SetServingStatus(pb.PhoneNumberService_ServiceDesc.ServiceName, status)
}

// newMetricsServer returns the server for metrics and probes, which has a separate address for
// operators.
func newMetricsServer(m *telemetry.Metrics, h *health.Server) *http.Server {
	statusOf := func(service string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			res, err := h.Check(r.Context(), &healthpb.HealthCheckRequest{Service: service})
			if err != nil || res.Status != healthpb.HealthCheckResponse_SERVING {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			fmt.Fprintln(w, res.GetStatus())
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.Handler())
	mux.Handle("GET /healthz", statusOf(Liveness))
	mux.Handle("GET /readyz", statusOf(""))
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: 2 * time.Second, ReadTimeout: 5 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 8 << 10,
	}
}
