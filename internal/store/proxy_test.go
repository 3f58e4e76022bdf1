package store_test

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A fault describes how a proxy disturbs one swap. In every case the client loses its
// connection, and so the reply.
type fault struct {
	drop  bool          // the server never gets the statement
	stall chan struct{} // the server gets it when this is closed
	then  func()        // runs after the server's reply, or after the drop
}

// A proxy relays between the driver and the server. It applies each fault from its channel to
// the next swap.
type proxy struct {
	dsn    string
	faults chan fault
}

func newProxy(t *testing.T, dsn string) *proxy {
	t.Helper()
	config, err := mysql.ParseDSN(dsn)
	if err != nil {
		t.Fatal(err)
	}
	if config.TLSConfig != "" {
		t.Skip("needs a connection without TLS, which its proxy can read")
	}
	network, address := config.Net, config.Addr
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	config.Net, config.Addr = "tcp", listener.Addr().String()
	p := &proxy{config.FormatDSN(), make(chan fault, 10)}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			if server, err := net.Dial(network, address); err == nil {
				go p.serve(client, server)
			} else {
				client.Close()
			}
		}
	}()
	return p
}

func (p *proxy) serve(client, server net.Conn) {
	defer client.Close()
	defer server.Close()
	active := make(chan fault, 1)
	go func() { // replies
		defer client.Close()
		defer server.Close()
		for buffer := make([]byte, 1<<16); ; {
			n, err := server.Read(buffer)
			select {
			case f := <-active:
				f.then()
				return
			default:
			}
			if err != nil {
				return
			}
			client.Write(buffer[:n])
		}
	}()
	for buffer := make([]byte, 1<<16); ; {
		n, err := client.Read(buffer)
		if err != nil {
			return
		}
		const execute, longestLoad = 0x17, 48 // a packet's fifth byte is its command
		if n > longestLoad && buffer[4] == execute {
			select {
			case f := <-p.faults:
				if f.then == nil {
					f.then = func() {}
				}
				if f.drop {
					f.then()
					return
				}
				active <- f
				if f.stall != nil {
					client.Close()
					<-f.stall
				}
			default:
			}
		}
		server.Write(buffer[:n])
	}
}

func TestSwap_LostReplyIsUnknown(t *testing.T) {
	dsn := mysqltest.DSN(t)
	direct, proxy := open(t, dsn), newProxy(t, dsn)
	db := open(t, proxy.dsn)
	unknown := func(t *testing.T, n verify.Number, old verify.Version, next verify.Record, f fault) {
		t.Helper()
		proxy.faults <- f
		if done, err := db.Swap(t.Context(), n, old, next); done || !isUnknown(err) {
			t.Fatalf("Swap = %v, %v; want %v", done, err, verify.ErrOutcomeUnknown)
		}
		if len(proxy.faults) != 0 {
			t.Fatal("the fault was not applied to the swap")
		}
	}
	t.Run("it was applied", func(t *testing.T) {
		first, second := record("first", 1), record("second", 2)
		unknown(t, "+1", none, first, fault{})
		mustLoad(t, db, "+1", first)
		mustSwap(t, db, "+1", none, first, false)
		unknown(t, "+1", first.Version, second, fault{})
		mustLoad(t, db, "+1", second)
		mustSwap(t, db, "+1", first.Version, second, false)
	})
	t.Run("it was not applied", func(t *testing.T) {
		first, second := record("first", 1), record("second", 2)
		unknown(t, "+2", none, first, fault{drop: true})
		mustLoad(t, db, "+2", verify.Record{})
		mustSwap(t, db, "+2", none, first, true)
		unknown(t, "+2", first.Version, second, fault{drop: true})
		mustLoad(t, db, "+2", first)
		mustSwap(t, db, "+2", first.Version, second, true)
	})
	t.Run("it arrives late and changes nothing", func(t *testing.T) {
		old, oldVersion := verify.Record{}, none
		for range 2 { // an insert, then an update
			next, third := record("next", 1), record("third", 2)
			stall, replied := make(chan struct{}), make(chan struct{})
			unknown(t, "+3", oldVersion, next, fault{stall: stall, then: func() { close(replied) }})
			mustLoad(t, direct, "+3", old)
			mustSwap(t, direct, "+3", oldVersion, next, true)
			mustSwap(t, direct, "+3", next.Version, third, true)
			close(stall)
			<-replied
			mustLoad(t, direct, "+3", third)
			old, oldVersion = third, third.Version
		}
	})
}

