package store

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A testBatcher has int requests, and a flush function that records its batches and waits
// until the test lets it go on.
type testBatcher struct {
	*batcher[int]
	flushing chan []int    // the batch of a flush that began
	release  chan struct{} // lets one flush end
	fail     error         // of the next flush
	pauses   prometheus.Counter

	mu      sync.Mutex
	directs []int // requests that ran directly
}

func newTestBatcher(workers, maxBatch int) *testBatcher {
	b := &testBatcher{
		flushing: make(chan []int), release: make(chan struct{}),
		pauses: prometheus.NewCounter(prometheus.CounterOpts{Name: "pauses"}),
	}
	direct := func(_ context.Context, n int) result {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.directs = append(b.directs, n)
		return result{outcome: outcomeConflict}
	}
	b.batcher = newBatcher(workers, maxBatch, &breaker{pauses: b.pauses}, direct, func(batch []*request[int]) error {
		if batch = claim(batch); len(batch) == 0 {
			return nil
		}
		var values []int
		for _, r := range batch {
			values = append(values, r.value)
		}
		b.flushing <- values
		<-b.release
		if err := b.fail; err != nil {
			b.fail = nil
			return err
		}
		for _, r := range batch {
			if r.value < 0 {
				panic("a statement with +8618612345678")
			}
			finish(result{outcome: outcomeApplied}, r)
		}
		return nil
	})
	return b
}

// start runs a request, and returns the channel of its result after it is queued.
func (b *testBatcher) start(ctx context.Context, n int) <-chan result {
	got := make(chan result, 1)
	go func() { got <- b.do(ctx, n) }()
	synctest.Wait()
	return got
}

// flush lets the flush that began end, and returns its batch.
func (b *testBatcher) flush() []int {
	batch := <-b.flushing
	b.release <- struct{}{}
	return batch
}

func mustEnd(t *testing.T, got <-chan result, want outcome, wantErr error) {
	t.Helper()
	synctest.Wait()
	select {
	case r := <-got:
		if r.outcome != want {
			t.Errorf("got outcome %d, want %d", r.outcome, want)
		}
		if !errors.Is(r.err, wantErr) {
			t.Errorf("got error %v, want %v", r.err, wantErr)
		}
	default:
		t.Errorf("got no result, want outcome %d", want)
	}
}

func mustFlush(t *testing.T, b *testBatcher, want ...int) {
	t.Helper()
	if got := b.flush(); !slices.Equal(got, want) {
		t.Errorf("got a flush of %v, want %v", got, want)
	}
}

func TestBatcher_FlushesWaitingRequestsTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBatcher(1, 3)
		var results []<-chan result
		for n := range 6 {
			results = append(results, b.start(t.Context(), n))
		}
		mustFlush(t, b, 0) // an idle batcher does not wait for more
		mustFlush(t, b, 1, 2, 3)
		mustFlush(t, b, 4, 5)
		for _, got := range results {
			mustEnd(t, got, outcomeApplied, nil)
		}
		b.close()
	})
}

func TestBatcher_EachWorkerFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBatcher(2, 8)
		first, second, third := b.start(t.Context(), 1), b.start(t.Context(), 2), b.start(t.Context(), 3)
		if got := []int{(<-b.flushing)[0], (<-b.flushing)[0]}; !slices.Contains(got, 1) || !slices.Contains(got, 2) {
			t.Errorf("got flushes of %v at once, want 1 and 2", got)
		}
		synctest.Wait()
		select {
		case got := <-b.flushing:
			t.Errorf("got a third flush of %v, want two at once at most", got)
		default:
		}
		b.release <- struct{}{}
		b.release <- struct{}{}
		mustFlush(t, b, 3)
		for _, got := range []<-chan result{first, second, third} {
			mustEnd(t, got, outcomeApplied, nil)
		}
		b.close()
	})
}

