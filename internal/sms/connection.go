package sms

import (
	"crypto/tls"
	"net"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
)

// gatewayConn is a connection to the gateway or to a proxy. It records whether bytes arrived.
type gatewayConn struct {
	net.Conn
	received atomic.Bool
}

func (c *gatewayConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.received.Store(true)
	}
	return n, err
}

// exchange tracks one request and its reply with net/http's hooks, to detect response
// desynchronization. net/http drops an idle connection on which bytes arrive, but not if the
// next request takes the connection at that moment. Then the bytes would be its reply.
type exchange struct {
	conn    atomic.Pointer[gatewayConn]
	written atomic.Bool
	early   atomic.Bool // the reply arrived before the request was written
}

func (x *exchange) hooks() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GotConn: func(got httptrace.GotConnInfo) {
			conn := got.Conn
			for tlsConn, ok := conn.(*tls.Conn); ok; tlsConn, ok = conn.(*tls.Conn) {
				conn = tlsConn.NetConn()
			}
			x.conn.Store(conn.(*gatewayConn))
		},
		WroteHeaders: func() { // before the last bytes are written
			x.conn.Load().received.Store(false)
			x.written.Store(true)
		},
		GotFirstResponseByte: func() {
			if !x.written.Load() || !x.conn.Load().received.Load() {
				x.early.Store(true)
			}
		},
	}
}

// recentIDs stores at least the last keptIDs IDs, and at most twice as many.
type recentIDs struct {
	mu          sync.Mutex
	now, before map[string]bool
}

const keptIDs = 1024

// again reports whether id was seen before, and stores it. It is false for "".
func (r *recentIDs) again(id string) bool {
	if id == "" {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.now[id] || r.before[id] {
		return true
	}
	if r.now == nil || len(r.now) == keptIDs {
		r.now, r.before = map[string]bool{}, r.now
	}
	r.now[id] = true
	return false
}
