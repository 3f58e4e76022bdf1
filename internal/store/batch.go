package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// errClosed is returned to requests that wait when the store is closed.
var errClosed = errors.New("the store is closed")

// A batcher groups concurrent requests (group commit). A few workers each take every
// request that is queued, up to maxBatch, and flush them as one statement or transaction.
// There is no timer: an idle batcher flushes a request at once, and batches grow only
// while the workers are busy.
type batcher[T interface{ fail(error) }] struct {
	queue     chan T
	closed    chan struct{}
	closeOnce sync.Once
	workers   sync.WaitGroup
}

func newBatcher[T interface{ fail(error) }](workers, maxBatch int, flush func([]T)) *batcher[T] {
	b := &batcher[T]{queue: make(chan T, maxBatch), closed: make(chan struct{})}
	flushRecovering := func(batch []T) {
		defer func() {
			if p := recover(); p != nil { // its value could hold a number
				for _, request := range batch {
					request.fail(fmt.Errorf("panic with a %T", p))
				}
			}
		}()
		flush(batch)
	}
	for range workers {
		b.workers.Go(func() {
			for {
				select {
				case first := <-b.queue:
					runtime.Gosched() // lets runnable goroutines submit first
					flushRecovering(b.collect(first, maxBatch))
				case <-b.closed:
					return
				}
			}
		})
	}
	return b
}

// collect returns first and the queued requests, at most maxBatch in all.
func (b *batcher[T]) collect(first T, maxBatch int) []T {
	batch := []T{first}
	for len(batch) < maxBatch {
		select {
		case next := <-b.queue:
			batch = append(batch, next)
		default:
			return batch
		}
	}
	return batch
}

// submit queues a request. It fails if ctx ends or the store is closed first.
func (b *batcher[T]) submit(ctx context.Context, request T) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select {
	case b.queue <- request:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-b.closed:
		return errClosed
	}
}

// close waits until the workers have finished their current batches. b may be nil.
func (b *batcher[T]) close() {
	if b != nil {
		b.closeOnce.Do(func() { close(b.closed) })
		b.workers.Wait()
	}
}

// To a MySQL server a statement is more work than a row. So a batch of loads is one
// statement, and a batch of swaps too. Each statement is prepared in two sizes; if a batch
// has fewer requests than the statement has rows, a number is repeated.
const (
	loadWorkers   = 2
	updateWorkers = 4 // more, since a commit can take longer than a read
	smallBatch    = 16
	largeBatch    = 64
	// Shorter than a call's storeTimeout, so that a call whose batch timed out can still
	// find out whether its swap was applied.
	batchTimeout = 1500 * time.Millisecond
)

// pauseBatching makes requests bypass the batcher for ten seconds (a circuit breaker), so
// that a hung connection or a locked row delays one request and not a whole batch.
func (db *DB) pauseBatching() {
	if !db.batchingPaused() {
		db.counters.batchingPaused.Inc()
	}
	db.batchingPausedUntil.Store(time.Now().Add(10 * time.Second).UnixNano())
}

func (db *DB) batchingPaused() bool { return time.Now().UnixNano() < db.batchingPausedUntil.Load() }

type loadRequest struct {
	ctx    context.Context
	number verify.Number
	result chan loadResult
}

type loadResult struct {
	record verify.Record
	err    error
}

// fail sends err if the request has no result yet.
func (l loadRequest) fail(err error) {
	select {
	case l.result <- loadResult{err: err}:
	default:
	}
}

func (db *DB) loadBatched(ctx context.Context, n verify.Number) (verify.Record, error) {
	l := loadRequest{ctx, n, make(chan loadResult, 1)}
	if err := db.loads.submit(ctx, l); err != nil {
		return verify.Record{}, err
	}
	select {
	case r := <-l.result:
		if errors.Is(r.err, errRunDirect) {
			return db.loadDirect(ctx, n)
		}
		return r.record, r.err
	case <-ctx.Done():
		return verify.Record{}, ctx.Err()
	case <-db.loads.closed:
		return verify.Record{}, errClosed
	}
}

