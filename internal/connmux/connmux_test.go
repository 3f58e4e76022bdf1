package connmux

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// testConfig has the service's default limits.
var testConfig = Config{
	Connections: 2000, Timeout: 2 * time.Second, RequestTimeout: 15 * time.Second, WaitingStreams: 500, Rejected: func(string) {},
}

// FuzzMux_Dispatch sends any first bytes, in two parts. One of the two servers must get
// every byte, or the connection must be closed.
func FuzzMux_Dispatch(f *testing.F) {
	for _, seed := range []string{
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "POST / HTTP/1.1\r\n\r\n", "PR", "", "PRX", "pri", "\x16\x03\x01",
		"\x00\x00\x00",
	} {
		f.Add([]byte(seed), uint8(1))
		f.Add([]byte(seed), uint8(255))
	}
	f.Fuzz(func(t *testing.T, sent []byte, cut uint8) {
		var rejected []string
		config := testConfig
		config.Rejected = func(reason string) { rejected = append(rejected, reason) }
		mux := New(config)
		client, conn := net.Pipe()
		go func() {
			at := min(int(cut), len(sent))
			client.Write(sent[:at])
			client.Write(sent[at:])
			client.Close()
		}()
		dispatched := make(chan struct{})
		go func() {
			mux.dispatch(conn)
			close(dispatched)
		}()
		var got net.Conn
		var isGRPC bool
		select {
		case got = <-mux.HTTP2.conns:
			isGRPC = true
		case got = <-mux.HTTP1.conns:
		case <-dispatched:
			if len(sent) >= 3 || len(rejected) != 1 || rejected[0] != "silent" {
				t.Fatalf("%q: got a closed connection, rejected as %v; want it dispatched, or fewer than 3 bytes and silent", sent, rejected)
			}
			return
		}
		<-dispatched
		all, err := io.ReadAll(got)
		want := sent
		if isGRPC {
			want = sent[:min(len(sent), len(http2.ClientPreface))] // FuzzHTTP2Conn_Read checks the rest
			all = all[:min(len(all), len(want))]
		} else if err != nil {
			t.Errorf("read: got %v; want no error", err)
		}
		if !bytes.Equal(all, want) {
			t.Errorf("read: got %q; want %q", all, want)
		}
		if isGRPC != bytes.HasPrefix(sent, []byte("PRI")) {
			t.Errorf("%q goes to gRPC: got %v; want %v", sent, isGRPC, !isGRPC)
		}
	})
}
