package server

import (
	"context"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/connmux"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

// admission implements admission control: it limits the size of headers, the duration of calls, and the
// number of calls in flight. A unary call, except a health check, holds a slot of a semaphore from the
// arrival of its complete message until its handler returns. A stream holds a slot from its start. A
// send keeps its slot if its caller resets the stream. For messages that do not arrive and replies that
// peers do not read, package connmux sets limits over HTTP/2, and net/http over HTTP/1.1.
type admission struct {
	calls chan struct{} // a semaphore
	// unauthenticated is a second semaphore, for health watches, reflection streams, and calls of unknown
	// callers, so that they cannot take the slots of known callers.
	unauthenticated chan struct{}
	limits          config.Limits
	stopping        context.Context // done when the listener is closed
	telemetry       telemetry.Telemetry
}

func newAdmission(stopping context.Context, l config.Limits, tel telemetry.Telemetry) *admission {
	return &admission{make(chan struct{}, l.Calls), make(chan struct{}, l.Calls), l, stopping, tel}
}

// completedHandshakeCreds makes grpc-go pass the connmux.HTTP2Conn of a call to the tap. Its
// ServerHandshake does no handshake, because package connmux has already done it.
type completedHandshakeCreds struct {
	credentials.TransportCredentials
}

func (completedHandshakeCreds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, c.(*connmux.HTTP2Conn), nil
}

func (h completedHandshakeCreds) Clone() credentials.TransportCredentials { return h }

// rejectedTimeout is the timeout of a call whose headers are too large, if the call has a deadline; see
// tap.
const rejectedTimeout = 100 * time.Millisecond

// tap implements grpc.InTapHandle: grpc-go calls it at the start of each stream, before the message
// arrives. It creates the call and stores it in the context, which grpc-go cancels when the call ends. It
// rejects calls whose headers are too large, and limits the duration of the others.
func (a *admission) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	p, _ := peer.FromContext(ctx)
	conn := p.AuthInfo.(*connmux.HTTP2Conn)
	c := &call{peer: conn.Peer, tls: conn.TLS, headers: info.Header, stream: conn.LastStream}
	timeout := a.limits.CallTimeout
	if c.stream.HeaderBytes > a.limits.HeaderBytes {
		a.telemetry.Rejected("headers")
		c.stream.ChargeHeaders()
		if _, ok := ctx.Deadline(); !ok {
			c.stream.Credit() // as Start does for other calls
			return nil, headersTooLarge.status().Err()
		}
		// If the tap rejects a call, grpc-go never stops the timer of its deadline, and a peer
		// can set a deadline of years. So the tap accepts the call with a short deadline, and the
		// interceptors of unary calls and streams reject it.
		c.headersTooLarge, timeout = true, rejectedTimeout
	}
	if info.FullMethodName == healthpb.Health_Watch_FullMethodName && !c.headersTooLarge { // it has no time limit
		ctx, c.cancel = context.WithCancel(ctx) //nolint:gosec // grpc-go cancels ctx
	} else {
		ctx, c.cancel = context.WithTimeout(ctx, timeout) //nolint:gosec // the same
	}
	return context.WithValue(ctx, callKey{}, c), nil
}

// admit is an interceptor. It takes a slot for the call, and rejects the call if no slot is free.
func (a *admission) admit(ctx context.Context, c *call, next handler) (any, error) {
	slots := a.calls
	if c.authErr != nil {
		slots = a.unauthenticated
	}
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
		return next(ctx, c)
	default:
		return nil, a.overloaded()
	}
}

// stream implements grpc.StreamServerInterceptor. It cancels the stream when a.stopping is done: health
// watches would otherwise delay the shutdown until their clients end them.
func (a *admission) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	c := callFrom(ss.Context())
	c.stream.Start()
	defer c.stream.End()
	if c.headersTooLarge {
		return headersTooLarge.status().Err()
	}
	select {
	case a.unauthenticated <- struct{}{}:
		defer func() { <-a.unauthenticated }()
	default:
		return a.overloaded()
	}
	defer context.AfterFunc(a.stopping, c.cancel)()
	return handler(srv, ss)
}

func (a *admission) overloaded() error {
	a.telemetry.Rejected("calls")
	return overloaded.status().Err()
}

// wait waits until no call is in flight or ctx is done. It returns the number of calls in flight.
func (a *admission) wait(ctx context.Context) (calls int) {
	for {
		calls = len(a.calls) + len(a.unauthenticated)
		if calls == 0 || ctx.Err() != nil {
			return calls
		}
		time.Sleep(10 * time.Millisecond)
	}
}
