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

// connMux accepts connections, does the TLS handshake if TLS is configured, and reads the
// first bytes. Connections that start with the HTTP/2 preface go to grpc-go, all others to
// net/http. gRPC through net/http would cost three times the CPU of grpc-go's own transport.
type connMux struct {
	listener                   net.Listener
	tls                        *Certificates // nil for plaintext
	limits                     Limits
	rejected                   func(reason string)
	http2                      *http2Conns
	grpcListener, httpListener *chanListener

	open atomic.Int64
}

// serve returns when listener is closed.
func (d *connMux) serve() error {
	var wait time.Duration
	for {
		conn, err := d.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // temporary, such as too many open files
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			time.Sleep(wait)
			continue
		}
		wait = 0
		if d.open.Add(1) > int64(d.limits.Connections) {
			d.open.Add(-1)
			d.rejected("connections")
			conn.Close()
			continue
		}
		go d.dispatch(&countedConn{Conn: conn, closed: sync.OnceFunc(func() { d.open.Add(-1) })})
	}
}

func (d *connMux) dispatch(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(d.limits.ConnectionTimeout))
	var secure *tls.Conn
	if d.tls != nil {
		var err error
		if secure, err = d.tls.handshake(conn); err != nil {
			d.rejected("handshake")
			conn.Close()
			return
		}
		conn = secure
	}
	first := make([]byte, 3) // no HTTP/1.1 method starts with PRI
	if _, err := io.ReadFull(conn, first); err != nil {
		d.rejected("silent")
		conn.Close()
		return
	}
	conn.SetDeadline(time.Time{})
	peeked := prefixedConn{Conn: conn, prefix: first}
	var state *tls.ConnectionState // nil for plaintext
	if secure != nil {
		s := secure.ConnectionState()
		state = &s
	}
	switch {
	case string(first) == "PRI":
		d.grpcListener.deliver(d.http2.add(&peeked, state))
	case state != nil:
		d.httpListener.deliver(&tlsConn{peeked, *state})
	default:
		d.httpListener.deliver(&peeked)
	}
}

// countedConn calls closed when it is closed.
type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

// chanListener is a net.Listener that returns the connections passed to deliver. Each of the
// two servers accepts from one.
type chanListener struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newChanListener(addr net.Addr) *chanListener {
	return &chanListener{addr: addr, conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (s *chanListener) deliver(c net.Conn) {
	select {
	case s.conns <- c:
	case <-s.closed:
		c.Close()
	}
}

func (s *chanListener) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

func (s *chanListener) Close() error {
	s.close.Do(func() { close(s.closed) })
	return nil
}

func (s *chanListener) Addr() net.Addr { return s.addr }

// prefixedConn returns the bytes that connMux already read, then those of Conn.
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
