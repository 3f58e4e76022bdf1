// Package connmux shares one port between an HTTP/2 and an HTTP/1.1 server (connection multiplexing).
// It accepts connections and does their TLS handshakes. It limits the resources that a peer can use
// before a handler gets its request, and while the peer does not read the reply. The package handles only
// bytes, frames and certificates, and does not depend on the calls or on the two servers.
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
	Listener    net.Listener
	TLS         *Certificates // nil for plaintext
	Connections int           // maximum number of open connections
	// Timeout is for the TLS handshake with the first bytes, and for each HTTP/2 header block.
	Timeout time.Duration
	// RequestTimeout is the time after which the server ends a request that is incomplete.
	RequestTimeout time.Duration
	WaitingStreams int                 // maximum of HTTP/2 streams that wait; see http2Conns
	Rejected       func(reason string) // called for each connection that the Mux closes
}

// Mux accepts connections, does the TLS handshake if TLS is configured, and reads the first bytes.
// Connections that start with the HTTP/2 preface go to one server, all others to another. There are two
// servers because gRPC through net/http would cost three times the CPU of grpc-go's own transport.
type Mux struct {
	// HTTP1 and HTTP2 are listeners for the two servers. Under TLS a connection of HTTP1 has a
	// method ConnectionState, which net/http calls for Request.TLS. A connection of HTTP2 is an
	// *HTTP2Conn.
	HTTP1, HTTP2 *chanListener

	config     Config
	http2Conns *http2Conns
	open       atomic.Int64
}

// New returns a Mux for the connections of c.Listener.
func New(c Config) *Mux {
	return &Mux{HTTP1: newChanListener(c.Listener), HTTP2: newChanListener(c.Listener), config: c, http2Conns: newHTTP2Conns(c)}
}

// Serve accepts connections until the listener is closed.
func (m *Mux) Serve() error {
	var wait time.Duration
	for {
		conn, err := m.config.Listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // temporary, such as too many open files
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			time.Sleep(wait)
			continue
		}
		wait = 0
		if m.open.Add(1) > int64(m.config.Connections) {
			m.open.Add(-1)
			m.config.Rejected("connections")
			conn.Close()
			continue
		}
		go m.dispatch(&countedConn{Conn: conn, onClose: sync.OnceFunc(func() { m.open.Add(-1) })})
	}
}

// dispatch passes a connection to the server for its protocol.
func (m *Mux) dispatch(conn net.Conn) {
	conn.SetDeadline(time.Now().Add(m.config.Timeout))
	var state *tls.ConnectionState // nil for plaintext
	if m.config.TLS != nil {
		secure, err := m.config.TLS.handshake(conn)
		if err != nil {
			m.config.Rejected("handshake")
			conn.Close()
			return
		}
		s := secure.ConnectionState()
		conn, state = secure, &s
	}
	first := make([]byte, 3) // "PRI" starts only HTTP/2
	if _, err := io.ReadFull(conn, first); err != nil {
		m.config.Rejected("silent")
		conn.Close()
		return
	}
	conn.SetDeadline(time.Time{})
	peeked := prefixedConn{Conn: conn, prefix: first}
	switch {
	case string(first) == "PRI":
		m.HTTP2.deliver(m.http2Conns.add(&peeked, state))
	case state != nil:
		m.HTTP1.deliver(&tlsConn{peeked, *state})
	default:
		m.HTTP1.deliver(&peeked)
	}
}

// countedConn is a connection that counts as open until Close calls onClose.
type countedConn struct {
	net.Conn
	onClose func()
}

func (c *countedConn) Close() error {
	defer c.onClose()
	return c.Conn.Close()
}

// chanListener is a listener whose Accept returns the connections that deliver gets. Each of the two
// servers has a chanListener. Close does not close the embedded Listener, which both share.
type chanListener struct {
	net.Listener
	conns  chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newChanListener(l net.Listener) *chanListener {
	return &chanListener{Listener: l, conns: make(chan net.Conn), closed: make(chan struct{})}
}

// deliver passes c to Accept, or closes it if the chanListener is closed.
func (l *chanListener) deliver(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.closed:
		c.Close()
	}
}

func (l *chanListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *chanListener) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

// prefixedConn is a connection whose Read returns first the bytes that Mux has already read, and
// then those of Conn.
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
