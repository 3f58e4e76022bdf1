package server

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/liulinhuai/phone-number-service/internal/observe"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// Limits bound what peers may take of the process.
type Limits struct {
	Connections  int // open at once
	Streams      int // at once on one connection
	Calls        int // in flight, from their headers on; as many streams of health and reflection
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
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: l.PingInterval, PermitWithoutStream: true}),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.MaxConcurrentStreams(uint32(l.Streams)),
		grpc.MaxRecvMsgSize(l.MessageBytes),
		grpc.MaxHeaderListSize(uint32(l.HeaderBytes)),
		grpc.ConnectionTimeout(l.ConnectionTimeout),
		grpc.StaticStreamWindowSize(64 << 10), // a message is small: what is more is a bomb
		grpc.StaticConnWindowSize(64 << 10),
	}
}

// A gate admits so many at once.
type gate struct {
	most   int64
	inside atomic.Int64
}

func (g *gate) enter() bool {
	if g.inside.Add(1) <= g.most {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() { g.inside.Add(-1) }

// admission counts calls from their headers on: grpc-go calls interceptors when the
// message is there, and it may never come.
type admission struct {
	calls, others gate // others: watches of health, reflection, and calls of unknown callers
	who           identify
	timeout       time.Duration
	watch         observe.Steps
}

func newAdmission(l Limits, who identify, watch observe.Steps) *admission {
	return &admission{calls: gate{most: int64(l.Calls)}, others: gate{most: int64(l.Calls)}, who: who, timeout: l.CallTimeout, watch: watch}
}

type (
	begunKey   struct{} // of the function that says that a call's handler has begun
	refusedKey struct{}
)

const refusedWithin = 100 * time.Millisecond

// tap implements grpc.InTapHandle. A call is in flight until both its context and
// its handler have ended: a send goes on when its caller resets the stream.
func (a *admission) tap(ctx context.Context, call *tap.Info) (context.Context, error) {
	if call.FullMethodName == healthpb.Health_Check_FullMethodName { // or a full replica would be restarted
		return withTimeout(ctx, a.timeout), nil
	}
	g := &a.others
	if strings.HasPrefix(call.FullMethodName, "/"+pb.PhoneNumberService_ServiceDesc.ServiceName+"/") {
		g = a.gateOf(ctx)
	}
	if !g.enter() {
		a.watch.Refused("calls")
		if d, ok := ctx.Deadline(); ok && time.Until(d) > a.timeout {
			// grpc-go keeps the timer of a call that is refused here until it fires, and a
			// peer may ask for years. So this one is refused by unary, or ends at once.
			return context.WithValue(withTimeout(ctx, refusedWithin), refusedKey{}, true), nil
		}
		return nil, overloaded.status().Err()
	}
	if call.FullMethodName != healthpb.Health_Watch_FullMethodName { // which lasts as long as its client likes
		ctx = withTimeout(ctx, a.timeout)
	}
	from := arrivalOf(ctx)
	waits := context.AfterFunc(ctx, func() {
		g.leave()
		if cut := from.cut.Add(1); cut > mostCut && cut > from.begun.Load() {
			a.watch.Refused("resets")
			from.conn.Close()
		}
	})
	return context.WithValue(ctx, begunKey{}, handlerBegun(func() (ended func()) {
		if !waits() {
			return func() {} // the context has ended already
		}
		from.begun.Add(1)
		return g.leave
	})), nil
}

// mostCut is how many calls of a connection may end before their handlers begin, unless
// more begin. Whoever resets each call at once has no bound in Limits.Streams, and what
// is left of a call stays until grpc-go's writer comes to it.
const mostCut = 1000

// handlerBegins says that the handler of a call begins, and returns what is to be done
// when it has ended.
func handlerBegins(ctx context.Context) (ended func()) {
	if begun, ok := ctx.Value(begunKey{}).(handlerBegun); ok {
		return begun()
	}
	return func() {}
}

// arrivalOf is that of a call over either protocol.
func arrivalOf(ctx context.Context) *arrival {
	if p, ok := peer.FromContext(ctx); ok {
		if a, ok := p.AuthInfo.(*arrival); ok {
			return a
		}
	}
	return &arrival{}
}

// gateOf keeps whoever is no caller from taking the callers' places.
func (a *admission) gateOf(ctx context.Context) *gate {
	if _, err := a.who.of(ctx); err != nil {
		return &a.others
	}
	return &a.calls
}

type handlerBegun func() (ended func())

// unary is the interceptor that belongs to tap.
func (a *admission) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if ctx.Value(refusedKey{}) != nil {
		return nil, overloaded.status().Err()
	}
	defer handlerBegins(ctx)()
	return handler(ctx, req)
}

// withTimeout bounds ctx, which must end with the call: what the timeout takes ends
// with it.
func withTimeout(ctx context.Context, most time.Duration) context.Context {
	bounded, cancel := context.WithTimeout(ctx, most) //nolint:gosec // ctx ends it
	_ = cancel
	return bounded
}

// http is the same over HTTP/1.1.
func (a *admission) http(next http.Handler) http.Handler {
	refuse := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g := a.gateOf(r.Context())
		if !g.enter() {
			a.watch.Refused("calls")
			refuse.Write(w, r, connectError(overloaded.status())) //nolint:errcheck // the caller has gone
			return
		}
		defer g.leave()
		next.ServeHTTP(w, r.WithContext(withTimeout(r.Context(), a.timeout)))
	})
}
