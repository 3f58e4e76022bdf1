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

// errClosed is what is said to those who wait when the store is closed.
var errClosed = errors.New("the store is closed")

// A batcher hands what many callers ask for to few workers, each of whom takes all
// that waits when it is free, up to a bound: the busier, the cheaper each is. A
// caller who is alone waits for nobody.
type batcher[T interface{ fail(error) }] struct {
	queue     chan T
	closed    chan struct{}
	closeOnce sync.Once
	workers   sync.WaitGroup
}

func newBatcher[T interface{ fail(error) }](workers, most int, serve func([]T)) *batcher[T] {
	c := &batcher[T]{queue: make(chan T, most), closed: make(chan struct{})}
	surviving := func(all []T) {
		defer func() {
			if p := recover(); p != nil { // its value could hold a number
				for _, one := range all {
					one.fail(fmt.Errorf("panic with a %T", p))
				}
			}
		}()
		serve(all)
	}
	for range workers {
		c.workers.Go(func() {
			for {
				select {
				case first := <-c.queue:
					runtime.Gosched() // those who are about to ask come along
					surviving(c.collect(first, most))
				case <-c.closed:
					return
				}
			}
		})
	}
	return c
}

func (c *batcher[T]) collect(first T, most int) []T {
	all := []T{first}
	for len(all) < most {
		select {
		case next := <-c.queue:
			all = append(all, next)
		default:
			return all
		}
	}
	return all
}

// submit hands in what is then served, unless ctx ends or the store is closed before.
func (c *batcher[T]) submit(ctx context.Context, one T) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select {
	case c.queue <- one:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-c.closed:
		return errClosed
	}
}

// close lets the workers finish what they are at. c may be nil.
func (c *batcher[T]) close() {
	if c != nil {
		c.closeOnce.Do(func() { close(c.closed) })
		c.workers.Wait()
	}
}

// To a MySQL server a statement is more work than a row: loads of many numbers are one
// statement, and so are swaps. Both are prepared in two sizes, and one that is not full
// repeats a number.
const (
	loadWorkers   = 2
	updateWorkers = 4 // more, since a commit can take longer than a read
	smallBatch    = 16
	largeBatch    = 64
	// Shorter than a caller's, who can then still find out alone what was done.
	batchTimeout = 1500 * time.Millisecond
)

// pauseBatching has everybody go alone for a while: a connection that hangs, or a row that
// somebody has locked, is to hold up as few as it can.
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
	answer chan loadResult
}

type loadResult struct {
	record verify.Record
	err    error
}

// fail answers who was not answered yet.
func (l loadRequest) fail(err error) {
	select {
	case l.answer <- loadResult{err: err}:
	default:
	}
}

func (db *DB) loadBatched(ctx context.Context, n verify.Number) (verify.Record, error) {
	l := loadRequest{ctx, n, make(chan loadResult, 1)}
	if err := db.loads.submit(ctx, l); err != nil {
		return verify.Record{}, err
	}
	select {
	case a := <-l.answer:
		if errors.Is(a.err, errRunDirect) {
			return db.loadDirect(ctx, n)
		}
		return a.record, a.err
	case <-ctx.Done():
		return verify.Record{}, ctx.Err()
	case <-db.loads.closed:
		return verify.Record{}, errClosed
	}
}

