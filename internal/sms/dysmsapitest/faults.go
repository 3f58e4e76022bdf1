package dysmsapitest

import (
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A Fault is one way for a request to fail (fault injection). The message is not sent, unless
// the fault is made by ButAccepted.
type Fault struct {
	accepts bool
	unread  bool // the connection ends before the request is read
	act     func(http.ResponseWriter, *http.Request, reply)
}

func healthy() Fault {
	return Fault{accepts: true, act: func(w http.ResponseWriter, _ *http.Request, a reply) { a.write(w) }}
}

// ButAccepted returns f for a message that was sent: only the reply is lost.
func (f Fault) ButAccepted() Fault {
	f.accepts = !f.unread
	return f
}

// Hang never replies.
func Hang() Fault {
	return Fault{act: func(_ http.ResponseWriter, r *http.Request, _ reply) { <-r.Context().Done() }}
}

// CloseBeforeReading resets the connection when the request's first bytes arrive.
func CloseBeforeReading() Fault { return Fault{unread: true, act: hangUp} }

// CloseAfterReading closes the connection without a byte of a reply.
func CloseAfterReading() Fault { return Fault{act: hangUp} }

func hangUp(http.ResponseWriter, *http.Request, reply) { panic(http.ErrAbortHandler) }

// Truncated closes the connection in the middle of the reply.
func Truncated() Fault {
	return Fault{act: func(w http.ResponseWriter, _ *http.Request, a reply) {
		body := a.body()
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(a.Status)
		w.Write(body[:len(body)/2])
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}}
}

// Body replies with the given status, type and body.
func Body(status int, contentType, body string) Fault {
	return Fault{act: func(w http.ResponseWriter, _ *http.Request, _ reply) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		io.WriteString(w, body)
	}}
}

// BadGateway replies as a proxy does if its upstream is down.
func BadGateway() Fault {
	return Body(http.StatusBadGateway, "text/html", "<html><head><title>502 Bad Gateway</title></head><body>502</body></html>")
}

// Reply replies in Aliyun's form.
func Reply(status int, code, message string) Fault {
	return Fault{act: func(w http.ResponseWriter, _ *http.Request, a reply) {
		reply{Status: status, Code: code, Message: message, RequestID: a.RequestID}.write(w)
	}}
}

// OKWithoutBizID replies OK without a BizId. Aliyun never does so.
func OKWithoutBizID() Fault { return Reply(http.StatusOK, "OK", "OK") }

// Huge replies with a success that padding extends to size bytes.
func Huge(size int) Fault {
	return Fault{act: func(w http.ResponseWriter, _ *http.Request, _ reply) {
		const start, chunk = `{"Code":"OK","BizId":"1^0","Message":"`, 1 << 16
		io.WriteString(w, start)
		padding := strings.Repeat("x", chunk)
		for left := size - len(start) - len(`"}`); left > 0; left -= chunk {
			if _, err := io.WriteString(w, padding[:min(left, chunk)]); err != nil {
				return
			}
		}
		io.WriteString(w, `"}`)
	}}
}

// Redirect replies with a Location.
func Redirect(status int, location string) Fault {
	return Fault{act: func(w http.ResponseWriter, _ *http.Request, _ reply) {
		w.Header().Set("Location", location)
		w.WriteHeader(status)
	}}
}

// Raw writes text to the bare connection, then drip again and again until the client
// hangs up, and calls hungUp then.
func Raw(text, drip string, hungUp func()) Fault {
	return Fault{act: func(w http.ResponseWriter, _ *http.Request, _ reply) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		gone := make(chan struct{})
		go func() {
			io.Copy(io.Discard, conn)
			close(gone)
		}()
		io.WriteString(conn, text)
		for {
			select {
			case <-gone:
				hungUp()
				return
			case <-time.After(time.Millisecond):
				io.WriteString(conn, drip)
			}
		}
	}}
}

// Delay is a slow success: the reply comes d after the message was sent.
func Delay(d time.Duration) Fault {
	return Fault{accepts: true, act: func(w http.ResponseWriter, r *http.Request, a reply) {
		select {
		case <-time.After(d):
			a.write(w)
		case <-r.Context().Done():
		}
	}}
}

// countingListener counts connections and bytes, and applies the faults that come before HTTP.
type countingListener struct {
	net.Listener
	s *Server
}

func (l countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.s.set(func() { l.s.connections++ })
	return &countedConn{conn, l.s}, nil
}

type countedConn struct {
	net.Conn
	s *Server
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	unread := false
	c.s.set(func() {
		if unread = n > 0 && c.s.due().unread; unread {
			c.s.take()
		}
	})
	if unread {
		c.Conn.(*net.TCPConn).SetLinger(0) // a reset, not an orderly end
		c.Close()
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *countedConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.s.set(func() { c.s.sent += int64(n) })
	return n, err
}
