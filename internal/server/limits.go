package server

import (
	"context"
	"crypto/tls"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/liulinhuai/phone-number-service/internal/connmux"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

// Limits bound the resources that peers can use.
type Limits struct {
	Connections int // open at once
	Streams     int // at once on one connection
	// Calls bounds the calls in flight. As many health watches and reflection streams may be
	// open, and half as many streams may wait for their peer.
	Calls        int
	MessageBytes int
	HeaderBytes  int

	ConnectionTimeout  time.Duration // for TLS, first bytes and HTTP/1.1 headers
	ReadTimeout        time.Duration // for a whole request over HTTP/1.1
	IdleTimeout        time.Duration // of a connection without a call
	ConnectionAge      time.Duration // then clients must reconnect; varies by 10 %
	ConnectionAgeGrace time.Duration // for calls on a connection past ConnectionAge
	PingInterval       time.Duration // minimum time between a peer's pings
	CallTimeout        time.Duration // longer deadlines are shortened to it
}

// DefaultLimits are the defaults of the settings. They allow a send to take 11 s.
var DefaultLimits = Limits{
	Connections: 2000, Streams: 128, Calls: 1000, MessageBytes: 4 << 10, HeaderBytes: 8 << 10,
	ConnectionTimeout: 2 * time.Second, ReadTimeout: 5 * time.Second, IdleTimeout: 5 * time.Minute,
	ConnectionAge: 10 * time.Minute, ConnectionAgeGrace: 15 * time.Second, PingInterval: 10 * time.Second, CallTimeout: 15 * time.Second,
}

func (l Limits) grpcOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time:              time.Minute, // detects dead peers
			MaxConnectionIdle: l.IdleTimeout, MaxConnectionAge: l.ConnectionAge, MaxConnectionAgeGrace: l.ConnectionAgeGrace,
		}),
		// Timers jitter: do not disconnect a client that pings exactly at the interval.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: l.PingInterval * 3 / 4, PermitWithoutStream: true}),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.MaxConcurrentStreams(uint32(l.Streams)),
		grpc.MaxRecvMsgSize(l.MessageBytes),
		grpc.MaxHeaderListSize(connmux.MaxHeaderBytes), // the tap enforces Limits.HeaderBytes
		grpc.ReadBufferSize(0),                         // see connmux.HTTP2Conn
		grpc.ConnectionTimeout(l.ConnectionTimeout),
		grpc.StaticStreamWindowSize(64 << 10), // messages are small
		grpc.StaticConnWindowSize(64 << 10),
	}
}

// semaphore is a counting semaphore for max holders. It never blocks.
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

// admission implements admission control: it bounds the calls in flight. A call is in flight
// while its handler runs: a send continues after its caller resets the stream. connmux bounds
// the calls whose message does not arrive and the replies that peers do not read.
type admission struct {
	calls semaphore
	// unauthenticated counts health watches, reflection, and calls of unknown callers.
	unauthenticated semaphore
	authenticate    authenticator
	limits          Limits
	telemetry       telemetry.Telemetry
}

func newAdmission(l Limits, authenticate authenticator, tel telemetry.Telemetry) *admission {
	return &admission{
		calls: semaphore{max: int64(l.Calls)}, unauthenticated: semaphore{max: int64(l.Calls)}, authenticate: authenticate,
		limits: l, telemetry: tel,
	}
}

type streamKey struct{}

// stream is the HTTP/2 stream of a gRPC call.
type stream struct {
	connmux.Stream
	rejected bool // its headers are too large
}

const rejectedTimeout = 100 * time.Millisecond

// run runs the handler of the gRPC call of ctx, and records its start and end in the connection.
func run[T any](ctx context.Context, handler func() (T, error)) (res T, err error) {
	s := ctx.Value(streamKey{}).(stream)
	s.Start()
	defer s.End()
	if s.rejected {
		return res, headersTooLarge.status().Err()
	}
	return handler()
}