func (db *DB) flushLoads(all []loadRequest) {
	all = slices.DeleteFunc(all, func(l loadRequest) bool { return l.ctx.Err() != nil })
	ctx, cancel := context.WithTimeout(context.Background(), batchTimeout)
	defer cancel()
	var one verify.Record
	var each map[verify.Number]verify.Record
	var err error
	switch {
	case len(all) == 0:
	case db.batchingPaused():
		for _, l := range all {
			l.answer <- loadResult{err: errRunDirect}
		}
	case len(all) == 1:
		one, err = db.loadDirect(ctx, all[0].number)
		all[0].answer <- loadResult{one, err}
	default:
		each, err = db.loadBatch(ctx, all)
		_ = db.countError(err)
		for _, l := range all {
			l.answer <- loadResult{each[l.number], err}
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
		numbers[i] = string(all[min(i, len(all)-1)].number) // one that is there twice is found once
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
	claimed atomic.Bool // by the worker, or by a caller who gave up first
	done    bool
	answer  chan error
}

// fail answers who was not answered yet. s is nil for who had given up.
func (s *swapRequest) fail(err error) {
	if s != nil {
		select {
		case s.answer <- err:
		default:
		}
	}
}

// errRunDirect is the answer to who was surely not served and is to be a statement of his
// own, which no other can hold up.
var errRunDirect = errors.New("to be served alone")

func (db *DB) swapBatched(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	s := &swapRequest{number: n, old: old, next: next, answer: make(chan error, 1)}
	err := db.swaps.submit(ctx, s)
	if err == nil {
		select {
		case err = <-s.answer:
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
			return false, err // it is under way
		}
	}
	return false, &notAppliedError{err}
}

// claim leaves of all those that their callers wait for, and lets none of
// these give up any more.
func claim(all []*swapRequest) []*swapRequest {
	return slices.DeleteFunc(all, func(s *swapRequest) bool { return !s.claimed.CompareAndSwap(false, true) })
}

// With SQLite the disk's flush is what costs: swaps of many numbers are one
// transaction.
const maxTxSwaps = 256

// flushSwapsTx does all in one transaction, or none.
func (db *DB) flushSwapsTx(all []*swapRequest) {
	err := db.countError(db.swapBatchTx(&all))
	for _, s := range all {
		s.answer <- err
	}
}

func (db *DB) swapBatchTx(all *[]*swapRequest) error {
	ctx := context.Background() // that of one must not end the others
	tx, err := db.pool.BeginTx(ctx, nil)
	*all = claim(*all)
	if err != nil {
		return &notAppliedError{err}
	}
	defer tx.Rollback() // where something panics
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

// updateBatchSQL changes all of its rows or fails: a version that is not the old one
// becomes NULL, which it may not, in a session that is strict as ours are. A
// transaction of several statements would say more of each, and keep its locks for as
// long as this process is frozen.
func updateBatchSQL(rows int) string {
	return "UPDATE phone_numbers SET begun_at = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, state = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, version = CASE" + strings.Repeat(" WHEN phone_number = ? AND version = ? THEN ?", rows) +
		" END WHERE phone_number IN (?" + strings.Repeat(", ?", rows-1) + ") AND @@sql_mode LIKE '%STRICT_ALL_TABLES%'"
}

// flushUpdates does all in one statement, but for numbers that are there twice.
func (db *DB) flushUpdates(all []*swapRequest) {
	together := all[:0]
	scattered := db.batchingPaused()
	for _, s := range claim(all) {
		if scattered || slices.ContainsFunc(together, func(t *swapRequest) bool { return t.number == s.number }) {
			s.answer <- errRunDirect
			continue
		}
		together = append(together, s)
	}
	if len(together) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), batchTimeout)
		defer cancel()
		db.updateBisecting(ctx, together)
	}
}

// updateBisecting does all in one statement. Where one of them lost its race none was
// done: then each half is one, and a few go alone.
func (db *DB) updateBisecting(ctx context.Context, all []*swapRequest) {
	var done bool
	var err error
	if len(all) == 1 {
		done, err = db.swapDirect(ctx, all[0].number, all[0].old, all[0].next)
	} else {
		err = db.countError(db.execBatchUpdate(ctx, all))
		done = err == nil
	}
	verdict := db.classify(err)
	if verdict&conflict != 0 && len(all) > smallBatch/2 {
		db.updateBisecting(ctx, all[:len(all)/2])
		db.updateBisecting(ctx, all[len(all)/2:])
		return
	}
	if err != nil && verdict&conflict == 0 {
		db.pauseBatching()
	}
	if verdict&(notApplied|conflict) != 0 && len(all) > 1 {
		err = errRunDirect
	}
	for _, s := range all {
		s.done = done
		s.answer <- err
	}
}

// execBatchUpdate swaps all or none. A row that is gone, as after a purge, leaves it
// unknown whose it was.
func (db *DB) execBatchUpdate(ctx context.Context, all []*swapRequest) error {
	update, rows := db.updateSmall, smallBatch
	if len(all) > smallBatch {
		update, rows = db.updateLarge, largeBatch
	}
	args := make([]any, 8*rows)
	begun, state, version, numbers := args[:2*rows], args[2*rows:4*rows], args[4*rows:7*rows], args[7*rows:]
	for i := range rows {
		number, old, next := "", []byte{}, verify.Record{State: []byte{}} // of a place that is over: no number's
		if i < len(all) {
			number, old, next = string(all[i].number), all[i].old[:], all[i].next
		}
		numbers[i] = cmp.Or(number, string(all[0].number))
		begun[2*i], begun[2*i+1] = number, next.BegunAt
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
