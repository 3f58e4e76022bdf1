// Package connmux shares one port between an HTTP/2 and an HTTP/1.1 server: it accepts
// connections, does their TLS handshakes, and bounds what a peer can cost before a request
// reaches a handler. It is a package because it knows bytes, frames and certificates, but no
// calls and neither of the two servers.
package connmux

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Config configures a Mux.
type Config struct {
	Listener       net.Listener
	TLS            *Certificates       // nil for plaintext
	Connections    int                 // open at once
	Timeout        time.Duration       // for TLS, first bytes, and the rest of a header block
	RequestTimeout time.Duration       // ends the handler of a request whose message is missing
	WaitingStreams int                 // HTTP/2 streams that may wait for their peers without consequence
	Rejected       func(reason string) // called for each connection that is closed
}

// Mux accepts connections, does the TLS handshake if TLS is configured, and reads the first
// bytes. Connections that start with the HTTP/2 preface go to one server, all others to
// another. gRPC through net/http would cost three times the CPU of grpc-go's own transport.
type Mux struct {
	// HTTP1 and HTTP2 are listeners for the two servers. Under TLS a connection of HTTP1 has a
	// method ConnectionState, for Request.TLS. A connection of HTTP2 is an *HTTP2Conn.
	HTTP1, HTTP2 *chanListener

	config     Config
	http2Conns *http2Conns
	open       atomic.Int64
}

// New returns a Mux for the connections of c.Listener.
func New(c Config) *Mux {
	return &Mux{HTTP1: newChanListener(c.Listener), HTTP2: newChanListener(c.Listener), config: c, http2Conns: newHTTP2Conns(c)}
}

// Serve returns when the listener is closed.
func (d *Mux) Serve() error {
	var wait time.Duration
	for {
		conn, err := d.config.Listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // temporary, such as too many open files
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			time.Sleep(wait)
			continue
		}
		wait = 0
		if d.open.Add(1) > int64(d.config.Connections) {
			d.open.Add(-1)
			d.config.Rejected("connections")
			conn.Close()
			continue
		}
		go d.dispatch(&countedConn{Conn: conn, closed: sync.OnceFunc(func() { d.open.Add(-1) })})
	}
}

func (d *Mux) dispatch(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(d.config.Timeout))
	var secure *tls.Conn
	if d.config.TLS != nil {
		var err error
		if secure, err = d.config.TLS.handshake(conn); err != nil {
			d.config.Rejected("handshake")
			conn.Close()
			return
		}
		conn = secure
	}
	first := make([]byte, 3) // no HTTP/1.1 method starts with PRI
	if _, err := io.ReadFull(conn, first); err != nil {
		d.config.Rejected("silent")
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
		d.HTTP2.deliver(d.http2Conns.add(&peeked, state))
	case state != nil:
		d.HTTP1.deliver(&tlsConn{peeked, *state})
	default:
		d.HTTP1.deliver(&peeked)
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

// chanListener returns the connections passed to deliver. Each of the two servers accepts from
// one. Close does not close the Listener.
type chanListener struct {
	net.Listener
	conns  chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newChanListener(l net.Listener) *chanListener {
	return &chanListener{Listener: l, conns: make(chan net.Conn), closed: make(chan struct{})}
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

// prefixedConn returns the bytes that Mux already read, then those of Conn.
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
