package sms

import (
	"crypto/tls"
	"net"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
)

// A gatewayConn is a connection to the gateway, or to a proxy before it, which notes
// that bytes arrived.
type gatewayConn struct {
	net.Conn
	heard atomic.Bool
}

func (c *gatewayConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.heard.Store(true)
	}
	return n, err
}

// An exchange is one request and its reply, as net/http's hooks see them. net/http
// drops a kept connection on which bytes arrive unasked, but not if the next request
// takes that connection in the same moment: then the bytes would be its reply.
type exchange struct {
	conn    atomic.Pointer[gatewayConn]
	written atomic.Bool
	early   atomic.Bool // all that there is of a reply came before its request
}

func (x *exchange) hooks() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GotConn: func(got httptrace.GotConnInfo) {
			conn := got.Conn
			for secured, ok := conn.(*tls.Conn); ok; secured, ok = conn.(*tls.Conn) {
				conn = secured.NetConn()
			}
			x.conn.Store(conn.(*gatewayConn))
		},
		WroteHeaders: func() { // before the last of them leave
			x.conn.Load().heard.Store(false)
			x.written.Store(true)
		},
		GotFirstResponseByte: func() {
			if !x.written.Load() || !x.conn.Load().heard.Load() {
				x.early.Store(true)
			}
		},
	}
}

// recentIDs remembers at least the last keptIDs, and at most twice as many.
type recentIDs struct {
	mu          sync.Mutex
	now, before map[string]bool
}

const keptIDs = 1024

// again reports whether id was seen before, and remembers it. No id was never seen.
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
