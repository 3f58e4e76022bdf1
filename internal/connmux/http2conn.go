package connmux

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// MaxHeaderBytes limits the size of a call's decoded headers, and maxHeaderFields limits the
	// number of their fields. If a call exceeds one of them, its connection is closed. A single
	// call cannot be rejected: header compression has a state for each connection, so grpc-go
	// must decode all headers, and would take about 100 bytes for each field, which can be one
	// byte on the wire.
	MaxHeaderBytes  = 1 << 20
	maxHeaderFields = 1 << 10
	// maxUnfinishedHeaders limits the bytes of incomplete header blocks, summed over all
	// connections.
	maxUnfinishedHeaders = 4 << 20

	// A connection has a budget of frames (token bucket). It starts with maxSpareFrames. Each
	// frame takes one. Each call whose handler starts adds framesPerCall, and each second adds
	// framesPerSecond. A call of the usual clients takes three to seven frames. If the budget is
	// empty, the connection is closed. This limits rapid reset (CVE-2023-44487) and floods of
	// SETTINGS, PING, PRIORITY, WINDOW_UPDATE, CONTINUATION (CVE-2024-24549) and empty DATA
	// frames.
	maxSpareFrames  = 1000
	framesPerSecond = 20
	framesPerCall   = 20
	// framesPerEarlyReset is the number of additional frames that a call takes if the peer
	// resets it before its handler starts. A peer that resets two of five calls takes as many
	// frames as its other calls add.
	framesPerEarlyReset = 20
	// rejectedBytesPerFrame converts the size of rejected headers to frames, because they cost
	// the time to decode them.
	rejectedBytesPerFrame = 1 << 10

	// unreadTimeout is the time in which a peer must read a reply.
	unreadTimeout = 5 * time.Second
	sweepInterval = 250 * time.Millisecond
	// The process is crowded if more streams wait for their peers than Config.WaitingStreams.
	// Then a connection can open a stream only if none of its streams waits, and connections with
	// a stream that waits for longer than crowdedTimeout can be closed.
	crowdedTimeout = time.Second
	pauseInterval  = 100 * time.Millisecond // between checks if it is still crowded
)

const (
	frameHeaderBytes = 9
	maxFrameBytes    = 16 << 10 // of a payload; default of HTTP/2 and grpc-go
	readBufferBytes  = 4 << 10
)

var (
	errFrameFlood  = errors.New("http2: more frames than calls")
	errHeaderBlock = errors.New("http2: headers too large or too slow")
)

// http2Conns holds the open HTTP/2 connections of the process. It limits the streams that wait:
// they are open on the wire, but no handler runs for them, because the peer has not sent the complete
// request or has not read the complete reply. grpc-go has no time limit for these streams, and keeps
// their headers in memory.
type http2Conns struct {
	config     Config
	waiting    atomic.Int64 // streams that wait
	unfinished atomic.Int64 // bytes of incomplete header blocks

	crowded chan struct{} // wakes Sweep

	mu   sync.Mutex
	open map[*HTTP2Conn]struct{}
}

func newHTTP2Conns(c Config) *http2Conns {
	return &http2Conns{config: c, crowded: make(chan struct{}, 1), open: map[*HTTP2Conn]struct{}{}}
}

func (h *http2Conns) isCrowded() bool { return h.waiting.Load() > int64(h.config.WaitingStreams) }

// Sweep periodically closes the connections whose streams have stalled, until ctx ends.
func (m *Mux) Sweep(ctx context.Context) {
	h := m.http2Conns
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-h.crowded:
			time.Sleep(sweepInterval / 10)
		}
		for _, c := range h.stalled(time.Now()) {
			h.config.Rejected("unread")
			go c.Close() // with TLS, Close can block
		}
	}
}

// stalled returns the connections to close. They are the connections with a late stream, and, if
// the process is crowded, those with the largest sum of waiting times. It keeps the others, up to
// Config.WaitingStreams waiting streams.
func (h *http2Conns) stalled(now time.Time) (stalled []*HTTP2Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	type candidate struct {
		conn    *HTTP2Conn
		waiting int
		waited  time.Duration // sum over its streams
	}
	var candidates []candidate
	crowded := h.isCrowded()
	for c := range h.open {
		waiting, longest, waited, late := c.waitStats(now)
		switch {
		case late:
			stalled = append(stalled, c)
		case crowded && longest > crowdedTimeout:
			candidates = append(candidates, candidate{c, waiting, waited})
		}
	}
	slices.SortFunc(candidates, func(a, b candidate) int { return cmp.Compare(a.waited, b.waited) })
	kept := 0
	for _, c := range candidates {
		if kept += c.waiting; kept > h.config.WaitingStreams {
			stalled = append(stalled, c.conn)
		}
	}
	return stalled
}

