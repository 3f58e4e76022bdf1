package sms

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

type endlessReply struct{ name, text, drip string }

func endlessReplies() []endlessReply {
	const upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
	replies := []endlessReply{
		{"101, then silence", "HTTP/1.1 101 Switching Protocols\r\n" + upgrade + "\r\n", ""},
		{"101, then bytes without end", "HTTP/1.1 101 Switching Protocols\r\n" + upgrade + "\r\n", "x"},
		{"101, then a reply", "HTTP/1.1 101 Switching Protocols\r\n" + upgrade + "\r\n" + `{"Code":"OK","BizId":"1"}`, ""},
		{"101 without an upgrade", "HTTP/1.1 101 Switching Protocols\r\nContent-Length: 9\r\n\r\n", ""},
		{"100 without end", "", "HTTP/1.1 100 Continue\r\n\r\n"},
		{"103 without end", "", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"},
		{"a status line without end", "HTTP/1.1 200 ", "x"},
		{"a header without end", "HTTP/1.1 200 OK\r\nA: ", "x"},
		{"a body without end", "HTTP/1.1 200 OK\r\n\r\n", " "},
		{"chunks without end", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n"},
		{"a chunk's extension without end", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=", "x"},
		{"trailers without end", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n0\r\n", "A: x\r\n"},
	}
	for _, status := range []int{100, 102, 200, 202, 302, 407, 426, 500, 999} {
		replies = append(replies, endlessReply{
			fmt.Sprint("a silent ", status),
			fmt.Sprintf("HTTP/1.1 %d X\r\n%sContent-Length: 99\r\n\r\n", status, upgrade), "",
		})
	}
	return replies
}

// If the gateway's reply never ends, the send ends at its deadline, its outcome is unknown, and
// its connection is closed.
func TestSend_EveryEndlessReplyEndsAtTheDeadline(t *testing.T) {
	const timeout = 500 * time.Millisecond
	for _, c := range endlessReplies() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fake, hungUp := dysmsapitest.New(t), make(chan struct{})
			fake.Next(dysmsapitest.Raw(c.text, c.drip, sync.OnceFunc(func() { close(hungUp) })))
			a := sender(t, fake, "")
			ctx := deadline(t, timeout)
			type result struct {
				receipt verify.Receipt
				err     error
			}
			ended := make(chan result, 1)
			go func() {
				receipt, err := a.Send(ctx, message)
				ended <- result{receipt, err}
			}()
			const late = timeout + 15*time.Second
			select {
			case got := <-ended:
				var e *verify.SendError
				if !errors.As(got.err, &e) || e.Kind != verify.SendTimedOut && e.Kind != verify.SendUnknown {
					t.Errorf("got %+v, %v; want an unknown outcome", got.receipt, got.err)
				}
			case <-time.After(late):
				t.Fatalf("the send still runs %v after its deadline; want it ended", late-timeout)
			}
			select {
			case <-hungUp:
			case <-time.After(late):
				t.Error("the connection is still open; want it closed")
			}
		})
	}
}

func TestQuestions_EveryEndlessReplyEndsAtTheDeadline(t *testing.T) {
	for _, c := range endlessReplies() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fake := dysmsapitest.New(t)
			endless := dysmsapitest.Raw(c.text, c.drip, func() {})
			fake.Next(endless)
			fake.FailQueries(endless)
			a := sender(t, fake, "")
			ctx := deadline(t, 500*time.Millisecond)
			ended := make(chan string, 2)
			go func() { ended <- a.Probe(ctx, SMS).Failure }()
			go func() {
				_, err := a.Deliveries(ctx, SMS, message.Number, time.Now(), "")
				ended <- fmt.Sprint(err)
			}()
			for range 2 {
				select {
				case got := <-ended:
					if got == "" || got == "<nil>" {
						t.Errorf("got %q; want the reason that there is no reply", got)
					}
				case <-time.After(15 * time.Second):
					t.Fatal("a question still runs long after its deadline; want it ended")
				}
			}
		})
	}
}

