// Package server is the port: gRPC on grpc-go's own transport, JSON and gRPC-Web
// over HTTP/1.1, health, reflection, and the way down. errors.go alone makes
// gRPC statuses of the domain's errors.
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
	"google.golang.org/grpc/reflection"

	"github.com/liulinhuai/phone-number-service/internal/observe"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// streamWorkers are goroutines that take one call after the other, with a stack that
// has grown to what a call needs; more calls than these get a goroutine each.
const streamWorkers = 64

const (
	drainTimeout        = 10 * time.Second // at least, once connections are no longer accepted
	outcomeFlushTimeout = 5 * time.Second  // once the calls are finished
	readinessInterval   = time.Second
)

// Liveness is the health service that stays SERVING while the database is away.
const Liveness = "liveness"

// Config is what Serve needs.
type Config struct {
	Listener     net.Listener
	Verifier     *verify.Verifier
	Numbers      verify.NumberParser
	Ready        func(context.Context) error // whether the store answers
	DrainDelay   time.Duration               // between "not serving" and no longer accepting
	Inbox        *sms.Inbox                  // development only: what the page and /inbox.json show
	TLS          *Certificates               // nil for plaintext
	Authenticate authenticator               // who calls; nil asks nobody
	Origins      []string                    // of web pages that may call, "*" for any
	Reflection   bool
	Limits       Limits
	Version      string
	Telemetry    observe.Telemetry
	Metrics      net.Listener // for scrapes and probes, nil for none
}

// Serve serves until ctx ends. Then health says NOT_SERVING while connections are
// still accepted for DrainDelay, calls in flight finish, and what is known of
// their sends is stored. Calls that do not end in time are abandoned and are an error.
func Serve(ctx context.Context, c Config) error {
	streaming, endStreams := context.WithCancel(context.Background())
	defer endStreams()
	checked := &service{verifier: c.Verifier, numbers: c.Numbers, metrics: c.Telemetry.Metrics, allowEmptyTemplate: c.Inbox != nil}
	var svc pb.PhoneNumberServiceServer = checked
	var dev *devService
	if c.Inbox != nil {
		dev = &devService{service: checked, inbox: c.Inbox, version: c.Version, started: time.Now(), shutdown: streaming}
		svc = dev
	}
	around := callInterceptor(c.Telemetry, c.Authenticate)
	admitted := newAdmission(c.Limits, c.Authenticate, c.Telemetry)
	options := append(c.Limits.grpcOptions(),
		grpc.InTapHandle(admitted.tap),
		grpc.ChainUnaryInterceptor(admitted.unary, around),
		grpc.ChainStreamInterceptor(admitted.stream, cancelStreamsOnDrain(streaming)),
		grpc.Creds(completedHandshakeCreds{insecure.NewCredentials()}))
	grpcServer := grpc.NewServer(options...)
	pb.RegisterPhoneNumberServiceServer(grpcServer, svc)
	healthServer := health.NewServer()
	healthpb.RegisterHealthServer(grpcServer, healthServer)
	if c.Reflection {
		reflection.Register(grpcServer)
	}
	httpServer := newHTTPServer(svc, dev, around, admitted, c)

	grpcSide, httpSide := newChanListener(c.Listener.Addr()), newChanListener(c.Listener.Addr())
	door := &connMux{listener: c.Listener, tls: c.TLS, limits: c.Limits, rejected: c.Telemetry.Rejected, http2: newHTTP2Conns(c.Limits, c.Telemetry.Rejected), grpcListener: grpcSide, httpListener: httpSide}
	sweeping, stopSweeping := context.WithCancel(context.Background())
	defer stopSweeping()
	go door.http2.sweep(sweeping)
	failed := make(chan error, 3)
	go func() { failed <- grpcServer.Serve(grpcSide) }()
	go func() { failed <- httpServer.Serve(httpSide) }()
	go func() { failed <- door.serve() }()

	healthServer.SetServingStatus(Liveness, healthpb.HealthCheckResponse_SERVING)
	ready := &readiness{health: healthServer, metrics: c.Telemetry.Metrics}
	ready.set(healthpb.HealthCheckResponse_NOT_SERVING) // until the store has answered
	if c.Metrics != nil {
		scraped := newMetricsServer(c.Telemetry.Metrics, healthServer)
		go scraped.Serve(c.Metrics)
		defer scraped.Close() // last: it shows the way down
	}
	polling, stopPolling := context.WithCancel(ctx)
	defer stopPolling()
	go ready.watch(polling, c.Ready, c.Telemetry.Log)

	var failure error
	select {
	case <-ctx.Done():
		ready.drain()
		c.Telemetry.Log.Info("draining", "drain_delay", c.DrainDelay.String())
		time.Sleep(c.DrainDelay)
	case failure = <-failed:
		failure = fmt.Errorf("serving %s: %w", c.Listener.Addr(), failure)
	}
	c.Listener.Close()
	endStreams()
	stopCalls(grpcServer, httpServer, c.callsTimeout())
	storing, cancel := context.WithTimeout(context.WithoutCancel(ctx), outcomeFlushTimeout)
	defer cancel()
	abandoned := admitted.wait(storing)
	c.Verifier.Wait(storing)
	if abandoned > 0 {
		c.Telemetry.Log.Error("abandoned calls that did not end", "calls", abandoned)
		failure = errors.Join(failure, fmt.Errorf("abandoned %d calls that did not end within %v", abandoned, c.callsTimeout()+outcomeFlushTimeout))
	}
	c.Telemetry.Log.Info("stopped")
	return failure
}

