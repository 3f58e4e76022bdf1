package server_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A rawPeer writes single HTTP/2 frames. It reads and discards the responses.
type rawPeer struct {
	*http2.Framer
	conn   net.Conn
	closed chan struct{} // closed when the service closes the connection
	goAway chan string   // debug data of a GOAWAY
	ended  atomic.Int64  // streams that the service ended
}

func dialRaw(t *testing.T, addr string, settings ...http2.Setting) *rawPeer {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	p := &rawPeer{Framer: http2.NewFramer(c, c), conn: c, closed: make(chan struct{}), goAway: make(chan string, 1)}
	if err := p.WriteSettings(settings...); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.closed)
		for {
			f, err := p.ReadFrame()
			if err != nil {
				return
			}
			switch f := f.(type) {
			case *http2.HeadersFrame:
				if f.StreamEnded() {
					p.ended.Add(1)
				}
			case *http2.GoAwayFrame:
				select {
				case p.goAway <- string(f.DebugData()):
				default:
				}
			}
		}
	}()
	return p
}

// call begins a call. If end is true, no message follows.
func (p *rawPeer) call(id uint32, path string, end bool, more ...hpack.HeaderField) error {
	return p.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headerBlock(path, more...), EndHeaders: true, EndStream: end})
}

func headerBlock(path string, more ...hpack.HeaderField) []byte {
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: path},
		{Name: ":authority", Value: "x"},
		{Name: "content-type", Value: "application/grpc"},
	}, more...) {
		encoder.WriteField(f)
	}
	return block.Bytes()
}

// wholeCall begins a call and sends an empty message.
func (p *rawPeer) wholeCall(id uint32, path string) error {
	if err := p.call(id, path, false); err != nil {
		return err
	}
	return p.WriteData(id, true, make([]byte, 5))
}

// mustClose fails the test if the service does not close the connection in time.
func (p *rawPeer) mustClose(t *testing.T, within time.Duration, cause string) {
	t.Helper()
	select {
	case <-p.closed:
	case <-time.After(within):
		t.Errorf("%s: the connection after %v: got open; want closed", cause, within)
	}
}

func TestHeaders_TooLargeEndOnlyTheirCall(t *testing.T) {
	atAliyun, release := make(chan struct{}, 1), make(chan struct{})
	var scrape func(string) (int, string)
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), heldSender(atAliyun, release), func(c *server.Config) { scrape = scraped(t, c) })
	sent := make(chan error, 1)
	go func() {
		_, err := r.SendSMS(context.Background(), servertest.SendRequest(servertest.FreshNumber()))
		sent <- err
	}()
	<-atAliyun
	many := metadata.MD{}
	for i := range 300 {
		many.Set(fmt.Sprintf("header-%d", i), strings.Repeat("v", 100))
	}
	tooLarge := []metadata.MD{
		metadata.Pairs("long", strings.Repeat("a", 8193)),
		metadata.Pairs("long", strings.Repeat("a", 20_000)),
		metadata.Pairs("long", strings.Repeat("a", 600_000)), // in many frames
		many,
	}
	for i, md := range tooLarge {
		_, err := r.Valid(metadata.NewOutgoingContext(t.Context(), md), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "1"})
		if got, want := reasonOf(t, err), "ResourceExhausted HEADERS_TOO_LARGE"; got != want {
			t.Errorf("headers %d: got %q; want %q", i, got, want)
		}
	}
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), tooLarge[0]), 1000*time.Hour)
	defer cancel()
	if _, err := r.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18600000000", Code: "1"}); reasonOf(t,
		err) != "ResourceExhausted HEADERS_TOO_LARGE" {
		t.Errorf("with a deadline in weeks: got %v; want RESOURCE_EXHAUSTED", err)
	}
	fits := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("long", strings.Repeat("a", 7<<10)))
	if _, err := r.Valid(fits, &pb.ValidRequest{PhoneNumber: "18600000000", Code: "1"}); err != nil {
		t.Errorf("headers of 7 KiB: got %v; want OK", err)
	}
	close(release)
	if err := <-sent; err != nil {
		t.Errorf("the send in flight: got %v; want OK", err)
	}
	if _, metrics := scrape("/metrics"); !strings.Contains(metrics, fmt.Sprintf(`phonenumber_rejected_total{reason="headers"} %d`, len(tooLarge)+1)) {
		t.Error("the metrics lack the rejected calls")
	}
}

// grpc-go never stops the timer of a call that its tap rejects.
func TestHeaders_TooLargeLeaveNoTimer(t *testing.T) {
	r, _ := startDev(t)
	r.IsValid(t, "18600000000", "1")
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapObjects
	}
	before := heap()
	const calls = 2000
	for range calls / 50 {
		p := dialRaw(t, r.Addr)
		for id := uint32(1); id < 100; id += 2 {
			headers := []hpack.HeaderField{{Name: "grpc-timeout", Value: "99999999H"}, {Name: "long", Value: strings.Repeat("a", 9000)}}
			if err := p.call(id, pb.PhoneNumberService_Valid_FullMethodName, false, headers...); err != nil {
				t.Fatal(err)
			}
		}
		testutil.Eventually(t, "the calls are rejected", func() bool { return p.ended.Load() == 50 })
		p.conn.Close()
	}
	testutil.Eventually(t, "the calls leave nothing on the heap", func() bool { return heap() < before+calls })
}