// gateway starts a server that replies to each request with reply of the request's number,
// which counts from 1 over all connections. It returns a sender to that server.
func gateway(t *testing.T, secured bool, reply func(request int) string) *Aliyun {
	t.Helper()
	var requests atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		for {
			if _, err := io.WriteString(conn, reply(int(requests.Add(1)))); err != nil {
				return
			}
			if _, err := http.ReadRequest(buffered.Reader); err != nil {
				return
			}
		}
	}))
	start := server.Start
	if secured {
		start = server.StartTLS
	}
	start()
	t.Cleanup(server.Close)
	a := sender(t, dysmsapitest.New(t), server.URL)
	if secured {
		a.endpoints[SMS].transport.TLSClientConfig.RootCAs = server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	}
	return a
}

func httpReply(body string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// The gateway sends two replies to one request. The next send takes over the connection before
// net/http notices the second one.
func TestSend_ReplyBeforeTheRequestIsUnknown(t *testing.T) {
	for _, secured := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "TLS"}[secured], func(t *testing.T) {
			accepted := httpReply(`{"Code":"OK","BizId":"1^0","RequestId":"A-1"}`)
			rejected := httpReply(`{"Code":"isv.SMS_TEMPLATE_ILLEGAL","RequestId":"A-2"}`)
			a := gateway(t, secured, func(int) string { return accepted + rejected })

			written, ended := make(chan struct{}), make(chan error, 1)
			second := httptrace.WithClientTrace(deadline(t, 10*time.Second), &httptrace.ClientTrace{
				WroteHeaders: sync.OnceFunc(func() { close(written) }),
			})
			first := httptrace.WithClientTrace(deadline(t, 10*time.Second), &httptrace.ClientTrace{
				PutIdleConn: func(error) {
					go func() {
						_, err := a.Send(second, message)
						ended <- err
					}()
					<-written
				},
			})
			if _, err := a.Send(first, message); err != nil {
				t.Fatal(err)
			}
			var e *verify.SendError
			if err := <-ended; !errors.As(err, &e) || e.Kind != verify.SendUnknown || e.ProviderCode != "" {
				t.Errorf("got %v (%+v); want an unknown outcome", err, e)
			}
		})
	}
}

func TestSend_RejectionWithASeenRequestIDIsUnknown(t *testing.T) {
	const limited = `{"Code":"isv.BUSINESS_LIMIT_CONTROL","RequestId":"A-1"}`
	a := gateway(t, false, func(request int) string {
		return httpReply([]string{"", limited, limited, `{"Code":"isv.BUSINESS_LIMIT_CONTROL","RequestId":"A-3"}`}[request])
	})
	var connections []net.Conn
	ctx := httptrace.WithClientTrace(deadline(t, 10*time.Second), &httptrace.ClientTrace{
		GotConn: func(got httptrace.GotConnInfo) { connections = append(connections, got.Conn) },
	})
	for i, want := range []verify.SendError{
		{Kind: verify.SendLimited, RetryAfter: time.Minute, ProviderCode: "isv.BUSINESS_LIMIT_CONTROL", HTTPStatus: 200, RequestID: "A-1"},
		{Kind: verify.SendUnknown, HTTPStatus: 200, RequestID: "A-1"},
		{Kind: verify.SendLimited, RetryAfter: time.Minute, ProviderCode: "isv.BUSINESS_LIMIT_CONTROL", HTTPStatus: 200, RequestID: "A-3"},
	} {
		got := failure(ctx, t, a)
		matches(t, got, want)
		if got.RequestID != want.RequestID {
			t.Errorf("reply %d: got request id %q; want %q", i+1, got.RequestID, want.RequestID)
		}
	}
	// net/http may try the closed connection first: it writes nothing to it.
	if last := len(connections) - 1; last < 2 || connections[0] != connections[1] || connections[1] == connections[last] {
		t.Errorf("got the connections %v; want one for the first two sends, and another one after the repeated rejection", connections)
	}
}

