package connmux

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A slowService responds to Valid after at most 2 ms, and never to SendSMS.
type slowService struct {
	pb.UnimplementedPhoneNumberServiceServer
}

func (slowService) Valid(context.Context, *pb.ValidRequest) (*pb.ValidResponse, error) {
	time.Sleep(time.Duration(rand.N(int64(2 * time.Millisecond))))
	return &pb.ValidResponse{}, nil
}

func (slowService) SendSMS(ctx context.Context, _ *pb.SendSMSRequest) (*pb.Empty, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// connCreds passes an HTTP2Conn to the tap.
type connCreds struct {
	credentials.TransportCredentials
}

func (connCreds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return c, c.(*HTTP2Conn), nil
}

func (c connCreds) Clone() credentials.TransportCredentials { return c }

type streamKey struct{}

func tapStream(ctx context.Context, _ *tap.Info) (context.Context, error) {
	p, _ := peer.FromContext(ctx)
	return context.WithValue(ctx, streamKey{}, p.AuthInfo.(*HTTP2Conn).LastStream), nil
}

func startUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	s := ctx.Value(streamKey{}).(Stream)
	s.Start()
	defer s.End()
	return handler(ctx, req)
}

func startStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	s := ss.Context().Value(streamKey{}).(Stream)
	s.Start()
	defer s.End()
	return handler(srv, ss)
}

// Calls of every kind end in every way. Afterwards no stream and no byte is counted any more,
// and the connections are open.
func TestHTTP2Conns_CountNoStreamTwice(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	config := testConfig
	config.Listener = listener
	mux := New(config)
	conns := mux.http2Conns
	s := grpc.NewServer(grpc.ReadBufferSize(0), grpc.InTapHandle(tapStream), grpc.UnaryInterceptor(startUnary),
		grpc.StreamInterceptor(startStream), grpc.Creds(connCreds{insecure.NewCredentials()}))
	pb.RegisterPhoneNumberServiceServer(s, slowService{})
	healthpb.RegisterHealthServer(s, health.NewServer())
	go mux.Serve()
	go s.Serve(mux.HTTP2)
	defer s.Stop()
	defer listener.Close()

	var calling sync.WaitGroup
	for range 4 {
		conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		client, healthClient := pb.NewPhoneNumberServiceClient(conn), healthpb.NewHealthClient(conn)
		calls := []func(ctx context.Context){
			func(ctx context.Context) { client.Valid(ctx, &pb.ValidRequest{}) },
			func(ctx context.Context) { client.SendSMS(ctx, &pb.SendSMSRequest{}) },
			func(ctx context.Context) { healthClient.Check(ctx, &healthpb.HealthCheckRequest{}) },
			func(ctx context.Context) { healthClient.Check(ctx, &healthpb.HealthCheckRequest{Service: "none"}) },
			func(ctx context.Context) { conn.Invoke(ctx, "/no.Service/Method", &pb.Empty{}, &pb.Empty{}) },
			func(ctx context.Context) {
				if watch, err := healthClient.Watch(ctx, &healthpb.HealthCheckRequest{}); err == nil {
					for err == nil {
						_, err = watch.Recv()
					}
				}
			},
			func(ctx context.Context) { // without a message
				if half, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, pb.PhoneNumberService_Valid_FullMethodName); err == nil {
					half.RecvMsg(&pb.ValidResponse{})
				}
			},
		}
		for range 16 {
			calling.Go(func() {
				for i := range 40 {
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.N(int64(20*time.Millisecond))))
					if i%3 == 0 {
						time.AfterFunc(time.Duration(rand.N(int64(2*time.Millisecond))), cancel)
					}
					calls[rand.N(len(calls))](ctx)
					cancel()
				}
			})
		}
	}
	calling.Wait()
	counted := func() (waiting int64, streams, open int) {
		conns.mu.Lock()
		defer conns.mu.Unlock()
		for c := range conns.open {
			c.mu.Lock()
			streams += len(c.streams)
			c.mu.Unlock()
		}
		return conns.waiting.Load(), streams, len(conns.open)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		waiting, streams, open := counted()
		if waiting == 0 && streams == 0 && open == 4 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("counted: got %d waiting of %d streams on %d connections; want 0 of 0 on 4", waiting, streams, open)
		}
	}
	if bytes := conns.unfinished.Load(); bytes != 0 {
		t.Errorf("bytes of unfinished headers: got %d; want 0", bytes)
	}
}

// A writerConn is a connection to a buffer.
type writerConn struct {
	net.Conn
	bytes.Buffer
}