// An HTTP2Conn is an HTTP/2 connection that grpc-go serves. It parses the frames of both
// directions, because grpc-go has no hook for the end of a stream on the wire. grpc-go must read
// from it without a buffer (grpc.ReadBufferSize(0)). Then, when grpc-go calls the tap (its hook
// for the start of a call), LastStream returns the stream of this call.
type HTTP2Conn struct {
	net.Conn
	TLS   *tls.ConnectionState // nil for plaintext
	conns *http2Conns

	// Used only by the goroutine that reads.
	in          *bufio.Reader
	unread      int          // bytes of the current frame not read
	headerBlock bytes.Buffer // frames of a header block not read
	current     Stream       // of the last header block
	hpack       *hpack.Decoder
	refilled    time.Time // when time last added frames

	spareFrames atomic.Int64 // see maxSpareFrames

	// Used only by the goroutine that writes.
	outHeader [frameHeaderBytes]byte
	outFilled int // bytes in outHeader
	outLeft   int // payload bytes still to write

	resume chan struct{} // wakes pause if fewer streams wait

	mu      sync.Mutex
	closed  bool
	lastID  uint32 // ID of the newest stream
	streams map[uint32]wireStream
	waiting int // streams whose handler does not run
}

// A wireStream is a stream that is open on the wire.
type wireStream struct {
	state streamState
	since time.Time // when its present wait began
}

type streamState uint8

const (
	streamOpened    streamState = iota // the request is incomplete
	streamRequested                    // complete; the handler has not started
	streamRunning                      // the handler runs
	streamEnded                        // the handler ended; the reply is incomplete
)

// add wraps conn in an HTTP2Conn for grpc-go, and adds it to the open connections.
func (h *http2Conns) add(conn net.Conn, state *tls.ConnectionState) *HTTP2Conn {
	c := &HTTP2Conn{
		Conn: conn, TLS: state, conns: h, in: bufio.NewReaderSize(conn, readBufferBytes),
		unread: len(http2.ClientPreface), refilled: time.Now(), resume: make(chan struct{}, 1), streams: map[uint32]wireStream{},
	}
	c.spareFrames.Store(maxSpareFrames)
	const tableBytes = 4096 // default of HTTP/2 and grpc-go
	c.hpack = hpack.NewDecoder(tableBytes, func(f hpack.HeaderField) {
		c.current.HeaderBytes += int(f.Size())
		c.current.fields++
	})
	c.hpack.SetMaxStringLength(MaxHeaderBytes)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.open[c] = struct{}{}
	return c
}

// Close implements net.Conn.
func (c *HTTP2Conn) Close() error {
	c.conns.mu.Lock()
	delete(c.conns.open, c)
	c.conns.mu.Unlock()
	c.mu.Lock()
	c.closed, c.streams = true, nil
	c.addWaiting(-c.waiting)
	c.mu.Unlock()
	return c.Conn.Close()
}

// Read implements net.Conn.
func (c *HTTP2Conn) Read(p []byte) (int, error) {
	if c.unread == 0 && c.headerBlock.Len() == 0 {
		if err := c.nextFrame(); err != nil {
			return 0, err
		}
	}
	if c.headerBlock.Len() > 0 {
		n, err := c.headerBlock.Read(p)
		if c.headerBlock.Len() == 0 && c.headerBlock.Cap() > readBufferBytes {
			c.headerBlock = bytes.Buffer{} // free a large buffer
		}
		return n, err
	}
	n, err := c.in.Read(p[:min(len(p), c.unread)])
	c.unread -= n
	return n, err
}

// A frameHeader is the first nine bytes of a frame.
type frameHeader struct {
	length int
	kind   http2.FrameType
	flags  http2.Flags
	stream uint32
}

func parseFrameHeader(b []byte) frameHeader {
	return frameHeader{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]), kind: http2.FrameType(b[3]), flags: http2.Flags(b[4]),
		stream: uint32(b[5]&0x7f)<<24 | uint32(b[6])<<16 | uint32(b[7])<<8 | uint32(b[8]),
	}
}

// nextFrame handles the header of the next frame, or reads a complete header block. Then Read can
// return its bytes.
func (c *HTTP2Conn) nextFrame() error {
	f, err := c.peekFrame()
	if err != nil {
		return err
	}
	switch f.kind {
	case http2.FrameHeaders:
		c.pause()
		c.opened(f.stream, f.flags.Has(http2.FlagHeadersEndStream))
		return c.readHeaders(f)
	case http2.FrameData:
		if f.flags.Has(http2.FlagDataEndStream) {
			c.requested(f.stream)
		}
	case http2.FrameRSTStream:
		if s, ok := c.offWire(f.stream); ok && s.state < streamRunning {
			c.takeFrames(framesPerEarlyReset)
		}
	}
	c.unread = frameHeaderBytes + f.length
	return nil
}