// tap implements grpc.InTapHandle. It rejects calls with too large headers, and bounds the
// time of the others, before their message arrives.
func (a *admission) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	call := stream{Stream: connInfoFrom(ctx).conn.LastStream()}
	if call.HeaderBytes > a.limits.HeaderBytes {
		a.telemetry.Rejected("headers")
		call.ChargeHeaders()
		if _, ok := ctx.Deadline(); !ok {
			call.Earn()
			return nil, headersTooLarge.status().Err()
		}
		// grpc-go never stops the timer of a call that the tap rejects, and a peer may ask for
		// a deadline in years. So let the call through with a short deadline; run rejects it.
		call.rejected = true
		return context.WithValue(withTimeout(ctx, rejectedTimeout), streamKey{}, call), nil
	}
	if info.FullMethodName != healthpb.Health_Watch_FullMethodName { // it has no time limit
		ctx = withTimeout(ctx, a.limits.CallTimeout)
	}
	return context.WithValue(ctx, streamKey{}, call), nil
}

// connInfo describes the connection of a call.
type connInfo struct {
	tls  *tls.ConnectionState // nil for plaintext
	conn *connmux.HTTP2Conn   // nil over HTTP/1.1
}

// AuthType implements credentials.AuthInfo.
func (*connInfo) AuthType() string { return "connInfo" }

// completedHandshakeCreds passes the connInfo of a connection to grpc-go. connmux has done
// the handshake already.
type completedHandshakeCreds struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (completedHandshakeCreds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn := c.(*connmux.HTTP2Conn)
	return c, &connInfo{conn.TLS, conn}, nil
}

// Clone implements credentials.TransportCredentials.
func (h completedHandshakeCreds) Clone() credentials.TransportCredentials { return h }

// connInfoFrom returns the connInfo of a call over either protocol.
func connInfoFrom(ctx context.Context) *connInfo {
	if p, ok := peer.FromContext(ctx); ok {
		if a, ok := p.AuthInfo.(*connInfo); ok {
			return a
		}
	}
	return &connInfo{}
}

// semaphoreOf returns the semaphore that bounds the call of ctx. Unauthenticated calls have
// their own, so that they cannot use up the callers' limit.
func (a *admission) semaphoreOf(ctx context.Context) *semaphore {
	if _, err := a.authenticate.caller(ctx); err != nil {
		return &a.unauthenticated
	}
	return &a.calls
}

// unary implements grpc.UnaryServerInterceptor.
func (a *admission) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	return run(ctx, func() (any, error) {
		if info.FullMethod == healthpb.Health_Check_FullMethodName { // or probes would restart an overloaded replica
			return handler(ctx, req)
		}
		return a.admit(ctx, req, info, handler)
	})
}

// admit implements grpc.UnaryServerInterceptor for calls over both protocols. It runs when
// the message of the call has arrived.
func (a *admission) admit(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	return a.hold(a.semaphoreOf(ctx), func() (any, error) { return handler(ctx, req) })
}

// stream implements grpc.StreamServerInterceptor.
func (a *admission) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	_, err := run(ss.Context(), func() (any, error) {
		return a.hold(&a.unauthenticated, func() (any, error) { return nil, handler(srv, ss) })
	})
	return err
}

// hold runs a handler while it holds a place of s, or rejects the call.
func (a *admission) hold(s *semaphore, handler func() (any, error)) (any, error) {
	if !s.tryAcquire() {
		a.telemetry.Rejected("calls")
		return nil, overloaded.status().Err()
	}
	defer s.release()
	return handler()
}

// withTimeout drops the cancel function: ctx must be canceled when the call ends, which also
// frees the timer.
func withTimeout(ctx context.Context, timeout time.Duration) context.Context {
	bounded, cancel := context.WithTimeout(ctx, timeout) //nolint:gosec // ctx ends it
	_ = cancel
	return bounded
}
