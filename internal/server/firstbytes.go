package server

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// serveByFirstBytes accepts connections and hands each to one of two servers:
// those that begin with HTTP/2's preface to grpcSide, all others to httpSide. It
// returns when listener is closed. This keeps grpc-go on its own transport,
// which costs a third of what it costs behind net/http.
func serveByFirstBytes(listener net.Listener, grpcSide, httpSide *side) error {
	var wait time.Duration
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // such as too many open files: it passes
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			time.Sleep(wait)
			continue
		}
		wait = 0
		go func() {
			first := make([]byte, 3) // no method of HTTP/1.1 begins with PRI
			conn.SetReadDeadline(time.Now().Add(connectionTimeout))
			if _, err := io.ReadFull(conn, first); err != nil {
				conn.Close()
				return
			}
			conn.SetReadDeadline(time.Time{})
			to := httpSide
			if string(first) == "PRI" {
				to = grpcSide
			}
			to.hand(&prefixedConn{Conn: conn, prefix: first})
		}()
	}
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