func (c *writerConn) Write(p []byte) (int, error) { return c.Buffer.Write(p) }
func (c *writerConn) Read(p []byte) (int, error)  { return c.Buffer.Read(p) }
func (c *writerConn) Close() error                { return nil }
func (c *writerConn) RemoteAddr() net.Addr        { return &net.TCPAddr{} }

// The server's frames arrive in pieces of each size. Streams 1, 5 and 7 end; 3 and 9 do not.
func TestHTTP2Conn_FindsTheEndOfStreamsInPieces(t *testing.T) {
	var frames bytes.Buffer
	framer := http2.NewFramer(&frames, nil)
	write := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	write(framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte("reply"), EndHeaders: true}))
	write(framer.WriteData(1, false, make([]byte, 100)))
	write(framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte("trailers"), EndHeaders: true, EndStream: true}))
	write(framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: []byte("reply"), EndHeaders: true}))
	write(framer.WriteData(5, true, nil))
	write(framer.WritePing(true, [8]byte{1, 2, 3}))
	write(framer.WriteRSTStream(7, http2.ErrCodeNo))
	for size := 1; size <= 40; size++ {
		conns := newHTTP2Conns(testConfig)
		c := conns.add(&writerConn{}, nil)
		for _, id := range []uint32{1, 3, 5, 7, 9} {
			c.opened(id, true)
			c.setState(id, streamEnded)
		}
		for rest := frames.Bytes(); len(rest) > 0; {
			n, err := c.Write(rest[:min(size, len(rest))])
			write(err)
			rest = rest[n:]
		}
		if len(c.streams) != 2 || c.streams[3].since.IsZero() || c.streams[9].since.IsZero() || conns.waiting.Load() != 2 {
			t.Errorf("pieces of %d bytes: got the streams %v, %d waiting; want 3 and 9, 2 waiting", size, c.streams, conns.waiting.Load())
		}
		if got := c.ended.Load(); got != 2 {
			t.Errorf("pieces of %d bytes: got %d calls with a complete reply; want 2, without the reset one", size, got)
		}
	}
}

// The handler of a streaming call runs before its request is complete. It must not count as waiting.
func TestHTTP2Conn_RunningStreamDoesNotWait(t *testing.T) {
	conns := newHTTP2Conns(testConfig)
	c := conns.add(&writerConn{}, nil)
	c.opened(1, false)
	c.setState(1, streamRunning)
	c.setState(1, streamRequested)
	if got := conns.waiting.Load(); got != 0 {
		t.Errorf("waiting streams: got %d; want 0", got)
	}
}

// saturate opens streams, each on a connection of its own. They have waited for long enough to be closed.
func saturate(conns *http2Conns, streams int) {
	for range streams {
		c := conns.add(&writerConn{}, nil)
		c.opened(1, false)
		c.streams[1] = wireStream{streamOpened, time.Now().Add(-2 * saturatedTimeout)}
	}
}

// Some streams of a good client wait too, because this process is slow, but its earlier calls have ended.
func TestStalled_KeepsTheConnectionWhoseCallsEnded(t *testing.T) {
	conns := newHTTP2Conns(testConfig)
	saturate(conns, testConfig.WaitingStreams+1)
	good := conns.add(&writerConn{}, nil)
	framer := http2.NewFramer(good, nil)
	for id := uint32(1); id < 200; id += 2 {
		good.opened(id, true)
		good.setState(id, streamEnded)
		if err := framer.WriteData(id, true, nil); err != nil {
			t.Fatal(err)
		}
	}
	for id := uint32(201); id < 221; id += 2 {
		good.opened(id, false)
		good.streams[id] = wireStream{streamOpened, time.Now().Add(-2 * saturatedTimeout)}
	}
	got := conns.stalled(time.Now())
	if slices.Contains(got, good) {
		t.Error("got the good client's connection to close; want it kept")
	}
	if kept := len(conns.open) - len(got); kept > conns.config.WaitingStreams/2 {
		t.Errorf("got %d connections kept, each with a waiting stream; want %d at most", kept, conns.config.WaitingStreams/2)
	}
}

// Two connections made many cheap calls, and then opened as many streams as stalled keeps. They are closed
// before the connection of a good client that made a few calls.
func TestStalled_LimitsTheWeightOfEndedCalls(t *testing.T) {
	conns := newHTTP2Conns(testConfig)
	saturate(conns, testConfig.WaitingStreams)
	add := func(streams int, ended int64) *HTTP2Conn {
		c := conns.add(&writerConn{}, nil)
		c.ended.Store(ended)
		for id := range uint32(streams) {
			c.opened(2*id+1, false)
			c.streams[2*id+1] = wireStream{streamOpened, time.Now().Add(-2 * saturatedTimeout)}
		}
		return c
	}
	good := add(1, maxExtraStreams)
	for range 2 {
		add(testConfig.WaitingStreams/4, 1_000_000)
	}
	if slices.Contains(conns.stalled(time.Now()), good) {
		t.Error("got the good client's connection to close; want it kept")
	}
}