// peekFrame returns the header of the next frame without reading it, and takes one frame from the
// budget.
func (c *HTTP2Conn) peekFrame() (frameHeader, error) {
	b, err := c.in.Peek(frameHeaderBytes)
	if err != nil {
		return frameHeader{}, err
	}
	if !c.takeFrames(1) {
		c.conns.config.Rejected("frames")
		return frameHeader{}, errFrameFlood
	}
	return parseFrameHeader(b), nil
}

// readHeaders reads the frames of a header block into c.headerBlock, and checks its size before grpc-go
// reads it. The block is a HEADERS frame, whose header is f, and its CONTINUATION frames.
func (c *HTTP2Conn) readHeaders(f frameHeader) error {
	c.current = Stream{conn: c, id: f.stream}
	var unfinished int64
	defer func() { c.conns.unfinished.Add(-unfinished) }()
	for {
		size := frameHeaderBytes + f.length
		if f.length > maxFrameBytes {
			c.unread = size // grpc-go ends the connection
			break
		}
		ended := f.flags.Has(http2.FlagHeadersEndHeaders) // equals FlagContinuationEndHeaders
		if !ended || c.in.Buffered() < size {
			unfinished += int64(size)
			if c.conns.unfinished.Add(int64(size)) > maxUnfinishedHeaders {
				return c.tooManyHeaders()
			}
			if err := c.SetReadDeadline(time.Now().Add(c.conns.config.Timeout)); err != nil {
				return err
			}
		}
		c.headerBlock.Grow(size)
		frame := c.headerBlock.AvailableBuffer()[:size]
		if _, err := io.ReadFull(c.in, frame); err != nil {
			return fmt.Errorf("%w: %w", errHeaderBlock, err)
		}
		c.headerBlock.Write(frame)
		fragment, ok := f.fragment(frame[frameHeaderBytes:])
		if !ok {
			break // grpc-go ends the connection
		}
		if _, err := c.hpack.Write(fragment); err != nil {
			return err
		}
		if c.current.HeaderBytes > MaxHeaderBytes || c.current.fields > maxHeaderFields || c.headerBlock.Len() > MaxHeaderBytes {
			return c.tooManyHeaders()
		}
		if ended {
			break
		}
		next, err := c.peekFrame()
		if err != nil {
			return err
		}
		if next.kind != http2.FrameContinuation || next.stream != f.stream {
			break // grpc-go ends the connection
		}
		f = next
	}
	if err := c.hpack.Close(); err != nil {
		return err
	}
	if unfinished == 0 {
		return nil
	}
	return c.SetReadDeadline(time.Time{})
}

func (c *HTTP2Conn) tooManyHeaders() error {
	c.conns.config.Rejected("headers")
	return errHeaderBlock
}

// fragment returns the part of a frame's payload that belongs to the header block, without padding
// and priority. It returns false if the payload is malformed.
func (f frameHeader) fragment(payload []byte) ([]byte, bool) {
	if f.kind != http2.FrameHeaders {
		return payload, true
	}
	padding := 0
	if f.flags.Has(http2.FlagHeadersPadded) {
		if len(payload) == 0 {
			return nil, false
		}
		padding, payload = int(payload[0]), payload[1:]
	}
	const priorityBytes = 5
	if f.flags.Has(http2.FlagHeadersPriority) {
		if len(payload) < priorityBytes {
			return nil, false
		}
		payload = payload[priorityBytes:]
	}
	if padding > len(payload) {
		return nil, false
	}
	return payload[:len(payload)-padding], true
}

// takeFrames takes frames from the budget of the connection (see maxSpareFrames), and reports whether
// the budget had that many.
func (c *HTTP2Conn) takeFrames(frames int) bool {
	if c.spareFrames.Add(-int64(frames)) >= 0 {
		return true
	}
	now := time.Now()
	refill := min(int64(now.Sub(c.refilled).Seconds()*framesPerSecond), maxSpareFrames)
	if refill > 0 {
		c.refilled = now
	}
	return c.spareFrames.Add(refill) >= 0
}

