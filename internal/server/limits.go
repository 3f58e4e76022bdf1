package server

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/liulinhuai/phone-number-service/internal/observe"
)

// Limits bound what peers may take of the process.
type Limits struct {
	Connections  int // open at once
	Streams      int // at once on one connection
	Calls        int // in flight; as many streams of health and reflection, and half as many that wait
	MessageBytes int
	HeaderBytes  int

	ConnectionTimeout  time.Duration // to begin talking, TLS included; and for headers over HTTP/1.1
	ReadTimeout        time.Duration // for a whole request over HTTP/1.1
	IdleTimeout        time.Duration // of a connection without a call
	ConnectionAge      time.Duration // then a client is asked to come anew, over gRPC 10 % sooner or later
	ConnectionAgeGrace time.Duration // for calls on a connection that is too old
	PingInterval       time.Duration // at least, between a peer's pings
	CallTimeout        time.Duration // for a call; one that asks for longer is cut
}

// DefaultLimits are those of the settings, with which a send can take 11 s.
var DefaultLimits = Limits{
	Connections: 2000, Streams: 128, Calls: 1000, MessageBytes: 4 << 10, HeaderBytes: 8 << 10,
	ConnectionTimeout: 2 * time.Second, ReadTimeout: 5 * time.Second, IdleTimeout: 5 * time.Minute,
	ConnectionAge: 10 * time.Minute, ConnectionAgeGrace: 15 * time.Second, PingInterval: 10 * time.Second, CallTimeout: 15 * time.Second,
}

func (l Limits) grpcOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time:              time.Minute, // finds peers that vanished
			MaxConnectionIdle: l.IdleTimeout, MaxConnectionAge: l.ConnectionAge, MaxConnectionAgeGrace: l.ConnectionAgeGrace,
		}),
		// Timers jitter: a client that pings at the interval must not be punished.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: l.PingInterval * 3 / 4, PermitWithoutStream: true}),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.MaxConcurrentStreams(uint32(l.Streams)),
		grpc.MaxRecvMsgSize(l.MessageBytes),
		grpc.MaxHeaderListSize(maxHeaderBytes), // the tap has the limit of a call
		grpc.ReadBufferSize(0),                 // see http2Conn
		grpc.ConnectionTimeout(l.ConnectionTimeout),
		grpc.StaticStreamWindowSize(64 << 10), // a message is small: what is more is a bomb
		grpc.StaticConnWindowSize(64 << 10),
	}
}

// A semaphore admits so many at once.
type semaphore struct {
	max   int64
	inUse atomic.Int64
}

func (g *semaphore) tryAcquire() bool {
	if g.inUse.Add(1) <= g.max {
		return true
	}
	g.release()
	return false
}

func (g *semaphore) release() { g.inUse.Add(-1) }

// admission implements admission control: it bounds the calls in flight. A call is in
// flight while its handler runs: a send goes on if its caller resets the stream. Calls whose
// message does not arrive, and replies that nobody reads, are bounded by http2Conns.
type admission struct {
	calls, unauthenticated semaphore // others: watches of health, reflection, and calls of unknown callers
	authenticate           authenticator
	limits                 Limits
	telemetry              observe.Telemetry
}

func newAdmission(l Limits, who authenticator, watch observe.Telemetry) *admission {
	return &admission{calls: semaphore{max: int64(l.Calls)}, unauthenticated: semaphore{max: int64(l.Calls)}, authenticate: who, limits: l, telemetry: watch}
}

type streamKey struct{}

// A stream is that of a call over gRPC.
type stream struct {
	conn     *http2Conn
	id       uint32
	rejected bool // for its headers
}

const rejectedTimeout = 100 * time.Millisecond

// run runs the handler of the call of ctx.
func run[T any](ctx context.Context, handler func() (T, error)) (res T, err error) {
	s := ctx.Value(streamKey{}).(stream)
	defer s.conn.run(s.id)()
	if s.rejected {
		return res, headersTooLarge.status().Err()
	}
	return handler()
}

// tap implements grpc.InTapHandle: it decides as soon as the headers of a call are there.
func (a *admission) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	conn := connInfoFrom(ctx).conn
	call := stream{conn: conn, id: conn.current.stream}
	if size := conn.current.bytes; size > a.limits.HeaderBytes {
		a.telemetry.Rejected("headers")
		conn.spend(size / rejectedBytesPerFrame)
		if _, ok := ctx.Deadline(); !ok {
			conn.earn()
			return nil, headersTooLarge.status().Err()
		}
		// grpc-go never stops the timer of a call that is rejected here. So the interceptors
		// reject it, or the call ends soon.
		call.rejected = true
		return context.WithValue(withTimeout(ctx, rejectedTimeout), streamKey{}, call), nil
	}
	if info.FullMethodName != healthpb.Health_Watch_FullMethodName { // which lasts as long as its client likes
		ctx = withTimeout(ctx, a.limits.CallTimeout)
	}
	return context.WithValue(ctx, streamKey{}, call), nil
}

// connInfoFrom is that of a call over either protocol.
func connInfoFrom(ctx context.Context) *connInfo {
	if p, ok := peer.FromContext(ctx); ok {
		if a, ok := p.AuthInfo.(*connInfo); ok {
			return a
		}
	}
	return &connInfo{}
}

// semaphoreOf keeps whoever is no caller from taking the callers' places.
func (a *admission) semaphoreOf(ctx context.Context) *semaphore {
	if _, err := a.authenticate.authenticate(ctx); err != nil {
		return &a.unauthenticated
	}
	return &a.calls
}

// unary implements grpc.UnaryServerInterceptor.
func (a *admission) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	return run(ctx, func() (any, error) {
		if info.FullMethod == healthpb.Health_Check_FullMethodName { // or a full replica would be restarted
			return handler(ctx, req)
		}
		return a.admit(ctx, req, info, handler)
	})
}

// admit implements grpc.UnaryServerInterceptor for a call over either protocol whose
// message is there.
func (a *admission) admit(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	g := a.semaphoreOf(ctx)
	if !g.tryAcquire() {
		a.telemetry.Rejected("calls")
		return nil, overloaded.status().Err()
	}
	defer g.release()
	return handler(ctx, req)
}

// stream implements grpc.StreamServerInterceptor.
func (a *admission) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	_, err := run(ss.Context(), func() (any, error) {
		if !a.unauthenticated.tryAcquire() {
			a.telemetry.Rejected("calls")
			return nil, overloaded.status().Err()
		}
		defer a.unauthenticated.release()
		return nil, handler(srv, ss)
	})
	return err
}

// withTimeout bounds ctx, which must end with the call: what the timeout takes ends
// with it.
func withTimeout(ctx context.Context, most time.Duration) context.Context {
	bounded, cancel := context.WithTimeout(ctx, most) //nolint:gosec // ctx ends it
	_ = cancel
	return bounded
}