// A mock of the gateway may give every success the same RequestId.
func TestSend_SuccessesMayShareARequestID(t *testing.T) {
	a := gateway(t, false, func(int) string { return httpReply(`{"Code":"OK","BizId":"1^0","RequestId":"A-1"}`) })
	for range 3 {
		if _, err := a.Send(t.Context(), message); err != nil {
			t.Error(err)
		}
	}
}

func TestRecentIDs_RememberTheLastAndStayBounded(t *testing.T) {
	var r recentIDs
	id := func(i int) string { return fmt.Sprint("A-", i) }
	for i := range 10 * keptIDs {
		if r.again(id(i)) {
			t.Fatalf("%s: got seen before; want new", id(i))
		}
		if oldest := max(0, i-keptIDs+1); !r.again(id(oldest)) {
			t.Fatalf("after %s: got %s new; want the last %d ids kept", id(i), id(oldest), keptIDs)
		}
		if n := len(r.now) + len(r.before); n > 2*keptIDs {
			t.Fatalf("got %d kept ids; want %d at most", n, 2*keptIDs)
		}
	}
	for range 2 {
		if r.again("") {
			t.Error("an empty id: got seen before; want new")
		}
	}
}

func TestSend_HangEndsAtTheDeadline(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Next(dysmsapitest.Hang().ButAccepted())
	const timeout = 150 * time.Millisecond
	start := time.Now()
	matches(t, failure(deadline(t, timeout), t, sender(t, fake, "")), verify.SendError{Kind: verify.SendTimedOut})
	if took := time.Since(start); took < timeout || took > timeout+3*time.Second {
		t.Errorf("got the error after %v; want it after %v", took, timeout)
	}
	checkSent(t, fake, 1, 1)
}