// Write implements net.Conn.
func (c *HTTP2Conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	for b := p[:n]; len(b) > 0; {
		if c.outLeft > 0 {
			skipped := min(c.outLeft, len(b))
			c.outLeft, b = c.outLeft-skipped, b[skipped:]
			continue
		}
		copied := copy(c.outHeader[c.outFilled:], b)
		c.outFilled, b = c.outFilled+copied, b[copied:]
		if c.outFilled < frameHeaderBytes {
			continue
		}
		f := parseFrameHeader(c.outHeader[:])
		c.outFilled, c.outLeft = 0, f.length
		if f.kind == http2.FrameRSTStream ||
			(f.kind == http2.FrameHeaders || f.kind == http2.FrameData) && f.flags.Has(http2.FlagHeadersEndStream) {
			c.offWire(f.stream)
		}
	}
	return n, err
}

// opened adds a stream that the peer opens. complete is true if its request has no message, so that
// the request is complete.
func (c *HTTP2Conn) opened(id uint32, complete bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || id <= c.lastID {
		return // trailers, or an error for grpc-go
	}
	c.lastID = id
	state := streamOpened
	if complete {
		state = streamRequested
	}
	c.streams[id] = wireStream{state, time.Now()}
	c.addWaiting(1)
}

// requested records that the request of a stream is complete.
func (c *HTTP2Conn) requested(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.streams[id]; ok && s.state == streamOpened {
		c.streams[id] = wireStream{streamRequested, s.since}
	}
}

// pause blocks the reader before a new stream, while the process is crowded and a stream of this
// connection waits. This is backpressure on the peers that cause the crowding.
func (c *HTTP2Conn) pause() {
	for c.conns.isCrowded() {
		c.mu.Lock()
		waiting := c.waiting // 0 once it is closed
		c.mu.Unlock()
		if waiting == 0 {
			return
		}
		select {
		case <-c.resume:
		case <-time.After(pauseInterval): // streams of other connections may end
		}
	}
}

// offWire removes a stream that either side has ended, and returns its last state.
func (c *HTTP2Conn) offWire(id uint32) (s wireStream, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok = c.streams[id]; !ok {
		return s, false
	}
	delete(c.streams, id)
	if s.state != streamRunning {
		c.addWaiting(-1)
	}
	return s, true
}

// A Stream is the HTTP/2 stream of one call.
type Stream struct {
	HeaderBytes int // decoded size; see RFC 9113, 6.5.2

	fields int
	conn   *HTTP2Conn
	id     uint32
}

// LastStream returns the stream of the last header block that was read. Only the goroutine
// that reads may call it.
func (c *HTTP2Conn) LastStream() Stream { return c.current }

// ChargeHeaders takes frames from the budget of the connection for a call that is rejected because
// its headers are too large.
func (s Stream) ChargeHeaders() { s.conn.takeFrames(s.HeaderBytes / rejectedBytesPerFrame) }

// Earn adds the frames of one call to the budget of the connection.
func (s Stream) Earn() {
	if s.conn.spareFrames.Load() < maxSpareFrames {
		s.conn.spareFrames.Add(framesPerCall)
	}
}

// Start records that the handler of the stream starts.
func (s Stream) Start() {
	s.Earn()
	s.conn.setState(s.id, streamRunning, -1)
}

// End records that the handler of the stream has ended.
func (s Stream) End() { s.conn.setState(s.id, streamEnded, 1) }

// setState changes the state of a stream, and adds waiting to the number of waiting streams.
func (c *HTTP2Conn) setState(id uint32, state streamState, waiting int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.streams[id]; ok { // otherwise the peer has reset it
		c.streams[id] = wireStream{state, time.Now()}
		c.addWaiting(waiting)
	}
}

// addWaiting adds n, which can be negative, to the number of waiting streams of the connection and of
// the process. It wakes Sweep if the process is crowded, and pause if n is negative. The calling
// function must hold c.mu.
func (c *HTTP2Conn) addWaiting(n int) {
	c.waiting += n
	c.conns.waiting.Add(int64(n))
	wake := c.conns.crowded
	if n < 0 {
		wake = c.resume
	} else if !c.conns.isCrowded() {
		return
	}
	select {
	case wake <- struct{}{}:
	default:
	}
}

// waitStats returns the number of streams that wait for the peer, the longest waiting time, the sum of
// all waiting times, and whether a stream is late. A stream is late if it has waited for longer than
// unreadTimeout. While its request is incomplete, the limit is larger by Config.RequestTimeout.
func (c *HTTP2Conn) waitStats(now time.Time) (waiting int, longest, sum time.Duration, late bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting == 0 {
		return 0, 0, 0, false
	}
	for _, s := range c.streams {
		limit := unreadTimeout
		switch s.state {
		case streamRequested, streamRunning:
			continue
		case streamOpened:
			limit += c.conns.config.RequestTimeout // first the server ends it
		}
		waits := now.Sub(s.since)
		waiting, longest, sum, late = waiting+1, max(longest, waits), sum+waits, late || waits > limit
	}
	return waiting, longest, sum, late
}
