package verify

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A memory is a Store that keeps one number and never fails.
type memory struct {
	mu      sync.Mutex
	record  Record
	history []Record // every record that was ever swapped in
}

func (m *memory) Load(context.Context, Number) (Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.record, nil
}

func (m *memory) Swap(_ context.Context, _ Number, old Version, next Record) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.record.Version != old {
		return false, nil
	}
	m.record = next
	m.history = append(m.history, next)
	return true, nil
}

func (m *memory) state() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return mustDecode(m.record)
}

// write is another replica's transition: at once, and whole.
func (m *memory) write(change func(State) State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := change(mustDecode(m.record))
	m.record = Record{State: s.encode(), BegunAt: s.LastSendID}
	rand.Read(m.record.Version[:])
	m.history = append(m.history, m.record)
}

func mustDecode(r Record) State {
	s, err := decodeState(r.State)
	if err != nil {
		panic(err)
	}
	return s
}

var (
	errNoEffect = errors.New("dial refused")
	errUnknown  = fmt.Errorf("connection lost: %w", ErrOutcomeUnknown)
)

// A script is one way through a tree of choices. Run again and again, with next
// in between, it goes every way there is.
type script struct {
	taken, of []int
	at        int
}

// choose takes one of n ways.
func (s *script) choose(n int) int {
	if s.at == len(s.taken) {
		s.taken, s.of = append(s.taken, 0), append(s.of, n)
	}
	s.at++
	return s.taken[s.at-1]
}

// next prepares the way after this one; false says that there is none.
func (s *script) next() bool {
	s.at = 0
	for last := len(s.taken) - 1; last >= 0; last-- {
		if s.taken[last]++; s.taken[last] < s.of[last] {
			s.taken, s.of = s.taken[:last+1], s.of[:last+1]
			return true
		}
	}
	return false
}

// What may become of an operation of a scripted store.
const (
	fine = iota
	noEffect
	slow
	loadFaults // how many a Load knows

	unknownDone     = iota - 1 // done, and the answer is lost
	unknownNotDone             // not done, and nobody knows
	unknownSoon                // a stalled copy, done before the next operation
	unknownLater               // a stalled copy, done after the next operation
	unknownVeryLate            // a stalled copy, done when all is over
	swapFaults
)

// A scripted store lets its first operations fail in every way, and lets one
// other writer in before one of them. Afterwards it is well.
type scripted struct {
	memory
	script    *script
	left      int             // operations still scripted
	intruders []func()        // what another writer might do, once
	intruded  int             // which of them did, from 1; 0: none
	own       map[Version]int // swaps of the Verifier that were done
	unknown   bool            // an outcome was unknown
	soon      []func()        // stalled copies
	later     []func()
	veryLate  []func()
}

func (s *scripted) fault(of int) int {
	// Copies that were stalled at the last operation wake up now or after this one.
	run(&s.soon)
	s.soon, s.later = s.later, nil
	if s.left == 0 {
		return fine
	}
	s.left--
	if s.intruded == 0 {
		if s.intruded = s.script.choose(1 + len(s.intruders)); s.intruded > 0 {
			s.intruders[s.intruded-1]()
		}
	}
	return s.script.choose(of)
}

func run(stalled *[]func()) {
	for _, wake := range *stalled {
		wake()
	}
	*stalled = nil
}

// wakeAll lets every stalled copy wake up.
func (s *scripted) wakeAll() {
	run(&s.soon)
	run(&s.later)
	run(&s.veryLate)
}

func (s *scripted) Load(ctx context.Context, n Number) (Record, error) {
	switch s.fault(loadFaults) {
	case noEffect:
		return Record{}, errNoEffect
	case slow:
		if err := sleep(ctx); err != nil {
			return Record{}, err
		}
	}
	return s.memory.Load(ctx, n)
}

func (s *scripted) Swap(ctx context.Context, n Number, old Version, next Record) (bool, error) {
	swap := func() bool {
		done, _ := s.memory.Swap(ctx, n, old, next)
		if done {
			s.own[next.Version]++
		}
		return done
	}
	fault := s.fault(swapFaults)
	switch fault {
	case noEffect:
		return false, errNoEffect
	case slow:
		if err := sleep(ctx); err != nil {
			return false, err
		}
	case unknownDone:
		swap()
	case unknownSoon:
		s.soon = append(s.soon, func() { swap() })
	case unknownLater:
		s.later = append(s.later, func() { swap() })
	case unknownVeryLate:
		s.veryLate = append(s.veryLate, func() { swap() })
	}
	if fault >= unknownDone {
		s.unknown = true
		return false, errUnknown
	}
	return swap(), nil
}

// sleep is how long a slow operation takes: two of them in one call are more than
// its patience.
func sleep(ctx context.Context) error {
	select {
	case <-time.After(2 * time.Second):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A brokenStore fails where load or swap say so before it does what it is asked,
// or done after it did a swap.
type brokenStore struct {
	memory
	load, swap func(ctx context.Context) error
	done       func() error
}

// fail has all that is asked from now on fail where f says so.
func (b *brokenStore) fail(f func(ctx context.Context) error) { b.load, b.swap = f, f }

func (b *brokenStore) Load(ctx context.Context, n Number) (Record, error) {
	if b.load != nil {
		if err := b.load(ctx); err != nil {
			return Record{}, err
		}
	}
	return b.memory.Load(ctx, n)
}

func (b *brokenStore) Swap(ctx context.Context, n Number, old Version, next Record) (bool, error) {
	if b.swap != nil {
		if err := b.swap(ctx); err != nil {
			return false, err
		}
	}
	swapped, err := b.memory.Swap(ctx, n, old, next)
	if swapped && b.done != nil {
		if err := b.done(); err != nil {
			return false, err
		}
	}
	return swapped, err
}

// A senderFunc is a Sender.
type senderFunc func(ctx context.Context, m Message) (Receipt, error)

func (f senderFunc) Send(ctx context.Context, m Message) (Receipt, error) { return f(ctx, m) }

// A counter is a source of "random" bytes that makes the codes 000001, 000002, …
type counter struct {
	mu sync.Mutex
	n  uint32
	at int
}

func (c *counter) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range b {
		if c.at == 0 {
			c.n++
		}
		b[i] = byte(c.n >> (16 - 8*c.at))
		c.at = (c.at + 1) % 3
	}
	return len(b), nil
}
