package server

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/liulinhuai/phone-number-service/internal/connmux"
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

// withTimeout drops the cancel function: ctx must be canceled when the call ends, which also
// frees the timer.
func withTimeout(ctx context.Context, timeout time.Duration) context.Context {
	bounded, cancel := context.WithTimeout(ctx, timeout) //nolint:gosec // ctx ends it
	_ = cancel
	return bounded
}
