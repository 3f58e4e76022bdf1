package verify

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A fakeStore is a Store in memory that never fails. The tests read and write the record of
// testNumber.
type fakeStore struct {
	mu      sync.Mutex
	record  Record            // of testNumber
	others  map[Number]Record // of other numbers
	history []Record          // every record of testNumber that was written
}

func (m *fakeStore) Load(ctx context.Context, n Number) (Record, error) {
	if err := ctx.Err(); err != nil {
		return Record{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if n != testNumber {
		return m.others[n], nil
	}
	return m.record, nil
}

func (m *fakeStore) Swap(ctx context.Context, n Number, old Version, next Record) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if len(next.State) > MaxStateBytes {
		return false, errors.New("state too large")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if n != testNumber {
		if m.others[n].Version != old {
			return false, nil
		}
		if m.others == nil {
			m.others = map[Number]Record{}
		}
		m.others[n] = next
		return true, nil
	}
	if m.record.Version != old {
		return false, nil
	}
	m.record = next
	m.history = append(m.history, next)
	return true, nil
}

func (m *fakeStore) state() State { return mustDecode(m.stored()) }

func (m *fakeStore) stored() Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.record
}

// swaps returns the number of applied swaps of testNumber.
func (m *fakeStore) swaps() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.history)
}

// write applies change as another replica would: load and swap in one step.
func (m *fakeStore) write(change func(State) State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, h, err := decodeRecord(m.record.State)
	if err != nil {
		panic(err)
	}
	s = change(s)
	m.record = Record{State: encodeRecord(s, h), BegunAt: s.LastSendID}
	rand.Read(m.record.Version[:])
	m.history = append(m.history, m.record)
}

func mustDecode(r Record) State {
	s, _, err := decodeRecord(r.State)
	if err != nil {
		panic(err)
	}
	return s
}

var (
	errNoEffect = errors.New("connection refused")
	errUnknown  = fmt.Errorf("connection lost: %w", ErrOutcomeUnknown)
)

// A schedule is one path through a tree of choices. A test that runs again after each
// next takes every path.
type schedule struct {
	taken, of []int
	at        int
}

// choose returns one of 0 to n-1.
func (s *schedule) choose(n int) int {
	if s.at == len(s.taken) {
		s.taken, s.of = append(s.taken, 0), append(s.of, n)
	}
	s.at++
	return s.taken[s.at-1]
}

// next prepares the next path, and returns false if there is none.
func (s *schedule) next() bool {
	s.at = 0
	for last := len(s.taken) - 1; last >= 0; last-- {
		if s.taken[last]++; s.taken[last] < s.of[last] {
			s.taken, s.of = s.taken[:last+1], s.of[:last+1]
			return true
		}
	}
	return false
}

// Results of one operation of a scriptedStore.
const (
	fine = iota
	noEffect
	slow
	loadFaults // number of results of a Load

	unknownDone     = iota - 1 // applied, the reply is lost
	unknownNotDone             // not applied, the reply is lost
	unknownSoon                // delayed: applied before the next operation
	unknownLater               // delayed: applied after the next operation
	unknownVeryLate            // delayed: applied after the call
	swapFaults
)

// An otherWrite is the write of another replica during a call.
type otherWrite int

const (
	otherChecked otherWrite = iota + 1
	otherUsed
	otherSent
	otherBegan
)

type otherWriter struct {
	does  otherWrite
	write func()
}

// A scriptedStore gives its first operations the results that its schedule chooses, and
// lets one other writer write before one of them. Later operations succeed.
type scriptedStore struct {
	fakeStore
	schedule     *schedule
	left         int             // operations whose result schedule chooses
	otherWriters []otherWriter   // possible writes of another writer
	by           otherWrite      // the one that happened, 0 if none
	ownSwaps     map[Version]int // applied swaps of the Verifier
	unknown      bool            // an outcome was unknown
	soon         []func()        // delayed copies of swaps
	later        []func()
	veryLate     []func()
}

func (s *scriptedStore) fault(of int) int {
	// Copies that were delayed at the last operation are applied now or after this one.
	run(&s.soon)
	s.soon, s.later = s.later, nil
	if s.left == 0 {
		return fine
	}
	s.left--
	if s.by == 0 {
		if i := s.schedule.choose(1 + len(s.otherWriters)); i > 0 {
			s.by = s.otherWriters[i-1].does
			s.otherWriters[i-1].write()
		}
	}
	return s.schedule.choose(of)
}

func run(delayed *[]func()) {
	for _, apply := range *delayed {
		apply()
	}
	*delayed = nil
}

// applyDelayed applies every delayed copy.
func (s *scriptedStore) applyDelayed() {
	run(&s.soon)
	run(&s.later)
	run(&s.veryLate)
}

func (s *scriptedStore) Load(ctx context.Context, n Number) (Record, error) {
	switch s.fault(loadFaults) {
	case noEffect:
		return Record{}, errNoEffect
	case slow:
		if err := sleep(ctx); err != nil {
			return Record{}, err
		}
	}
	return s.fakeStore.Load(ctx, n)
}

func (s *scriptedStore) Swap(ctx context.Context, n Number, old Version, next Record) (bool, error) {
	swap := func() bool {
		done, _ := s.fakeStore.Swap(context.WithoutCancel(ctx), n, old, next) // a delayed copy has no context
		if done {
			s.ownSwaps[next.Version]++
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

// sleep takes as long as a slow operation. Two of them in one call exceed storeTimeout.
func sleep(ctx context.Context) error {
	select {
	case <-time.After(2 * time.Second):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A brokenStore is a fakeStore that calls load and swap before each operation, and done
// after each applied swap, and returns their errors.
type brokenStore struct {
	fakeStore
	load, swap func(ctx context.Context) error
	done       func() error
}

// fail makes f decide which of the following operations fail.
func (b *brokenStore) fail(f func(ctx context.Context) error) { b.load, b.swap = f, f }

func (b *brokenStore) Load(ctx context.Context, n Number) (Record, error) {
	if b.load != nil {
		if err := b.load(ctx); err != nil {
			return Record{}, err
		}
	}
	return b.fakeStore.Load(ctx, n)
}

func (b *brokenStore) Swap(ctx context.Context, n Number, old Version, next Record) (bool, error) {
	if b.swap != nil {
		if err := b.swap(ctx); err != nil {
			return false, err
		}
	}
	swapped, err := b.fakeStore.Swap(ctx, n, old, next)
	if swapped && b.done != nil {
		if err := b.done(); err != nil {
			return false, err
		}
	}
	return swapped, err
}

// A senderFunc is a Sender that calls itself.
type senderFunc func(ctx context.Context, m Message) (Receipt, error)

func (f senderFunc) Send(ctx context.Context, m Message) (Receipt, error) { return f(ctx, m) }

// A counter is a source of bytes that gives the codes 000001, 000002, …
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
