package server

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/liulinhuai/phone-number-service/internal/connmux"
)

// Limits limit the resources that peers can use.
type Limits struct {
	Connections int // maximum of open connections
	Streams     int // maximum of HTTP/2 streams of a connection
	// Calls is the maximum number of calls in flight. A second limit of the same size applies to
	// health watches, reflection streams, and calls of unknown callers together. Half of this
	// number is connmux.Config.WaitingStreams.
	Calls        int
	MessageBytes int
	HeaderBytes  int

	ConnectionTimeout  time.Duration // for TLS, first bytes and HTTP/1.1 headers
	ReadTimeout        time.Duration // for a whole request over HTTP/1.1
	IdleTimeout        time.Duration // of a connection without a call
	ConnectionAge      time.Duration // then clients must reconnect; gRPC: ±10 %
	ConnectionAgeGrace time.Duration // for calls in flight after ConnectionAge
	PingInterval       time.Duration // minimum between a peer's HTTP/2 pings
	CallTimeout        time.Duration // maximum of a caller's deadline
}

// DefaultLimits are the defaults of the settings. With the other defaults, the longest send takes 11 s,
// which is less than CallTimeout.
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
		// Timers are inexact. So allow pings slightly earlier than PingInterval.
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

// withTimeout is context.WithTimeout without the cancel function. ctx must be canceled when the call
// ends, which also frees the timer.
func withTimeout(ctx context.Context, timeout time.Duration) context.Context {
	bounded, cancel := context.WithTimeout(ctx, timeout) //nolint:gosec // ctx ends it
	_ = cancel
	return bounded
}
