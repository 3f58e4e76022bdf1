package mysqltest

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/go-sql-driver/mysql"
)

// A Router is a proxy between clients and a server, like MySQL Router and ProxySQL. It can reject
// clients with an error number, as those do if they have no server.
type Router struct {
	DSN string // of the database, through the router

	network, server string
	refusal         atomic.Pointer[refusal]
}

type refusal struct {
	number uint16
	at     stage
}

// A stage is the point of a connection at which the router rejects.
type stage int

const (
	greeting stage = iota
	command
	preparation
)

// NewRouter starts a router for the server of dsn, until the test ends.
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

// RefuseGreetings sends an error in place of the greeting to new connections.
func (r *Router) RefuseGreetings(number uint16) { r.refusal.Store(&refusal{number, greeting}) }

// RefuseCommands lets clients log in, sends an error for their next command, and closes the
// connection. The driver sends commands to set up a session.
func (r *Router) RefuseCommands(number uint16) { r.refusal.Store(&refusal{number, command}) }

// RefuseStatements is RefuseCommands for the first prepared statement.
func (r *Router) RefuseStatements(number uint16) { r.refusal.Store(&refusal{number, preparation}) }

// Pass lets all clients pass again.
func (r *Router) Pass() { r.refusal.Store(nil) }

func (r *Router) serve(client net.Conn) {
	defer client.Close()
	if reject := r.refusal.Load(); reject != nil && reject.at == greeting {
		client.Write(reject.packet(0))
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
		// A command has sequence number 0. The packets of a login continue the greeting's numbers.
		const prepare = 0x16
		if reject := r.refusal.Load(); reject != nil && header[3] == 0 && (reject.at != preparation || bytes.HasPrefix(body, []byte{prepare})) {
			client.Write(reject.packet(1))
			return
		}
		server.Write(append(header[:], body...))
	}
}

// packet returns the MySQL error packet.
func (r *refusal) packet(sequence byte) []byte {
	body := binary.LittleEndian.AppendUint16([]byte{0xff}, r.number)
	body = append(body, "refused by the router"...)
	return append([]byte{byte(len(body)), 0, 0, sequence}, body...)
}
