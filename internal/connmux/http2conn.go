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
	// MaxHeaderBytes is the most bytes of headers, decoded, and maxHeaderFields the most fields
	// that a call can have. A call with more ends its connection: grpc-go has to keep up with
	// the compression of headers, and takes about 100 bytes for each field, which can be one
	// byte on the wire.
	MaxHeaderBytes  = 1 << 20
	maxHeaderFields = 1 << 10
	// maxUnfinishedHeaders bounds the headers of all connections that wait for the rest of
	// their bytes.
	maxUnfinishedHeaders = 4 << 20

	// A connection may send maxSpareFrames frames, and framesPerSecond more, beyond the
	// framesPerCall of each call whose handler starts. A call of the usual clients takes
	// three to seven. This bounds rapid reset (CVE-2023-44487) and floods of SETTINGS, PING,
	// PRIORITY, WINDOW_UPDATE, CONTINUATION (CVE-2024-24549) and empty DATA frames.
	maxSpareFrames  = 1000
	framesPerSecond = 20
	framesPerCall   = 20
	// A call that is reset before its handler starts counts as so many more: a peer that
	// resets two of five calls spends as many frames as its other calls earn.
	framesPerEarlyReset = 20
	// Headers that are rejected were decoded; this many bytes of them count as a frame.
	rejectedBytesPerFrame = 1 << 10

	// unreadTimeout is the time that a peer has to read a reply.
	unreadTimeout = 5 * time.Second
	sweepInterval = 250 * time.Millisecond
	// If more streams wait than Config.WaitingStreams, a connection may open one only if none
	// of its own waits, and those are closed whose peer lets a stream wait for crowdedTimeout.
	crowdedTimeout = time.Second
	pauseInterval  = 100 * time.Millisecond
)

const (
	frameHeaderBytes = 9
	maxFrameBytes    = 16 << 10 // of a payload: grpc-go's, and the protocol's default
	readBufferBytes  = 4 << 10
)

var (
	errFrameFlood  = errors.New("http2: more frames than calls")
	errHeaderBlock = errors.New("http2: headers too large or too slow")
)

// http2Conns are the open HTTP/2 connections of the process. It bounds the streams that
// are open on the wire although no handler runs for them: their request message or the
// peer's reading of the reply is missing. grpc-go keeps such a stream with its headers,
// for as long as the peer likes.
type http2Conns struct {
	config     Config
	waiting    atomic.Int64 // streams
	unfinished atomic.Int64 // bytes of header blocks

	crowded chan struct{} // wakes sweep

	mu   sync.Mutex
	open map[*HTTP2Conn]struct{}
}

func newHTTP2Conns(c Config) *http2Conns {
	return &http2Conns{config: c, crowded: make(chan struct{}, 1), open: map[*HTTP2Conn]struct{}{}}
}

func (r *http2Conns) isCrowded() bool { return r.waiting.Load() > int64(r.config.WaitingStreams) }

// Sweep closes the connections that have stalled streams, until ctx ends.
func (d *Mux) Sweep(ctx context.Context) {
	r := d.http2Conns
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-r.crowded:
			time.Sleep(sweepInterval / 10)
		}
		for _, c := range r.stalled(time.Now()) {
			r.config.Rejected("unread")
			go c.Close() // under TLS it can wait for the peer
		}
	}
}

// stalled returns the connections that are to be closed: those with a stream that waits for
// too long, and if too many streams wait, those whose streams have waited most.
func (r *http2Conns) stalled(now time.Time) (stalled []*HTTP2Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	type candidate struct {
		conn    *HTTP2Conn
		waiting int
		waited  time.Duration // the sum of its streams
	}
	var candidates []candidate
	crowded := r.isCrowded()
	for c := range r.open {
		waiting, longest, waited, late := c.waits(now)
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
		if kept += c.waiting; kept > r.config.WaitingStreams {
			stalled = append(stalled, c.conn)
		}
	}
	return stalled
}

