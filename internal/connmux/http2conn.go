package connmux

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
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
	// number of their fields (HPACK bomb). If a call exceeds a limit, its connection is closed. A
	// rejection of only the call would not protect memory: header compression has a state for each
	// connection, so grpc-go must first decode all headers. It takes about 100 bytes of memory for each
	// field, and a field can be one byte on the wire. Above Limits.HeaderBytes, package server rejects
	// only the call.
	MaxHeaderBytes  = 1 << 20
	maxHeaderFields = 1 << 10
	// maxUnfinishedHeaders limits the bytes of incomplete header blocks of all connections together.
	maxUnfinishedHeaders = 4 << 20

	// maxSpareFrames is the size of the budget of frames that each connection has (token bucket). The
	// budget is full at the start. Each frame takes one. Each call adds framesPerCall when its handler
	// starts, or when it is rejected for its headers. Each second adds framesPerSecond. A call of the
	// usual clients takes three to seven frames. If the budget is empty, the connection is closed. This
	// limits rapid reset (CVE-2023-44487) and floods of SETTINGS, PING, PRIORITY, WINDOW_UPDATE,
	// CONTINUATION (CVE-2024-24549) and empty DATA frames.
	maxSpareFrames  = 1000
	framesPerSecond = 20
	framesPerCall   = 20
	// framesPerEarlyReset is the number of additional frames that a call takes if the peer
	// resets it before its handler starts. A peer that resets two of five calls takes as many
	// frames as its other calls add.
	framesPerEarlyReset = 20
	// rejectedBytesPerFrame converts the size of rejected headers to frames, because grpc-go has
	// already spent the time to decode these headers.
	rejectedBytesPerFrame = 1 << 10

	// unreadTimeout is the time in which a peer must read a reply.
	unreadTimeout = 5 * time.Second
	sweepInterval = 250 * time.Millisecond
	// saturatedTimeout is the time for which a stream may wait for its peer while the process is
	// saturated. After it, Sweep can close the connection of the stream. The process is saturated if more
	// streams wait than Config.WaitingStreams. Then pause lets a connection open a stream only if none of
	// its streams waits. A client may send the headers of several calls before the first message. Then
	// pause would block this message too. So one more stream may wait for each call that ended, up to
	// maxExtraStreams. A call that ended is no proof of a good client, because health checks are cheap. So
	// this holds only while at most twice Config.WaitingStreams wait in the process.
	saturatedTimeout = time.Second
	maxExtraStreams  = 8
	pauseInterval    = 100 * time.Millisecond // between checks whether it is still saturated
)

const (
	frameHeaderBytes = 9
	maxFrameBytes    = 16 << 10 // of a payload; default of HTTP/2 and grpc-go
	hpackTableBytes  = 4 << 10  // the same
	readBufferBytes  = 4 << 10
)

// http2Conns holds the open HTTP/2 connections of the process. It limits the streams that wait. A
// stream waits if it is open on the wire and its handler does not run. The usual reason is that the peer
// has not sent the complete request, or has not read the complete reply. grpc-go keeps the headers of
// these streams in memory. It has no time limit for a reply that is not read. For an incomplete request
// it has only the deadline that package server sets.
type http2Conns struct {
	config     Config
	waiting    atomic.Int64 // streams that wait
	unfinished atomic.Int64 // bytes of incomplete header blocks
	wakeSweep  chan struct{}

	mu   sync.Mutex
	open map[*HTTP2Conn]struct{}
}

func newHTTP2Conns(c Config) *http2Conns {
	return &http2Conns{config: c, wakeSweep: make(chan struct{}, 1), open: map[*HTTP2Conn]struct{}{}}
}

func (h *http2Conns) isSaturated() bool { return h.waiting.Load() > int64(h.config.WaitingStreams) }

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
		case <-h.wakeSweep:
			time.Sleep(sweepInterval / 10) // limits the rate of sweeps
		}
		for _, c := range h.stalled(time.Now()) {
			h.config.Rejected("unread")
			go c.Close() // with TLS, Close can block
		}
	}
}