func TestHeaders_OfMegabytesEndTheConnection(t *testing.T) {
	r, _ := startDev(t)
	p := dialRaw(t, r.Addr)
	block := headerBlock(pb.PhoneNumberService_Valid_FullMethodName)
	err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block})
	for n := 0; err == nil && n < 3<<20; n += 16 << 10 {
		err = p.WriteContinuation(1, false, make([]byte, 16<<10))
	}
	p.mustClose(t, 20*time.Second, "headers of 3 MiB")
}

func TestHeaders_UnfinishedEndTheConnection(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Limits.ConnectionTimeout = time.Second })
	p := dialRaw(t, r.Addr)
	if err := p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headerBlock("/x")}); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for range 50 {
		select {
		case <-tick.C:
			p.WriteContinuation(1, false, nil)
		case <-p.closed:
			return
		}
	}
	t.Error("headers without their last frame, but with a frame each 100 ms: got the connection open after 5s; want it closed after 1s")
}

func TestPing_AtTheIntervalIsAllowedAndAtHalfIsNot(t *testing.T) {
	const interval = 400 * time.Millisecond
	r, _ := startDev(t, func(c *server.Config) { c.Limits.PingInterval = interval })
	pingEvery := func(interval time.Duration, n int) (goAway string) {
		p := dialRaw(t, r.Addr)
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for range n {
			select {
			case <-tick.C:
				if err := p.WritePing(false, [8]byte{}); err != nil {
					t.Fatal(err)
				}
			case goAway = <-p.goAway:
				return goAway
			case <-p.closed:
				t.Fatal("the connection: got closed without a GOAWAY; want a GOAWAY first")
			}
		}
		select {
		case goAway = <-p.goAway:
		case <-time.After(interval):
		}
		return goAway
	}
	if got := pingEvery(interval, 10); got != "" {
		t.Errorf("pings at the interval: got GOAWAY %q; want none", got)
	}
	if got, want := pingEvery(interval/2, 10), "too_many_pings"; got != want {
		t.Errorf("pings at half of the interval: got GOAWAY %q; want %q", got, want)
	}
}

// If the peer never reads its responses, its connection is closed after some seconds.
func TestStreams_UnreadRepliesEndTheConnection(t *testing.T) {
	r, _ := startDev(t)
	p := dialRaw(t, r.Addr, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	if err := p.wholeCall(1, healthpb.Health_Check_FullMethodName); err != nil {
		t.Fatal(err)
	}
	p.mustClose(t, 20*time.Second, "a response without a flow-control window")
	if !r.Log.Contains("reason=unread") {
		t.Error("the log lacks the reason why the connection was closed")
	}
}

// If a peer opens more streams than may wait, its connections are closed. A good client at the
// same time loses no call.
func TestStreams_TooManyWaitingCostAGoodClientNothing(t *testing.T) {
	const limit = 20
	for name, open := range map[string]func(p *rawPeer, id uint32) error{
		"unread replies":           func(p *rawPeer, id uint32) error { return p.wholeCall(id, healthpb.Health_Check_FullMethodName) },
		"health without a message": func(p *rawPeer, id uint32) error { return p.call(id, healthpb.Health_Check_FullMethodName, false) },
		"calls without a message": func(p *rawPeer, id uint32) error {
			return p.call(id, pb.PhoneNumberService_Valid_FullMethodName, false)
		},
		"unknown without a message": func(p *rawPeer, id uint32) error { return p.call(id, "/no.Service/Method", false) },
		"reflection without a message": func(p *rawPeer, id uint32) error {
			return p.call(id, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := startDev(t, func(c *server.Config) { c.Limits.Calls = limit })
			r.IsValid(t, "18600000000", "1")
			for range 4 {
				p := dialRaw(t, r.Addr, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
				for id := uint32(1); id < 2*limit; id += 2 {
					if open(p, id) != nil {
						break // the connection was closed
					}
				}
			}
			for range 50 {
				if _, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); err != nil {
					t.Fatalf("a call of the good client: got %v; want OK", err)
				}
				if _, err := healthpb.NewHealthClient(r.Conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
					t.Fatalf("a health check of the good client: got %v; want OK", err)
				}
			}
		})
	}
}

// A flood of frames that belong to no call closes its connection, and no other.
func TestFrames_FloodEndsTheConnection(t *testing.T) {
	kinds := map[string]func(p *rawPeer, i uint32) error{
		"SETTINGS": func(p *rawPeer, i uint32) error {
			return p.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: i % 2 * 65535})
		},
		"header table size": func(p *rawPeer, i uint32) error {
			return p.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: i % 2 * 4096})
		},
		"PING acks":     func(p *rawPeer, _ uint32) error { return p.WritePing(true, [8]byte{}) },
		"PRIORITY":      func(p *rawPeer, i uint32) error { return p.WritePriority(2*i+1, http2.PriorityParam{}) },
		"WINDOW_UPDATE": func(p *rawPeer, _ uint32) error { return p.WriteWindowUpdate(0, 1) },
		"unknown":       func(p *rawPeer, _ uint32) error { return p.WriteRawFrame(0xfb, 0, 0, nil) },
		"empty DATA": func(p *rawPeer, i uint32) error {
			if i == 0 {
				return p.call(1, pb.PhoneNumberService_Valid_FullMethodName, false)
			}
			return p.WriteData(1, false, nil)
		},
		"empty CONTINUATION": func(p *rawPeer, i uint32) error {
			if i == 0 {
				return p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headerBlock("/x")})
			}
			return p.WriteContinuation(1, false, nil)
		},
		"unknown methods": func(p *rawPeer, i uint32) error { return p.call(2*i+1, "/no.Service/Method", true) },
		"rapid reset": func(p *rawPeer, i uint32) error {
			if err := p.call(2*i+1, pb.PhoneNumberService_Valid_FullMethodName, false); err != nil {
				return err
			}
			return p.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
		},
	}
	for name, write := range kinds {
		t.Run(name, func(t *testing.T) {
			r, _ := startDev(t)
			r.IsValid(t, "18600000000", "1")
			p := dialRaw(t, r.Addr)
			for i := range uint32(100_000) {
				if write(p, i) != nil {
					break
				}
			}
			p.mustClose(t, 20*time.Second, "100,000 frames")
			if !r.Log.Contains("reason=frames") {
				t.Error("the log lacks the reason why the connection was closed")
			}
			r.IsValid(t, "18600000000", "1")
		})
	}
}