func TestBatcher_RequestGivenUpBeforeItsFlushIsNotApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBatcher(1, 8)
		ctx, cancel := context.WithCancel(t.Context())
		first := b.start(t.Context(), 1)
		gone, stays := b.start(ctx, 2), b.start(t.Context(), 3)
		cancel()
		mustEnd(t, gone, outcomeNotApplied, context.Canceled)
		mustFlush(t, b, 1)
		mustFlush(t, b, 3)
		mustEnd(t, first, outcomeApplied, nil)
		mustEnd(t, stays, outcomeApplied, nil)
		mustEnd(t, b.start(ctx, 4), outcomeNotApplied, context.Canceled) // never queued
		b.close()
	})
}

func TestBatcher_RequestGivenUpDuringItsFlushIsUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBatcher(1, 8)
		ctx, cancel := context.WithCancel(t.Context())
		gone := b.start(ctx, 1)
		<-b.flushing
		cancel()
		mustEnd(t, gone, outcomeUnknown, context.Canceled)
		b.release <- struct{}{}
		b.close()
	})
}

func TestBatcher_CloseFailsWaitingRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBatcher(1, 1)
		flushed := b.start(t.Context(), 1)
		queued, blocked := b.start(t.Context(), 2), b.start(t.Context(), 3)
		<-b.flushing
		closed := make(chan struct{})
		go func() { defer close(closed); b.close() }()
		mustEnd(t, flushed, outcomeUnknown, errClosed)
		mustEnd(t, queued, outcomeNotApplied, errClosed)
		mustEnd(t, blocked, outcomeNotApplied, errClosed)
		select {
		case <-closed:
			t.Error("close returned during a flush; want it to wait")
		default:
		}
		b.release <- struct{}{}
		<-closed
		mustEnd(t, b.start(t.Context(), 4), outcomeNotApplied, errClosed)
		b.close() // again
	})
}

func TestBatcher_PanicFailsItsOwnBatchOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBatcher(1, 8)
		panics := b.start(t.Context(), -1)
		mustFlush(t, b, -1)
		if got := <-panics; got.outcome != outcomeUnknown || got.err == nil || got.err.Error() != "panic with a string" {
			t.Errorf("got outcome %d, %v; want unknown, \"panic with a string\"", got.outcome, got.err)
		}
		later := b.start(t.Context(), 2)
		mustFlush(t, b, 2)
		mustEnd(t, later, outcomeApplied, nil)
		b.close()
	})
}

// After a failed flush, requests run directly for ten seconds. So do those that are queued.
func TestBatcher_PausesAfterAFailedFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTestBatcher(1, 8)
		failed := b.start(t.Context(), 1)
		queued := b.start(t.Context(), 2)
		b.fail = context.DeadlineExceeded
		mustFlush(t, b, 1)
		mustEnd(t, failed, outcomeUnknown, context.DeadlineExceeded)
		mustEnd(t, queued, outcomeConflict, nil) // the result of direct
		mustEnd(t, b.start(t.Context(), 3), outcomeConflict, nil)
		time.Sleep(batchingPause - time.Nanosecond)
		mustEnd(t, b.start(t.Context(), 4), outcomeConflict, nil)
		if want := []int{2, 3, 4}; !slices.Equal(b.directs, want) {
			t.Errorf("got %v run directly, want %v", b.directs, want)
		}
		if got := counted(t, b.pauses); got != 1 {
			t.Errorf("the metric: got %v pauses, want 1", got)
		}
		time.Sleep(time.Nanosecond)
		batched := b.start(t.Context(), 5)
		mustFlush(t, b, 5)
		mustEnd(t, batched, outcomeApplied, nil)
		b.close()
	})
}

func TestRequest_KeepsItsFirstResult(t *testing.T) {
	r := newRequest(1)
	finish(result{outcome: outcomeApplied}, r)
	finish(result{err: errClosed}, r)
	if got := <-r.result; got.outcome != outcomeApplied {
		t.Errorf("got outcome %d, want applied", got.outcome)
	}
	if !r.claim() {
		t.Error("the first claim: got false, want true")
	}
	if r.claim() {
		t.Error("the second claim: got true, want false")
	}
}