// An HTTP2Conn is an HTTP/2 connection that grpc-go serves. It follows the frames of both
// directions, since grpc-go has no hook for the end of a stream on the wire. grpc-go must read
// from it without a buffer of its own: then a call's headers are the last that were
// delivered when the tap is called.
type HTTP2Conn struct {
	net.Conn
	TLS *tls.ConnectionState // nil for plaintext
	all *http2Conns

	// Used only by the goroutine that reads.
	in       *bufio.Reader
	left     int          // undelivered bytes of the current frame
	block    bytes.Buffer // undelivered frames of the current header block
	current  Stream       // of the last header block
	hpack    *hpack.Decoder
	refilled time.Time

	spareFrames atomic.Int64

	// Used only by the goroutine that writes.
	outHeader [frameHeaderBytes]byte
	outFilled int
	outLeft   int // bytes of the current frame's payload

	resume chan struct{} // wakes the reader after fewer streams wait

	mu      sync.Mutex
	closed  bool
	last    uint32
	streams map[uint32]wireStream
	waiting int
}

// A wireStream is a stream that is open on the wire.
type wireStream struct {
	state streamState
	since time.Time
}

type streamState uint8

const (
	streamOpened    streamState = iota // its request is incomplete
	streamRequested                    // its handler does not run yet
	streamRunning                      // its handler runs
	streamEnded                        // its reply is not on the wire yet
)

// add returns the HTTP2Conn for conn that grpc-go serves.
func (r *http2Conns) add(conn net.Conn, state *tls.ConnectionState) *HTTP2Conn {
	c := &HTTP2Conn{
		Conn: conn, TLS: state, all: r, in: bufio.NewReaderSize(conn, readBufferBytes),
		left: len(http2.ClientPreface), refilled: time.Now(), resume: make(chan struct{}, 1), streams: map[uint32]wireStream{},
	}
	c.spareFrames.Store(maxSpareFrames)
	const tableBytes = 4096 // the protocol's default, and grpc-go's
	c.hpack = hpack.NewDecoder(tableBytes, func(f hpack.HeaderField) {
		c.current.HeaderBytes += int(f.Size())
		c.current.fields++
	})
	c.hpack.SetMaxStringLength(MaxHeaderBytes)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open[c] = struct{}{}
	return c
}

// Close implements net.Conn.
func (c *HTTP2Conn) Close() error {
	c.all.mu.Lock()
	delete(c.all.open, c)
	c.all.mu.Unlock()
	c.mu.Lock()
	c.closed, c.streams = true, nil
	c.wait(-c.waiting)
	c.mu.Unlock()
	return c.Conn.Close()
}

// Read implements net.Conn.
func (c *HTTP2Conn) Read(p []byte) (int, error) {
	if c.left == 0 && c.block.Len() == 0 {
		if err := c.nextFrame(); err != nil {
			return 0, err
		}
	}
	if c.block.Len() > 0 {
		n, err := c.block.Read(p)
		if c.block.Len() == 0 && c.block.Cap() > readBufferBytes {
			c.block = bytes.Buffer{} // a connection keeps no large one
		}
		return n, err
	}
	n, err := c.in.Read(p[:min(len(p), c.left)])
	c.left -= n
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

// nextFrame makes the next frame ready for Read.
func (c *HTTP2Conn) nextFrame() error {
	f, err := c.peek()
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
			c.spend(framesPerEarlyReset)
		}
	}
	c.left = frameHeaderBytes + f.length
	return nil
}

// peek returns the header of the next frame, and spends a frame.
func (c *HTTP2Conn) peek() (frameHeader, error) {
	b, err := c.in.Peek(frameHeaderBytes)
	if err != nil {
		return frameHeader{}, err
	}
	if !c.spend(1) {
		c.all.config.Rejected("frames")
		return frameHeader{}, errFrameFlood
	}
	return parseFrameHeader(b), nil
}