// Many calls and canceled calls on one connection are no flood.
func TestFrames_OfManyCallsAreNoFlood(t *testing.T) {
	r, _ := startDev(t)
	conn, err := grpc.NewClient(r.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := pb.NewPhoneNumberServiceClient(conn)
	for i := range 3000 {
		ctx, cancel := context.WithCancel(t.Context())
		if i%5 == 0 {
			time.AfterFunc(200*time.Microsecond, cancel)
		}
		_, err := client.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"})
		cancel()
		if code := status.Code(err); code != codes.OK && code != codes.Canceled {
			t.Fatalf("call %d: got %v; want OK or Canceled", i, err)
		}
	}
	if r.Log.Contains("reason=frames") {
		t.Error("the log: got a connection closed for its calls; want none")
	}
}

// The caller's deadline is none or very long, and the call's message never arrives.
func TestCallTimeout_EndsACallWithoutMessage(t *testing.T) {
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), &dev.Inbox{}, func(c *server.Config) { c.Limits.CallTimeout = 200 * time.Millisecond })
	for _, hours := range []time.Duration{0, 1000} {
		ctx, cancel := context.WithCancel(context.Background())
		if hours > 0 {
			ctx, cancel = context.WithTimeout(ctx, hours*time.Hour)
		}
		defer cancel()
		defer time.AfterFunc(40*time.Second, cancel).Stop()
		stream, err := r.Conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, pb.PhoneNumberService_Valid_FullMethodName)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Header(); err != nil { // sends the request headers
			t.Logf("headers: %v", err)
		}
		if err := stream.RecvMsg(&pb.ValidResponse{}); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("deadline in %d hours (0: none): got %v; want DeadlineExceeded", hours, err)
		}
	}
}

func TestLimits_AreAnnouncedAndEnforced(t *testing.T) {
	r, _ := startDev(t)
	c, err := net.Dial("tcp", r.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, http2.ClientPreface)
	framer := http2.NewFramer(c, c)
	framer.WriteSettings()
	frame, err := framer.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[http2.SettingID]uint32{http2.SettingMaxConcurrentStreams: 128, http2.SettingMaxHeaderListSize: 1 << 20} {
		if got, _ := frame.(*http2.SettingsFrame).Value(id); got != want {
			t.Errorf("%v: got %d; want %d", id, got, want)
		}
	}
	const body = `{"phone_number":"18600000000"}`
	if code, _ := r.Post(t, "SendSMS", body, "X-Long", strings.Repeat("a", 7<<10)); code != 200 {
		t.Errorf("a header of 7 KiB over HTTP/1.1: got %d; want 200", code)
	}
	q, _ := http.NewRequest("POST", "http://"+r.Addr+pb.PhoneNumberService_SendSMS_FullMethodName, strings.NewReader(body))
	q.Header.Set("X-Long", strings.Repeat("a", 13<<10))
	// The server may close the connection before it has read the whole request.
	if res, err := http.DefaultClient.Do(q); err == nil && res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 13 KiB over HTTP/1.1: got %d; want 431", res.StatusCode)
	}
}