func TestSend_StalledReplyEndsAtTheDeadline(t *testing.T) {
	stalls := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"Code":"OK",`)
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(stalls.Close)
	a := sender(t, dysmsapitest.New(t), stalls.URL)
	matches(t, failure(deadline(t, 150*time.Millisecond), t, a), verify.SendError{Kind: verify.SendTimedOut, HTTPStatus: 200})
}

// A canceled call reports if its request was written: SendNotAttempted if not, otherwise
// SendTimedOut.
func TestSend_CancelBeforeTheRequestIsNotAttempted(t *testing.T) {
	fake := dysmsapitest.New(t)
	a := sender(t, fake, "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	matches(t, failure(ctx, t, a), verify.SendError{Kind: verify.SendNotAttempted})
	checkSent(t, fake, 0, 0)

	fake.Next(dysmsapitest.Hang())
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		for fake.Requests() == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	matches(t, failure(ctx, t, a), verify.SendError{Kind: verify.SendTimedOut})
	checkSent(t, fake, 0, 1)
}

// unresolved fails to dial, as if no name server knew the host.
func unresolved(_ context.Context, _, address string) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: address, IsNotFound: true}}
}

// If the connection fails before the request, nothing was sent.
func TestSend_WithoutAConnectionIsNotAttempted(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts connections, sends nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	fake := dysmsapitest.New(t)
	overTLS := func(config *tls.Config) string {
		server := httptest.NewUnstartedServer(fake)
		server.TLS = config
		server.Config.ErrorLog = quietLog
		server.StartTLS()
		t.Cleanup(server.Close)
		return server.URL
	}
	old := overTLS(&tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10})
	for _, c := range []struct {
		name, endpoint, detail string
		prepare                func(*Aliyun)
	}{
		{"refused", "http://" + testutil.RefusingAddress, "connection refused", nil},
		{"untrusted certificate", overTLS(&tls.Config{}), "server certificate not trusted", nil},
		{"TLS 1.1", old, "no connection", func(a *Aliyun) { a.endpoints[SMS].transport.TLSClientConfig.InsecureSkipVerify = true }},
		{
			"stalled handshake", "https://" + silent.Addr().String(), "connecting took too long",
			func(a *Aliyun) { a.endpoints[SMS].transport.TLSHandshakeTimeout = 50 * time.Millisecond },
		},
		{"deadline in the handshake", "https://" + silent.Addr().String(), "time was up before the request was written", nil},
		{"unknown host", "https://aliyun.invalid", "host name not resolved", func(a *Aliyun) { a.endpoints[SMS].transport.DialContext = unresolved }},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := sender(t, fake, c.endpoint)
			if c.prepare != nil {
				c.prepare(a)
			}
			timeout := 10 * time.Second
			if strings.HasPrefix(c.name, "deadline") {
				timeout = 100 * time.Millisecond
			}
			got := failure(deadline(t, timeout), t, a)
			matches(t, got, verify.SendError{Kind: verify.SendNotAttempted})
			if got.Detail != c.detail {
				t.Errorf("got detail %q; want %q", got.Detail, c.detail)
			}
			if n := len(fake.Accepted()); n != 0 {
				t.Errorf("got %d sent messages; want none", n)
			}
		})
	}
}

func TestSend_UsesHTTP1AndExportsTheCertificatesEnd(t *testing.T) {
	fake := dysmsapitest.New(t)
	var protocol atomic.Value
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		protocol.Store(fmt.Sprintf("%s %t", r.Proto, r.TLS.Version >= tls.VersionTLS12))
		fake.ServeHTTP(w, r)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	a := sender(t, fake, server.URL)
	a.endpoints[SMS].transport.TLSClientConfig.RootCAs = server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	if _, err := a.Send(t.Context(), message); err != nil {
		t.Fatal(err)
	}
	if got, want := protocol.Load(), "HTTP/1.1 true"; got != want {
		t.Errorf("got %v; want %s", got, want)
	}
	var m dto.Metric
	if err := a.endpoints[SMS].certificate.WithLabelValues().Write(&m); err != nil {
		t.Fatal(err)
	}
	if got, want := m.GetGauge().GetValue(), float64(server.Certificate().NotAfter.Unix()); got != want {
		t.Errorf("the metric of the certificate's end: got %v; want %v", got, want)
	}
	checkSent(t, fake, 1, 1)
}

// net/http repeats some requests by itself if a kept connection is dead. It must not repeat a
// send.
func TestSend_IsNotReplayedOnADeadConnection(t *testing.T) {
	for name, fault := range map[string]dysmsapitest.Fault{
		"ended":            dysmsapitest.CloseAfterReading(),
		"ended, delivered": dysmsapitest.CloseAfterReading().ButAccepted(),
		"reset":            dysmsapitest.CloseBeforeReading(),
	} {
		t.Run(name, func(t *testing.T) {
			fake := dysmsapitest.New(t)
			a := sender(t, fake, "")
			if _, err := a.Send(t.Context(), message); err != nil {
				t.Fatal(err)
			}
			fake.Next(fault)
			matches(t, failure(t.Context(), t, a), verify.SendError{Kind: verify.SendUnknown})
			if got := fake.Connections(); got != 1 {
				t.Errorf("got %d connections; want 1, for both sends", got)
			}
			messages := 1
			if strings.HasSuffix(name, "delivered") {
				messages = 2
			}
			checkSent(t, fake, messages, 2)
			if _, err := a.Send(t.Context(), message); err != nil {
				t.Errorf("the next send: got %v; want nil", err)
			}
		})
	}
}

func TestSend_BurstKeepsItsConnections(t *testing.T) {
	const burst, rounds = 200, 3
	fake := dysmsapitest.New(t)
	fake.Always(dysmsapitest.Delay(20 * time.Millisecond)) // so that a round's sends overlap
	a := sender(t, fake, "")
	for range rounds {
		var wg sync.WaitGroup
		for range burst {
			wg.Go(func() {
				if _, err := a.Send(t.Context(), message); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	checkSent(t, fake, burst*rounds, burst*rounds)
	if got := fake.Connections(); got > burst*3/2 {
		t.Errorf("got %d connections for %d rounds of %d sends; want %d at most", got, rounds, burst, burst*3/2)
	}
}