// A client sends the headers of several calls before their messages. If the process is saturated, the
// messages must still be read from a client whose calls have ended, and not from another. If twice as many
// streams wait, they are read from none.
func TestPause_LimitsWaitingStreamsToEndedCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct {
			others int // connections with a waiting stream
			ended  int64
			want   int // streams that are opened
		}{
			{testConfig.WaitingStreams + 1, 0, 1},
			{testConfig.WaitingStreams + 1, 1, 2},
			{testConfig.WaitingStreams + 1, 3, 4},
			{testConfig.WaitingStreams + 1, 100, 9},
			{2 * testConfig.WaitingStreams, 100, 1},
		} {
			conns := newHTTP2Conns(testConfig)
			saturate(conns, c.others)
			w := &writerConn{}
			io.WriteString(w, http2.ClientPreface)
			framer := http2.NewFramer(w, nil)
			for id := uint32(1); id < 41; id += 2 {
				if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true}); err != nil {
					t.Fatal(err)
				}
			}
			conn := conns.add(w, nil)
			conn.ended.Store(c.ended)
			go io.Copy(io.Discard, conn)
			synctest.Wait()
			if got := len(conn.streams); got != c.want {
				t.Errorf("%d calls ended, %d other streams wait: got %d streams; want %d", c.ended, c.others, got, c.want)
			}
			conn.Close()
			synctest.Wait()
		}
	})
}

// A reset before the handler starts costs more frames than a reset of a running call.
func TestHTTP2Conn_ChargesEarlyResets(t *testing.T) {
	for state, want := range map[streamState]int64{
		streamOpened: 1 + framesPerEarlyReset, streamRequested: 1 + framesPerEarlyReset, streamRunning: 1, streamClosed: 1,
	} {
		w := &writerConn{}
		io.WriteString(w, http2.ClientPreface)
		if err := http2.NewFramer(w, nil).WriteRSTStream(1, http2.ErrCodeCancel); err != nil {
			t.Fatal(err)
		}
		c := newHTTP2Conns(testConfig).add(w, nil)
		c.opened(1, false)
		c.setState(1, state)
		if _, err := io.ReadAll(c); err != nil {
			t.Fatal(err)
		}
		if got := maxSpareFrames - c.spareFrames.Load(); got != want {
			t.Errorf("frames for a reset in state %d: got %d; want %d", state, got, want)
		}
	}
}

// FuzzHTTP2Conn_Read reads any bytes as grpc-go does. The bytes must be unchanged, and no stream
// may be counted after the end.
func FuzzHTTP2Conn_Read(f *testing.F) {
	var frames bytes.Buffer
	framer := http2.NewFramer(&frames, nil)
	framer.WriteSettings()
	framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte("some")})
	framer.WriteContinuation(1, false, []byte("more"))
	framer.WriteContinuation(1, true, []byte("end"))
	framer.WriteData(1, true, []byte("data"))
	framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: []byte("some")})
	framer.WritePing(false, [8]byte{})
	framer.WriteRSTStream(3, http2.ErrCodeCancel)
	f.Add(frames.Bytes(), uint8(9))
	f.Add([]byte("\x00\x00\x04\x01\x00\x00\x00\x00\x01"), uint8(1))
	f.Fuzz(func(t *testing.T, in []byte, size uint8) {
		in = append([]byte(http2.ClientPreface), in...)
		local, remote := net.Pipe()
		go func() {
			remote.Write(in)
			remote.Close()
		}()
		conns := newHTTP2Conns(testConfig)
		c := conns.add(local, nil)
		var got []byte
		var err error
		for p := make([]byte, int(size)+1); err == nil; {
			var n int
			n, err = c.Read(p)
			got = append(got, p[:n]...)
		}
		c.Close()
		io.Copy(io.Discard, local)
		if !bytes.HasPrefix(in, got) {
			t.Errorf("read: got %q; want a prefix of %q", got, in)
		}
		if conns.waiting.Load() != 0 || conns.unfinished.Load() != 0 {
			t.Errorf("after the end: got %d waiting streams and %d unfinished bytes; want 0 and 0", conns.waiting.Load(), conns.unfinished.Load())
		}
	})
}