// readHeaders reads the frames of a header block, of which f is the first, and measures
// the block before grpc-go keeps it.
func (c *HTTP2Conn) readHeaders(f frameHeader) error {
	c.current = Stream{conn: c, id: f.stream}
	var unfinished int64
	defer func() { c.all.unfinished.Add(-unfinished) }()
	for {
		size := frameHeaderBytes + f.length
		if f.length > maxFrameBytes {
			c.left = size // grpc-go ends the connection
			break
		}
		ended := f.flags.Has(http2.FlagHeadersEndHeaders) // as FlagContinuationEndHeaders
		if !ended || c.in.Buffered() < size {
			unfinished += int64(size)
			if c.all.unfinished.Add(int64(size)) > maxUnfinishedHeaders {
				return c.tooManyHeaders()
			}
			if err := c.SetReadDeadline(time.Now().Add(c.all.config.Timeout)); err != nil {
				return err
			}
		}
		c.block.Grow(size)
		frame := c.block.AvailableBuffer()[:size]
		if _, err := io.ReadFull(c.in, frame); err != nil {
			return fmt.Errorf("%w: %w", errHeaderBlock, err)
		}
		c.block.Write(frame)
		fragment, ok := f.fragment(frame[frameHeaderBytes:])
		if !ok {
			break // grpc-go ends the connection
		}
		if _, err := c.hpack.Write(fragment); err != nil {
			return err
		}
		if c.current.HeaderBytes > MaxHeaderBytes || c.current.fields > maxHeaderFields || c.block.Len() > MaxHeaderBytes {
			return c.tooManyHeaders()
		}
		if ended {
			break
		}
		next, err := c.peek()
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
	c.all.config.Rejected("headers")
	return errHeaderBlock
}

// fragment returns the part of a frame's payload that is of the header block.
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

// spend takes frames from what the connection may send, and reports whether it had them.
func (c *HTTP2Conn) spend(frames int) bool {
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

// opened adds a stream that the peer opens.
func (c *HTTP2Conn) opened(id uint32, whole bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || id <= c.last {
		return // trailers, or an error that ends the connection
	}
	c.last = id
	state := streamOpened
	if whole {
		state = streamRequested
	}
	c.streams[id] = wireStream{state, time.Now()}
	c.wait(1)
}

// requested records that the request of a stream is complete.
func (c *HTTP2Conn) requested(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.streams[id]; ok && s.state == streamOpened {
		c.streams[id] = wireStream{streamRequested, s.since}
	}
}

// pause delays the next stream of a connection that has a waiting one if too many wait in
// the process: backpressure on the peers that cause it.
func (c *HTTP2Conn) pause() {
	for c.all.isCrowded() {
		c.mu.Lock()
		waiting := c.waiting // 0 once it is closed
		c.mu.Unlock()
		if waiting == 0 {
			return
		}
		select {
		case <-c.resume:
		case <-time.After(pauseInterval): // it may be less crowded
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
		c.wait(-1)
	}
	return s, true
}

// A Stream is the stream of one call.
type Stream struct {
	HeaderBytes int // decoded, as RFC 9113, 6.5.2 counts them

	fields int
	conn   *HTTP2Conn
	id     uint32
}

// LastStream returns the stream whose headers were read last. Only the goroutine that reads may
// call it.
func (c *HTTP2Conn) LastStream() Stream { return c.current }

// ChargeHeaders counts the headers of a call that is rejected for their size, as frames.
func (s Stream) ChargeHeaders() { s.conn.spend(s.HeaderBytes / rejectedBytesPerFrame) }

// Earn adds the frames that one call may take.
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

func (c *HTTP2Conn) setState(id uint32, state streamState, waiting int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.streams[id]; ok { // else the peer has reset it
		c.streams[id] = wireStream{state, time.Now()}
		c.wait(waiting)
	}
}

// wait counts streams that wait. It needs c.mu.
func (c *HTTP2Conn) wait(n int) {
	c.waiting += n
	c.all.waiting.Add(int64(n))
	wake := c.all.crowded
	if n < 0 {
		wake = c.resume
	} else if !c.all.isCrowded() {
		return
	}
	select {
	case wake <- struct{}{}:
	default:
	}
}

// waits returns how many streams wait for the peer, for how long the first and all of them
// do, and whether one is late.
func (c *HTTP2Conn) waits(now time.Time) (waiting int, longest, sum time.Duration, late bool) {
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
			limit += c.all.config.RequestTimeout // which ends its handler
		}
		waits := now.Sub(s.since)
		waiting, longest, sum, late = waiting+1, max(longest, waits), sum+waits, late || waits > limit
	}
	return waiting, longest, sum, late
}