// stalled returns the connections to close: the connections with a late stream. If the process is
// saturated, the connections with a stream that has waited for its peer for longer than saturatedTimeout
// are candidates too. stalled keeps the candidates with the smallest peerWait.score, up to a total of
// half of Config.WaitingStreams streams that wait for a peer, so that the process is usually no longer
// saturated. It returns the other candidates.
func (h *http2Conns) stalled(now time.Time) (stalled []*HTTP2Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var candidates []peerWait
	saturated := h.isSaturated()
	for c := range h.open {
		switch w := c.peerWait(now); {
		case w.late:
			stalled = append(stalled, c)
		case saturated && w.longest > saturatedTimeout:
			candidates = append(candidates, w)
		}
	}
	slices.SortFunc(candidates, func(a, b peerWait) int { return cmp.Compare(a.score, b.score) })
	kept := 0
	for _, w := range candidates {
		if kept+w.streams > h.config.WaitingStreams/2 {
			stalled = append(stalled, w.conn)
			continue
		}
		kept += w.streams
	}
	return stalled
}

// An HTTP2Conn is an HTTP/2 connection that grpc-go serves. It parses the frames of both
// directions, because grpc-go has no hook for the end of a stream on the wire. grpc-go must read
// from it without a buffer (grpc.ReadBufferSize(0)). Then, when grpc-go calls the tap (its hook
// for the start of a call), LastStream is the stream of this call.
type HTTP2Conn struct {
	net.Conn
	Peer  string               // address without the port
	TLS   *tls.ConnectionState // nil for plaintext
	conns *http2Conns

	// Used only by the goroutine that calls Read.
	LastStream  Stream // of the last header block that was read
	in          *bufio.Reader
	inLeft      int          // bytes of the preface or of a frame, still to return
	headerBlock bytes.Buffer // frames of a header block, still to return
	hpack       *hpack.Decoder
	refilled    time.Time // when takeFrames last added the frames of framesPerSecond

	spareFrames atomic.Int64 // see maxSpareFrames

	// Used only by the goroutine that calls Write.
	outHeader [frameHeaderBytes]byte
	outFilled int // bytes in outHeader
	outLeft   int // payload bytes still to write

	resume chan struct{} // wakes pause if fewer streams wait

	mu      sync.Mutex
	lastID  uint32                // ID of the newest stream
	streams map[uint32]wireStream // nil after Close

	waiting atomic.Int64 // streams that wait
	ended   atomic.Int64 // calls whose handler ran and whose reply was written completely
}

// AuthType implements grpc's credentials.AuthInfo, so that grpc-go passes the connection to its tap.
func (c *HTTP2Conn) AuthType() string { return "HTTP2Conn" }

// A wireStream is a stream that is open on the wire.
type wireStream struct {
	state streamState
	since time.Time // when the state began
}

type streamState uint8

const (
	streamOpened    streamState = iota // the request is incomplete
	streamRequested                    // the request is complete; the handler has not started
	streamRunning                      // the handler runs
	streamEnded                        // the handler ended; the reply is incomplete
	streamClosed                       // the peer has reset it, or grpc-go has written its last frame
)

// waiting returns 1 if a stream in this state waits, otherwise 0.
func (s streamState) waiting() int64 {
	if s == streamRunning || s == streamClosed {
		return 0
	}
	return 1
}

