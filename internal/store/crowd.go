package store

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// errClosed is what is said to those who wait when the store is closed.
var errClosed = errors.New("the store is closed")

// A crowd hands what many callers ask for to few workers, each of whom takes all
// that waits when it is free, up to a bound: the busier, the cheaper each is. A
// caller who is alone waits for nobody.
type crowd[T any] struct {
	asked   chan T
	closed  chan struct{}
	close   sync.Once
	workers sync.WaitGroup
}

func newCrowd[T any](workers, most int, serve func([]T)) *crowd[T] {
	c := &crowd[T]{asked: make(chan T, most), closed: make(chan struct{})}
	for range workers {
		c.workers.Go(func() {
			for {
				select {
				case first := <-c.asked:
					serve(c.with(first, most))
				case <-c.closed:
					return
				}
			}
		})
	}
	return c
}

func (c *crowd[T]) with(first T, most int) []T {
	all := []T{first}
	for len(all) < most {
		select {
		case next := <-c.asked:
			all = append(all, next)
		default:
			return all
		}
	}
	return all
}

// ask hands in what is then served, unless ctx ends or the store is closed before.
func (c *crowd[T]) ask(ctx context.Context, one T) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select {
	case c.asked <- one:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-c.closed:
		return errClosed
	}
}

// end lets the workers finish what they are at. c may be nil.
func (c *crowd[T]) end() {
	if c != nil {
		c.close.Do(func() { close(c.closed) })
		c.workers.Wait()
	}
}

// Loads of many numbers are one statement: to a server a statement is more work
// than a row.
const (
	loaders      = 4
	loadsAtOnce  = 16
	loadPatience = 3 * time.Second // as a caller's
)

type loading struct {
	ctx    context.Context
	number verify.Number
	answer chan loaded
}

type loaded struct {
	record verify.Record
	err    error
}

func (db *DB) loadInCrowd(ctx context.Context, n verify.Number) (verify.Record, error) {
	l := loading{ctx, n, make(chan loaded, 1)}
	if err := db.loads.ask(ctx, l); err != nil {
		return verify.Record{}, err
	}
	select {
	case a := <-l.answer:
		return a.record, a.err
	case <-ctx.Done():
		return verify.Record{}, ctx.Err()
	case <-db.loads.closed:
		return verify.Record{}, errClosed
	}
}

func (db *DB) serveLoads(all []loading) {
	all = slices.DeleteFunc(all, func(l loading) bool { return l.ctx.Err() != nil })
	ctx, cancel := context.WithTimeout(context.Background(), loadPatience)
	defer cancel()
	switch len(all) {
	case 0:
	case 1:
		record, err := db.read(ctx, all[0].number)
		all[0].answer <- loaded{record, err}
	default:
		records, err := db.readMany(ctx, all)
		for _, l := range all {
			l.answer <- loaded{records[l.number], err}
		}
	}
}

func (db *DB) readMany(ctx context.Context, all []loading) (map[verify.Number]verify.Record, error) {
	var numbers [loadsAtOnce]any
	for i := range numbers {
		numbers[i] = string(all[min(i, len(all)-1)].number) // one that is there twice is found once
	}
	rows, err := db.loadMany.QueryContext(ctx, numbers[:]...)
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

// Swaps of many numbers are one transaction where the disk's flush is what costs.
// MySQL's engines do that by themselves.
const swapsAtOnce = 256

type swapping struct {
	number  verify.Number
	old     verify.Version
	next    verify.Record
	claimed atomic.Bool // by the worker, or by a caller who gave up first
	done    bool
	answer  chan error
}

func (db *DB) swapInCrowd(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	s := &swapping{number: n, old: old, next: next, answer: make(chan error, 1)}
	err := db.swaps.ask(ctx, s)
	if err == nil {
		select {
		case err = <-s.answer:
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
	return false, &withoutEffect{err}
}

// serveSwaps does all in one transaction, or none.
func (db *DB) serveSwaps(all []*swapping) {
	err := db.swapTogether(&all)
	for _, s := range all {
		s.answer <- err
	}
}

// swapTogether leaves of all those that their callers still wait for.
func (db *DB) swapTogether(all *[]*swapping) error {
	ctx := context.Background() // that of one must not end the others
	tx, err := db.pool.BeginTx(ctx, nil)
	*all = slices.DeleteFunc(*all, func(s *swapping) bool { return !s.claimed.CompareAndSwap(false, true) })
	if err != nil {
		return &withoutEffect{err}
	}
	insert, update := tx.StmtContext(ctx, db.insert), tx.StmtContext(ctx, db.update)
	for _, s := range *all {
		if s.done, err = swap(ctx, insert, update, s.number, s.old, s.next); err != nil {
			if tx.Rollback() == nil {
				err = &withoutEffect{err}
			}
			return err
		}
	}
	return tx.Commit()
}