// callsTimeout is how long calls in flight may take once connections are no longer accepted.
func (c Config) callsTimeout() time.Duration {
	return max(drainTimeout, c.Verifier.LongestSend()+time.Second)
}

// StopTimeout is the longest that Serve takes to return once its context has ended,
// whatever a handler, the store or the sender does.
func (c Config) StopTimeout() time.Duration {
	return c.DrainDelay + c.callsTimeout() + outcomeFlushTimeout
}

// cancelStreamsOnDrain ends streams with ctx. Only health watches last, and they would
// hold up the end of the process for as long as their clients like.
func cancelStreamsOnDrain(ctx context.Context) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		own, cancel := context.WithCancel(stream.Context())
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		return handler(srv, cancelableStream{stream, own})
	}
}

type cancelableStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s cancelableStream) Context() context.Context { return s.ctx }

// stopCalls lets calls in flight finish, and closes their connections after the timeout.
// It does not wait for grpc-go, because GracefulStop waits for handlers without a bound
// and Stop waits for connections.
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

// wait waits for calls whose connections were closed, until ctx ends. It returns how
// many calls are still in flight.
func (a *admission) wait(ctx context.Context) (inFlight int64) {
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		inFlight = a.calls.inUse.Load() + a.unauthenticated.inUse.Load()
		if inFlight == 0 || ctx.Err() != nil {
			return inFlight
		}
		select {
		case <-again.C:
		case <-ctx.Done():
		}
	}
}

// readiness is the health of "" and of the service, and the metric.
type readiness struct {
	health  *health.Server
	metrics *observe.Metrics

	mu       sync.Mutex
	draining bool
}

// watch keeps it equal to the store's, until ctx ends. That of Liveness stays SERVING:
// a database that is away is no reason to restart this process.
func (r *readiness) watch(ctx context.Context, ready func(context.Context) error, log *slog.Logger) {
	tick := time.NewTicker(readinessInterval)
	defer tick.Stop()
	last := healthpb.HealthCheckResponse_UNKNOWN
	for {
		probe, cancel := context.WithTimeout(ctx, 2*readinessInterval)
		_, err := recoverPanic(ctx, log, "readiness", func() (any, error) { return nil, ready(probe) })
		cancel()
		now := healthpb.HealthCheckResponse_SERVING
		if err != nil {
			now = healthpb.HealthCheckResponse_NOT_SERVING
		}
		if ctx.Err() == nil && now != last {
			r.set(now)
			if err != nil {
				log.Error("not serving: the database cannot be used", "error", err)
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

// drain sets NOT_SERVING for good, because a probe that hangs may still end with SERVING.
func (r *readiness) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
	r.publish(healthpb.HealthCheckResponse_NOT_SERVING)
}

func (r *readiness) set(s healthpb.HealthCheckResponse_ServingStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.draining {
		r.publish(s)
	}
}

func (r *readiness) publish(s healthpb.HealthCheckResponse_ServingStatus) {
	r.metrics.SetReady(s == healthpb.HealthCheckResponse_SERVING)
	r.health.SetServingStatus("", s)
	r.health.SetServingStatus(pb.PhoneNumberService_ServiceDesc.ServiceName, s)
}

// newMetricsServer serves what is for operators alone, apart from the port.
func newMetricsServer(m *observe.Metrics, h *health.Server) *http.Server {
	answer := func(service string) http.HandlerFunc {
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
	mux.Handle("GET /healthz", answer(Liveness))
	mux.Handle("GET /readyz", answer(""))
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: 2 * time.Second, ReadTimeout: 5 * time.Second,
		WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 8 << 10,
	}
}
