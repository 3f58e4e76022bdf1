package mariadbtest

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/go-sql-driver/mysql"
)

// A Router stands between clients and a server, as MySQL Router and ProxySQL do, and
// can refuse clients with an error number, as these do without a server behind them.
type Router struct {
	DSN string // of the server, through the router

	network, server string
	refusal         atomic.Pointer[refusal]
}

type refusal struct {
	number uint16
	at     stage
}

// A stage is how far a client gets.
type stage int

const (
	greeting stage = iota
	command
	preparation
)

// NewRouter returns a router before the server of dsn. It lives as long as the test.
func NewRouter(t testing.TB, dsn string) *Router {
	t.Helper()
	config, err := mysql.ParseDSN(dsn)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	r := &Router{network: config.Net, server: config.Addr}
	config.Net, config.Addr = "tcp", listener.Addr().String()
	r.DSN = config.FormatDSN()
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go r.serve(client)
		}
	}()
	return r
}

// RefuseGreetings answers new connections with an error in place of a greeting.
func (r *Router) RefuseGreetings(number uint16) { r.refusal.Store(&refusal{number, greeting}) }

// RefuseCommands lets clients log in, answers their next command with an error and
// closes the connection. The driver sends commands to set a session up.
func (r *Router) RefuseCommands(number uint16) { r.refusal.Store(&refusal{number, command}) }

// RefuseStatements is RefuseCommands for the first statement that is prepared.
func (r *Router) RefuseStatements(number uint16) { r.refusal.Store(&refusal{number, preparation}) }

// Pass ends the refusals.
func (r *Router) Pass() { r.refusal.Store(nil) }

func (r *Router) serve(client net.Conn) {
	defer client.Close()
	if no := r.refusal.Load(); no != nil && no.at == greeting {
		client.Write(no.packet(0))
		return
	}
	server, err := net.Dial(r.network, r.server)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		defer client.Close()
		io.Copy(client, server)
	}()
	for {
		var header [4]byte // the length in three bytes, and the sequence number
		if _, err := io.ReadFull(client, header[:]); err != nil {
			return
		}
		body := make([]byte, int(header[0])|int(header[1])<<8|int(header[2])<<16)
		if _, err := io.ReadFull(client, body); err != nil {
			return
		}
		// A command begins a sequence; the packets of a login continue the greeting's.
		const prepare = 0x16
		if no := r.refusal.Load(); no != nil && header[3] == 0 && (no.at != preparation || bytes.HasPrefix(body, []byte{prepare})) {
			client.Write(no.packet(1))
			return
		}
		server.Write(append(header[:], body...))
	}
}

func (no *refusal) packet(sequence byte) []byte {
	body := binary.LittleEndian.AppendUint16([]byte{0xff}, no.number)
	body = append(body, "refused by the router"...)
	return append([]byte{byte(len(body)), 0, 0, sequence}, body...)
}