type sender func(verify.Message) error

func (s sender) Send(_ context.Context, m verify.Message) (verify.Receipt, error) {
	return verify.Receipt{}, s(m)
}

func newVerifier(s verify.Store, send sender) *verify.Verifier {
	return verify.New(verify.Config{
		Rules: verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute}, Keys: verify.RandomKeys(),
		Store: s, Sender: send, SMSTimeout: time.Second,
		Now: verify.SteadyClock(), Random: rand.Reader, Log: slog.New(slog.DiscardHandler),
	})
}

// TestVerifier_ResolvesLostReplies runs the whole domain on a proxy that loses replies. The
// result of each call must be correct, and each call takes effect once.
func TestVerifier_ResolvesLostReplies(t *testing.T) {
	for name, lose := range map[string]fault{"after the statement": {}, "before the statement": {drop: true}} {
		t.Run(name, func(t *testing.T) {
			dsn := mysqltest.DSN(t)
			direct, proxy := open(t, dsn), newProxy(t, dsn)
			var sent []string
			confirmLost := false
			v := newVerifier(open(t, proxy.dsn), func(m verify.Message) error {
				sent = append(sent, m.Code)
				if confirmLost {
					proxy.faults <- lose
				}
				return nil
			})
			check := func(code string, want bool) {
				t.Helper()
				if got, err := isValid(t.Context(), v, number, code); got != want || err != nil {
					t.Fatalf("Check = %v, %v; want %v", got, err, want)
				}
				if len(proxy.faults) != 0 {
					t.Fatal("the fault was applied to no swap")
				}
			}
			send := func(codes byte) {
				t.Helper()
				before := len(sent)
				if _, err := v.Send(t.Context(), verify.SendRequest{Number: number}); err != nil {
					t.Fatalf("Send = %v; want nil", err)
				}
				if got := len(sent) - before; got != 1 {
					t.Fatalf("got %d messages sent; want 1", got)
				}
				const countAt = 9 // in the stored form: format, last send ID, number of codes
				if r, err := direct.Load(t.Context(), number); err != nil || r.State[countAt] != codes {
					t.Fatalf("got %d codes stored, %v; want %d", r.State[countAt], err, codes)
				}
				if len(proxy.faults) != 0 {
					t.Fatal("the fault was applied to no swap")
				}
			}
			proxy.faults <- lose // the begin, an insert
			send(1)
			proxy.faults <- lose
			check("no code", false)
			proxy.faults <- lose
			check(sent[0], true)
			check(sent[0], false)
			proxy.faults <- lose // the begin, an update
			send(1)
			proxy.faults <- lose // the begin of a resend
			confirmLost = true   // and its confirm
			send(1)
			// If the calls were repeated blindly, each would count two attempts.
			proxy.faults <- lose
			check("no code", false)
			check(sent[1], false)
			check(sent[2], true)
			check(sent[2], false)
		})
	}
	t.Run("a check is unknown if another writer wrote after its swap", func(t *testing.T) {
		dsn := mysqltest.DSN(t)
		direct, proxy := open(t, dsn), newProxy(t, dsn)
		var code string
		v := newVerifier(open(t, proxy.dsn), func(m verify.Message) error { code = m.Code; return nil })
		other := newVerifier(direct, nil)
		other.ReplaceKeys(v.Keys)
		if _, err := v.Send(t.Context(), verify.SendRequest{Number: number}); err != nil {
			t.Fatal(err)
		}
		proxy.faults <- fault{then: func() {
			if got, err := isValid(context.Background(), other, number, "no code"); got || err != nil {
				t.Errorf("Check by the other replica = %v, %v; want false", got, err)
			}
		}}
		if got, err := isValid(t.Context(), v, number, "no code either"); got || !errors.Is(err, verify.ErrOutcomeUnknown) {
			t.Errorf("Check = %v, %v; want %v", got, err, verify.ErrOutcomeUnknown)
		}
		if got, err := isValid(t.Context(), v, number, code); !got || err != nil {
			t.Errorf("Check with the right code at the third attempt = %v, %v; want true", got, err)
		}
	})
}

func isValid(ctx context.Context, v *verify.Verifier, n verify.Number, code string) (bool, error) {
	found, err := v.Check(ctx, n, code, "")
	return found.Valid(), err
}
