package store

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// An outcome states whether a request took effect.
type outcome uint8

const (
	outcomeUnknown    outcome = iota // may be applied already, or later, or never
	outcomeApplied                   // the swap was applied, or the load succeeded
	outcomeConflict                  // not applied: another write came first
	outcomeNotApplied                // not applied, and will not be applied
	outcomeRunDirect                 // not applied by its batch: do must run it directly
)

// A result is the outcome of a request. It has an error if the outcome is unknown or not applied.
type result struct {
	outcome outcome
	err     error
	record  verify.Record // of a load
}

// errClosed is returned to requests that wait when the store is closed.
var errClosed = errors.New("the store is closed")

// A batcher groups concurrent requests (group commit). Each of its few workers takes all queued
// requests, up to maxBatch, and runs them as one statement or transaction. There is no timer: an
// idle batcher runs a request immediately, and batches grow only while the workers are busy.
type batcher[T any] struct {
	maxBatch int
	breaker  *breaker
	// direct runs one request without a batch.
	direct func(context.Context, T) result
	// run runs a batch: it claims the requests, and sends a result to each claimed request. If it
	// returns an error, the batcher pauses batching. It sends this error, with an unknown outcome, to
	// the claimed requests that have no result.
	run func([]*request[T]) error

	queue     chan *request[T]
	closed    chan struct{}
	closeOnce sync.Once
	workers   sync.WaitGroup
}

// A request waits in a batcher for its result. A batch claims its requests before it runs them, and a
// call claims its request when it stops waiting. Only the first claim succeeds. So a batch never runs a
// request whose call has returned "not applied".
type request[T any] struct {
	value   T
	claimed atomic.Bool // by its batch, or by a call that ended
	result  chan result
}

func newBatcher[T any](
	workers, maxBatch int, breaker *breaker, direct func(context.Context, T) result, run func([]*request[T]) error,
) *batcher[T] {
	b := &batcher[T]{
		maxBatch: maxBatch, breaker: breaker, direct: direct, run: run,
		queue: make(chan *request[T], maxBatch), closed: make(chan struct{}),
	}
	for range workers {
		b.workers.Go(b.work)
	}
	return b
}

// do runs a request in a batch, or directly while batching is paused. If ctx ends or the store is
// closed before the batch claims the request, the request is not applied. If this happens after the
// claim, the outcome is unknown.
func (b *batcher[T]) do(ctx context.Context, value T) result {
	if b.breaker.paused() {
		return b.direct(ctx, value)
	}
	if ctx.Err() != nil {
		return result{outcome: outcomeNotApplied, err: ctx.Err()}
	}
	r := newRequest(value)
	for queue := b.queue; ; {
		select {
		case queue <- r:
			queue = nil // a nil channel blocks: wait for the result
		case got := <-r.result:
			if got.outcome == outcomeRunDirect {
				return b.direct(ctx, value)
			}
			return got
		case <-ctx.Done():
			return r.giveUp(ctx.Err())
		case <-b.closed:
			return r.giveUp(errClosed)
		}
	}
}

// work runs batches until the batcher is closed.
func (b *batcher[T]) work() {
	for {
		select {
		case first := <-b.queue:
			runtime.Gosched() // other goroutines can queue requests first
			b.runBatch(b.collect(first))
		case <-b.closed:
			return
		}
	}
}

// collect returns first and the queued requests, at most maxBatch in all.
func (b *batcher[T]) collect(first *request[T]) []*request[T] {
	batch := []*request[T]{first}
	for len(batch) < b.maxBatch {
		select {
		case next := <-b.queue:
			batch = append(batch, next)
		default:
			return batch
		}
	}
	return batch
}

// runBatch runs a batch, unless batching is paused. If it panics, only the requests of this batch fail.
func (b *batcher[T]) runBatch(batch []*request[T]) {
	if b.breaker.paused() {
		finish(result{outcome: outcomeRunDirect}, batch...)
		return
	}
	defer func() {
		if p := recover(); p != nil { // its value can contain a phone number
			finish(result{err: fmt.Errorf("panic with a %T", p)}, batch...)
		}
	}()
	if err := b.run(batch); err != nil {
		b.breaker.pause()
		finish(result{err: err}, batch...)
	}
}

// close stops the workers, and waits until they have finished their current batches.
func (b *batcher[T]) close() {
	b.closeOnce.Do(func() { close(b.closed) })
	b.workers.Wait()
}

func newRequest[T any](value T) *request[T] {
	return &request[T]{value: value, result: make(chan result, 1)}
}

// claim reports whether this is the first claim of the request.
func (r *request[T]) claim() bool { return r.claimed.CompareAndSwap(false, true) }

// giveUp claims a request whose call stops waiting, and returns its result, with cause as the error.
func (r *request[T]) giveUp(cause error) result {
	if r.claim() {
		return result{outcome: outcomeNotApplied, err: cause}
	}
	return result{err: cause}
}

// claim claims the requests of a batch, and returns the claimed requests. The calls of the others have
// given up.
func claim[T any](batch []*request[T]) []*request[T] {
	return slices.DeleteFunc(slices.Clone(batch), func(r *request[T]) bool { return !r.claim() })
}

// finish sends a result to each request that has no result yet.
func finish[T any](got result, requests ...*request[T]) {
	for _, r := range requests {
		select {
		case r.result <- got:
		default:
		}
	}
}

// batchingPause is the time for which the breaker stays open.
const batchingPause = 10 * time.Second

// A breaker pauses batching after a failed batch (circuit breaker). The breaker is open while batching is
// paused. Then a hung connection or a locked row delays only one request and not a whole batch. The
// batchers of a database share one breaker.
type breaker struct {
	pauses prometheus.Counter
	until  atomic.Int64 // end of the pause, in nanoseconds since 1970
}

func (b *breaker) pause() {
	if !b.paused() {
		b.pauses.Inc()
	}
	b.until.Store(time.Now().Add(batchingPause).UnixNano())
}

func (b *breaker) paused() bool { return time.Now().UnixNano() < b.until.Load() }