// add wraps conn in an HTTP2Conn for grpc-go, and adds it to the open connections.
func (h *http2Conns) add(conn net.Conn, state *tls.ConnectionState) *HTTP2Conn {
	peer, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
	c := &HTTP2Conn{
		Conn: conn, Peer: peer, TLS: state, conns: h, in: bufio.NewReaderSize(conn, readBufferBytes),
		inLeft: len(http2.ClientPreface), refilled: time.Now(), resume: make(chan struct{}, 1), streams: map[uint32]wireStream{},
	}
	c.spareFrames.Store(maxSpareFrames)
	c.hpack = hpack.NewDecoder(hpackTableBytes, func(f hpack.HeaderField) {
		c.LastStream.HeaderBytes += int(f.Size())
		c.LastStream.fields++
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
	c.streams = nil
	c.addWaiting(-c.waiting.Load())
	c.mu.Unlock()
	return c.Conn.Close()
}

// Read implements net.Conn. It parses the frames of the peer.
func (c *HTTP2Conn) Read(p []byte) (int, error) {
	if c.inLeft == 0 && c.headerBlock.Len() == 0 {
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
	n, err := c.in.Read(p[:min(len(p), c.inLeft)])
	c.inLeft -= n
	return n, err
}

func parseFrameHeader(b []byte) http2.FrameHeader {
	return http2.FrameHeader{
		Length: uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2]), Type: http2.FrameType(b[3]), Flags: http2.Flags(b[4]),
		StreamID: binary.BigEndian.Uint32(b[5:]) & (1<<31 - 1),
	}
}

// nextFrame handles the header of the next frame, or reads a complete header block. Then Read can
// return its bytes.
func (c *HTTP2Conn) nextFrame() error {
	f, err := c.peekFrame()
	if err != nil {
		return err
	}
	switch f.Type {
	case http2.FrameHeaders:
		c.pause()
		c.opened(f.StreamID, f.Flags.Has(http2.FlagHeadersEndStream))
		return c.readHeaders(f)
	case http2.FrameData:
		if f.Flags.Has(http2.FlagDataEndStream) {
			c.setState(f.StreamID, streamRequested)
		}
	case http2.FrameRSTStream:
		if c.setState(f.StreamID, streamClosed) < streamRunning {
			c.takeFrames(framesPerEarlyReset)
		}
	}
	c.inLeft = frameHeaderBytes + int(f.Length)
	return nil
}

// peekFrame returns the header of the next frame without reading it, and takes one frame from the
// budget.
func (c *HTTP2Conn) peekFrame() (http2.FrameHeader, error) {
	b, err := c.in.Peek(frameHeaderBytes)
	if err != nil {
		return http2.FrameHeader{}, err
	}
	if !c.takeFrames(1) {
		c.conns.config.Rejected("frames")
		return http2.FrameHeader{}, errors.New("http2: too many frames for the number of calls")
	}
	return parseFrameHeader(b), nil
}

// readHeaders reads the frames of a header block into c.headerBlock, and checks its size before grpc-go
// reads it. The block is a HEADERS frame, whose header is f, and its CONTINUATION frames.
func (c *HTTP2Conn) readHeaders(f http2.FrameHeader) error {
	c.LastStream = Stream{conn: c, id: f.StreamID}
	var unfinished int64
	defer func() { c.conns.unfinished.Add(-unfinished) }()
	for {
		size := frameHeaderBytes + int(f.Length)
		if int(f.Length) > maxFrameBytes {
			c.inLeft = size // grpc-go ends the connection
			break
		}
		ended := f.Flags.Has(http2.FlagHeadersEndHeaders) // equals FlagContinuationEndHeaders
		if !ended || c.in.Buffered() < size {
			if unfinished == 0 { // once for the block
				if err := c.SetReadDeadline(time.Now().Add(c.conns.config.Timeout)); err != nil {
					return err
				}
			}
			unfinished += int64(size)
			if c.conns.unfinished.Add(int64(size)) > maxUnfinishedHeaders {
				return c.tooManyHeaders()
			}
		}
		c.headerBlock.Grow(size)
		frame := c.headerBlock.AvailableBuffer()[:size]
		if _, err := io.ReadFull(c.in, frame); err != nil {
			return err
		}
		c.headerBlock.Write(frame)
		fragment, ok := headerFragment(f, frame[frameHeaderBytes:])
		if !ok {
			break // grpc-go ends the connection
		}
		if _, err := c.hpack.Write(fragment); err != nil {
			return err
		}
		if c.LastStream.HeaderBytes > MaxHeaderBytes || c.LastStream.fields > maxHeaderFields || c.headerBlock.Len() > MaxHeaderBytes {
			return c.tooManyHeaders()
		}
		if ended {
			break
		}
		next, err := c.peekFrame()
		if err != nil {
			return err
		}
		if next.Type != http2.FrameContinuation || next.StreamID != f.StreamID {
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
	return errors.New("http2: headers are too large")
}

// headerFragment returns the part of a frame's payload that belongs to the header block, without
// padding and priority. It returns false if the payload is malformed.
func headerFragment(f http2.FrameHeader, payload []byte) ([]byte, bool) {
	if f.Type != http2.FrameHeaders {
		return payload, true
	}
	start, padding := 0, 0
	if f.Flags.Has(http2.FlagHeadersPadded) && len(payload) > 0 {
		start, padding = 1, int(payload[0])
	}
	if f.Flags.Has(http2.FlagHeadersPriority) {
		start += 5
	}
	if start+padding > len(payload) {
		return nil, false
	}
	return payload[start : len(payload)-padding], true
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

// Write implements net.Conn. It finds the frames that end a stream.
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
		c.outFilled, c.outLeft = 0, int(f.Length)
		if f.Type == http2.FrameRSTStream ||
			(f.Type == http2.FrameHeaders || f.Type == http2.FrameData) && f.Flags.Has(http2.FlagHeadersEndStream) {
			if c.setState(f.StreamID, streamClosed) == streamEnded && f.Type != http2.FrameRSTStream {
				c.ended.Add(1)
			}
		}
	}
	return n, err
}

// opened adds a stream that the peer opens. complete is true if its request has no message.
func (c *HTTP2Conn) opened(id uint32, complete bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.streams == nil || id <= c.lastID {
		return // closed, or trailers, or an error that grpc-go finds
	}
	c.lastID = id
	state := streamOpened
	if complete {
		state = streamRequested
	}
	c.streams[id] = wireStream{state, time.Now()}
	c.addWaiting(1)
}

// setState changes the state of a stream, and returns its previous state.
func (c *HTTP2Conn) setState(id uint32, next streamState) (previous streamState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok := c.streams[id]
	switch {
	case !ok:
		return streamClosed
	case next == streamRequested && s.state != streamOpened:
		return s.state // the handler of a streaming call starts before the request is complete
	case next == streamClosed:
		delete(c.streams, id)
	default:
		c.streams[id] = wireStream{next, time.Now()}
	}
	c.addWaiting(next.waiting() - s.state.waiting())
	return s.state
}

// pause blocks the reader before a new stream, while the process is saturated and too many streams of
// this connection wait (see saturatedTimeout). This is backpressure on the peers that cause the saturation.
func (c *HTTP2Conn) pause() {
	for c.conns.isSaturated() && c.waiting.Load() > c.extraStreams() { // waiting is 0 after Close
		select {
		case <-c.resume:
		case <-time.After(pauseInterval): // streams of other connections may end
		}
	}
}

// extraStreams returns how many streams of this connection may wait when it opens one more, if the
// process is saturated.
func (c *HTTP2Conn) extraStreams() int64 {
	if c.conns.waiting.Load() > 2*int64(c.conns.config.WaitingStreams) {
		return 0
	}
	return min(c.ended.Load(), maxExtraStreams)
}

// A Stream is the HTTP/2 stream of one call.
type Stream struct {
	HeaderBytes int // decoded size; see RFC 9113, 6.5.2

	fields int
	conn   *HTTP2Conn
	id     uint32
}

// ChargeHeaders takes frames from the budget of the connection for a call that is rejected because
// its headers are too large.
func (s Stream) ChargeHeaders() { s.conn.takeFrames(s.HeaderBytes / rejectedBytesPerFrame) }

// Credit adds framesPerCall to the budget of the connection.
func (s Stream) Credit() {
	if s.conn.spareFrames.Load() < maxSpareFrames {
		s.conn.spareFrames.Add(framesPerCall)
	}
}

// Start records that the handler of the stream starts.
func (s Stream) Start() {
	s.Credit()
	s.conn.setState(s.id, streamRunning)
}

// End records that the handler of the stream has ended.
func (s Stream) End() { s.conn.setState(s.id, streamEnded) }

// addWaiting adds n, which can be negative, to the number of waiting streams of the connection and of
// the process. If n is negative, it wakes pause; otherwise, if the process is saturated, it wakes Sweep.
// The calling function must hold c.mu.
func (c *HTTP2Conn) addWaiting(n int64) {
	c.waiting.Add(n)
	c.conns.waiting.Add(n)
	wake := c.conns.wakeSweep
	if n < 0 {
		wake = c.resume
	} else if !c.conns.isSaturated() {
		return
	}
	select {
	case wake <- struct{}{}:
	default:
	}
}

// A peerWait describes the streams of a connection that wait for the peer. The peer has not sent the
// complete request, or has not read the complete reply.
type peerWait struct {
	conn    *HTTP2Conn
	streams int           // number of these streams
	longest time.Duration // of their waiting times
	// score is the sum of their waiting times, smaller if calls of the connection ended: up to nine times
	// with eight ended calls for each of these streams. Streams of a good client wait too if this process
	// is slow, but the client's earlier calls have ended.
	score time.Duration
	late  bool // a stream has waited for too long
}

// peerWait returns the peerWait of the connection. A stream is late if it has waited for longer than
// unreadTimeout. While its request is incomplete, the limit is larger by Config.RequestTimeout.
func (c *HTTP2Conn) peerWait(now time.Time) peerWait {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := peerWait{conn: c}
	var sum time.Duration
	for _, s := range c.streams {
		limit := unreadTimeout
		switch s.state {
		case streamRequested, streamRunning:
			continue
		case streamOpened:
			limit += c.conns.config.RequestTimeout // the server should end the request first
		}
		waited := now.Sub(s.since)
		w.streams, w.longest, w.late = w.streams+1, max(w.longest, waited), w.late || waited > limit
		sum += waited
	}
	w.score = sum / time.Duration(1+min(c.ended.Load(), maxExtraStreams*int64(w.streams)))
	return w
}