// flushLoads loads all numbers in one statement.
func (db *DB) flushLoads(all []loadRequest) {
	all = slices.DeleteFunc(all, func(l loadRequest) bool { return l.ctx.Err() != nil })
	ctx, cancel := context.WithTimeout(context.Background(), batchTimeout)
	defer cancel()
	var record verify.Record
	var records map[verify.Number]verify.Record
	var err error
	switch {
	case len(all) == 0:
	case db.batchingPaused():
		for _, l := range all {
			l.result <- loadResult{err: errRunDirect}
		}
	case len(all) == 1:
		record, err = db.loadDirect(ctx, all[0].number)
		all[0].result <- loadResult{record, err}
	default:
		records, err = db.loadBatch(ctx, all)
		_ = db.countError(err)
		for _, l := range all {
			l.result <- loadResult{records[l.number], err}
		}
	}
	if err != nil {
		db.pauseBatching()
	}
}

func selectBatchSQL(rows int) string {
	return "SELECT version, begun_at, state, phone_number FROM phone_numbers WHERE phone_number IN (?" + strings.Repeat(", ?", rows-1) + ")"
}

func (db *DB) loadBatch(ctx context.Context, all []loadRequest) (map[verify.Number]verify.Record, error) {
	load, numbers := db.selectSmall, make([]any, smallBatch)
	if len(all) > smallBatch {
		load, numbers = db.selectLarge, make([]any, largeBatch)
	}
	for i := range numbers {
		numbers[i] = string(all[min(i, len(all)-1)].number) // a repeated number is found once
	}
	rows, err := load.QueryContext(ctx, numbers...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	records := make(map[verify.Number]verify.Record, len(all))
	for rows.Next() {
		var n string
		r, err := scan(rows, &n)
		if err != nil {
			return nil, err
		}
		records[verify.Number(n)] = r
	}
	return records, rows.Err()
}

type swapRequest struct {
	number  verify.Number
	old     verify.Version
	next    verify.Record
	claimed atomic.Bool // by the worker, or by a call that gave up first
	done    bool
	result  chan error
}

// fail sends err if the request has no result yet. s is nil if claim dropped it.
func (s *swapRequest) fail(err error) {
	if s != nil {
		select {
		case s.result <- err:
		default:
		}
	}
}

// errRunDirect tells a waiting request that the batch did not run it and that it must run
// as a single statement.
var errRunDirect = errors.New("not run in the batch: run directly")

func (db *DB) swapBatched(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	s := &swapRequest{number: n, old: old, next: next, result: make(chan error, 1)}
	err := db.swaps.submit(ctx, s)
	if err == nil {
		select {
		case err = <-s.result:
			if errors.Is(err, errRunDirect) {
				return db.swapDirect(ctx, n, old, next)
			}
			return s.done && err == nil, err
		case <-ctx.Done():
			err = ctx.Err()
		case <-db.swaps.closed:
			err = errClosed
		}
		if !s.claimed.CompareAndSwap(false, true) {
			return false, err // a worker runs it
		}
	}
	return false, &notAppliedError{err}
}

// claim drops requests whose calls gave up and claims the others. A claimed request can no
// longer report "not applied" by itself.
func claim(all []*swapRequest) []*swapRequest {
	return slices.DeleteFunc(all, func(s *swapRequest) bool { return !s.claimed.CompareAndSwap(false, true) })
}

// With SQLite, flushing to disk is the main cost of a swap, so a batch of swaps is one
// transaction.
const maxTxSwaps = 256

// flushSwapsTx runs all swaps in one transaction: all are applied, or none.
func (db *DB) flushSwapsTx(all []*swapRequest) {
	err := db.countError(db.swapBatchTx(&all))
	for _, s := range all {
		s.result <- err
	}
}

func (db *DB) swapBatchTx(all *[]*swapRequest) error {
	ctx := context.Background() // one request's context must not end the others
	tx, err := db.pool.BeginTx(ctx, nil)
	*all = claim(*all)
	if err != nil {
		return &notAppliedError{err}
	}
	defer tx.Rollback() // if something panics
	insert, update := tx.StmtContext(ctx, db.insert), tx.StmtContext(ctx, db.update)
	for _, s := range *all {
		if s.done, err = swap(ctx, insert, update, s.number, s.old, s.next); err != nil {
			if tx.Rollback() == nil {
				err = &notAppliedError{err}
			}
			return err
		}
	}
	return tx.Commit()
}

// updateBatchSQL returns an UPDATE that swaps all of its rows or none. A row whose version
// is not the expected one gets version = NULL; the column is NOT NULL, so in strict mode the
// whole statement fails (error 1048). The last condition matches no row if the session is
// not strict. A transaction of several statements would report each row, but would hold its
// locks if this process froze between two of them.
func updateBatchSQL(rows int) string {
	return "UPDATE phone_numbers SET begun_at = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, state = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, version = CASE" + strings.Repeat(" WHEN phone_number = ? AND version = ? THEN ?", rows) +
		" END WHERE phone_number IN (?" + strings.Repeat(", ?", rows-1) + ") AND @@sql_mode LIKE '%STRICT_ALL_TABLES%'"
}

// flushUpdates runs the swaps in one statement. If a number occurs twice, its second swap
// runs directly.
func (db *DB) flushUpdates(all []*swapRequest) {
	batch := all[:0]
	paused := db.batchingPaused()
	for _, s := range claim(all) {
		if paused || slices.ContainsFunc(batch, func(t *swapRequest) bool { return t.number == s.number }) {
			s.result <- errRunDirect
			continue
		}
		batch = append(batch, s)
	}
	if len(batch) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), batchTimeout)
		defer cancel()
		db.updateBisecting(ctx, batch)
	}
}

