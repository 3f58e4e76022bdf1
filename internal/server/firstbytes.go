package server

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A door accepts connections, where there is TLS shakes hands, and hands each to one
// of two servers: those that begin with HTTP/2's preface to grpcSide, all others to
// httpSide. This keeps grpc-go on its own transport, which costs a third of what it
// costs behind net/http.
type door struct {
	listener           net.Listener
	tls                *Certificates // nil for plaintext
	limits             Limits
	refused            func(reason string)
	http2              *http2Conns
	grpcSide, httpSide *side

	open atomic.Int64
}

// serve returns when listener is closed.
func (d *door) serve() error {
	var wait time.Duration
	for {
		conn, err := d.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // such as too many open files: it passes
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			time.Sleep(wait)
			continue
		}
		wait = 0
		if d.open.Add(1) > int64(d.limits.Connections) {
			d.open.Add(-1)
			d.refused("connections")
			conn.Close()
			continue
		}
		go d.welcome(&counted{Conn: conn, closed: sync.OnceFunc(func() { d.open.Add(-1) })})
	}
}

func (d *door) welcome(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(d.limits.ConnectionTimeout))
	var secure *tls.Conn
	if d.tls != nil {
		var err error
		if secure, err = d.tls.handshake(conn); err != nil {
			d.refused("handshake")
			conn.Close()
			return
		}
		conn = secure
	}
	first := make([]byte, 3) // no method of HTTP/1.1 begins with PRI
	if _, err := io.ReadFull(conn, first); err != nil {
		d.refused("silent")
		conn.Close()
		return
	}
	conn.SetDeadline(time.Time{})
	begun := prefixedConn{Conn: conn, prefix: first}
	isHTTP2 := string(first) == "PRI"
	switch {
	case isHTTP2 && secure != nil:
		state := secure.ConnectionState()
		d.grpcSide.hand(d.http2.add(&begun, &state))
	case isHTTP2:
		d.grpcSide.hand(d.http2.add(&begun, nil))
	case secure != nil:
		d.httpSide.hand(&secured{begun, secure.ConnectionState()})
	default:
		d.httpSide.hand(&begun)
	}
}

// A counted connection says when it is closed.
type counted struct {
	net.Conn
	closed func()
}

func (c *counted) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

// A side is the net.Listener that one of the two servers accepts from.
type side struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newSide(addr net.Addr) *side {
	return &side{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (s *side) hand(c net.Conn) {
	select {
	case s.conns <- c:
	case <-s.closed:
		c.Close()
	}
}

func (s *side) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

func (s *side) Close() error {
	s.close.Do(func() { close(s.closed) })
	return nil
}

func (s *side) Addr() net.Addr { return s.addr }

// A prefixedConn gives back the bytes that were read to look at them.
type prefixedConn struct {
	net.Conn
	prefix []byte
}

func (c *prefixedConn) Read(b []byte) (int, error) {
	if len(c.prefix) > 0 {
		n := copy(b, c.prefix)
		c.prefix = c.prefix[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}