// updateBisecting swaps the batch in one statement. If a row conflicts, nothing was applied:
// it then retries each half, and lets batches of eight or fewer run directly.
func (db *DB) updateBisecting(ctx context.Context, all []*swapRequest) {
	var done bool
	var err error
	if len(all) == 1 {
		done, err = db.swapDirect(ctx, all[0].number, all[0].old, all[0].next)
	} else {
		err = db.countError(db.execBatchUpdate(ctx, all))
		done = err == nil
	}
	class := db.classify(err)
	if class&conflict != 0 && len(all) > smallBatch/2 {
		db.updateBisecting(ctx, all[:len(all)/2])
		db.updateBisecting(ctx, all[len(all)/2:])
		return
	}
	if err != nil && class&conflict == 0 {
		db.pauseBatching()
	}
	if class&(notApplied|conflict) != 0 && len(all) > 1 {
		err = errRunDirect
	}
	for _, s := range all {
		s.done = done
		s.result <- err
	}
}

// execBatchUpdate swaps all rows or none, with one exception: if a row is missing, such as
// after a purge, the others are swapped, and the error leaves every outcome unknown.
func (db *DB) execBatchUpdate(ctx context.Context, all []*swapRequest) error {
	update, rows := db.updateSmall, smallBatch
	if len(all) > smallBatch {
		update, rows = db.updateLarge, largeBatch
	}
	args := make([]any, 8*rows)
	begunAt, state, version, numbers := args[:2*rows], args[2*rows:4*rows], args[4*rows:7*rows], args[7*rows:]
	for i := range rows {
		number, old, next := "", []byte{}, verify.Record{State: []byte{}} // unused row: matches no number
		if i < len(all) {
			number, old, next = string(all[i].number), all[i].old[:], all[i].next
		}
		numbers[i] = cmp.Or(number, string(all[0].number))
		begunAt[2*i], begunAt[2*i+1] = number, next.BegunAt
		state[2*i], state[2*i+1] = number, next.State
		version[3*i], version[3*i+1], version[3*i+2] = number, old, next.Version[:]
	}
	result, err := update.ExecContext(ctx, args...)
	if err != nil {
		return err
	}
	changed, err := result.RowsAffected()
	if err == nil && changed != int64(len(all)) {
		err = fmt.Errorf("%d of %d rows were there", changed, len(all))
	}
	return err
}
