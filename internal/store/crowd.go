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

// A crowd hands what many callers ask for to few workers, each of whom takes all
// that waits when it is free, up to a bound: the busier, the cheaper each is. A
// caller who is alone waits for nobody.
type crowd[T interface{ fail(error) }] struct {
	asked   chan T
	closed  chan struct{}
	close   sync.Once
	workers sync.WaitGroup
}

func newCrowd[T interface{ fail(error) }](workers, most int, serve func([]T)) *crowd[T] {
	c := &crowd[T]{asked: make(chan T, most), closed: make(chan struct{})}
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
				case first := <-c.asked:
					runtime.Gosched() // those who are about to ask come along
					surviving(c.with(first, most))
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

// To a MySQL server a statement is more work than a row: loads of many numbers are one
// statement, and so are swaps. Both are prepared in two sizes, and one that is not full
// repeats a number.
const (
	loaders  = 2
	updaters = 4 // more, since a commit can take longer than a read
	fewRows  = 16
	manyRows = 64
	// Shorter than a caller's, who can then still find out alone what was done.
	patience = 1500 * time.Millisecond
)

// scatter has everybody go alone for a while: a connection that hangs, or a row that
// somebody has locked, is to hold up as few as it can.
func (db *DB) scatter() {
	if !db.isScattered() {
		db.counters.scattered.Inc()
	}
	db.scattered.Store(time.Now().Add(10 * time.Second).UnixNano())
}

func (db *DB) isScattered() bool { return time.Now().UnixNano() < db.scattered.Load() }

type loading struct {
	ctx    context.Context
	number verify.Number
	answer chan loaded
}

type loaded struct {
	record verify.Record
	err    error
}

// fail answers who was not answered yet.
func (l loading) fail(err error) {
	select {
	case l.answer <- loaded{err: err}:
	default:
	}
}

func (db *DB) loadInCrowd(ctx context.Context, n verify.Number) (verify.Record, error) {
	l := loading{ctx, n, make(chan loaded, 1)}
	if err := db.loads.ask(ctx, l); err != nil {
		return verify.Record{}, err
	}
	select {
	case a := <-l.answer:
		if errors.Is(a.err, errAlone) {
			return db.read(ctx, n)
		}
		return a.record, a.err
	case <-ctx.Done():
		return verify.Record{}, ctx.Err()
	case <-db.loads.closed:
		return verify.Record{}, errClosed
	}
}

func (db *DB) serveLoads(all []loading) {
	all = slices.DeleteFunc(all, func(l loading) bool { return l.ctx.Err() != nil })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var one verify.Record
	var each map[verify.Number]verify.Record
	var err error
	switch {
	case len(all) == 0:
	case db.isScattered():
		for _, l := range all {
			l.answer <- loaded{err: errAlone}
		}
	case len(all) == 1:
		one, err = db.read(ctx, all[0].number)
		all[0].answer <- loaded{one, err}
	default:
		each, err = db.readMany(ctx, all)
		_ = db.count(err)
		for _, l := range all {
			l.answer <- loaded{each[l.number], err}
		}
	}
	if err != nil {
		db.scatter()
	}
}

func loadMany(rows int) string {
	return "SELECT version, begun_at, state, phone_number FROM phone_numbers WHERE phone_number IN (?" + strings.Repeat(", ?", rows-1) + ")"
}

func (db *DB) readMany(ctx context.Context, all []loading) (map[verify.Number]verify.Record, error) {
	load, numbers := db.loadFew, make([]any, fewRows)
	if len(all) > fewRows {
		load, numbers = db.loadMany, make([]any, manyRows)
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

type swapping struct {
	number  verify.Number
	old     verify.Version
	next    verify.Record
	claimed atomic.Bool // by the worker, or by a caller who gave up first
	done    bool
	answer  chan error
}

// fail answers who was not answered yet. s is nil for who had given up.
func (s *swapping) fail(err error) {
	if s != nil {
		select {
		case s.answer <- err:
		default:
		}
	}
}

// errAlone is the answer to who was surely not served and is to be a statement of his
// own, which no other can hold up.
var errAlone = errors.New("to be served alone")

func (db *DB) swapInCrowd(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	s := &swapping{number: n, old: old, next: next, answer: make(chan error, 1)}
	err := db.swaps.ask(ctx, s)
	if err == nil {
		select {
		case err = <-s.answer:
			if errors.Is(err, errAlone) {
				return db.swapAlone(ctx, n, old, next)
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
	return false, &withoutEffect{err}
}

// stillAwaited leaves of all those that their callers wait for, and lets none of
// these give up any more.
func stillAwaited(all []*swapping) []*swapping {
	return slices.DeleteFunc(all, func(s *swapping) bool { return !s.claimed.CompareAndSwap(false, true) })
}

// With SQLite the disk's flush is what costs: swaps of many numbers are one
// transaction.
const swapsAtOnce = 256

// serveSwaps does all in one transaction, or none.
func (db *DB) serveSwaps(all []*swapping) {
	err := db.count(db.swapTogether(&all))
	for _, s := range all {
		s.answer <- err
	}
}

func (db *DB) swapTogether(all *[]*swapping) error {
	ctx := context.Background() // that of one must not end the others
	tx, err := db.pool.BeginTx(ctx, nil)
	*all = stillAwaited(*all)
	if err != nil {
		return &withoutEffect{err}
	}
	defer tx.Rollback() // where something panics
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

// updateMany changes all of its rows or fails: a version that is not the old one
// becomes NULL, which it may not, in a session that is strict as ours are. A
// transaction of several statements would say more of each, and keep its locks for as
// long as this process is frozen.
func updateMany(rows int) string {
	return "UPDATE phone_numbers SET begun_at = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, state = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, version = CASE" + strings.Repeat(" WHEN phone_number = ? AND version = ? THEN ?", rows) +
		" END WHERE phone_number IN (?" + strings.Repeat(", ?", rows-1) + ") AND @@sql_mode LIKE '%STRICT_ALL_TABLES%'"
}

// serveUpdates does all in one statement, but for numbers that are there twice.
func (db *DB) serveUpdates(all []*swapping) {
	together := all[:0]
	scattered := db.isScattered()
	for _, s := range stillAwaited(all) {
		if scattered || slices.ContainsFunc(together, func(t *swapping) bool { return t.number == s.number }) {
			s.answer <- errAlone
			continue
		}
		together = append(together, s)
	}
	if len(together) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		db.updateOrHalve(ctx, together)
	}
}

// updateOrHalve does all in one statement. Where one of them lost its race none was
// done: then each half is one, and a few go alone.
func (db *DB) updateOrHalve(ctx context.Context, all []*swapping) {
	var done bool
	var err error
	if len(all) == 1 {
		done, err = db.swapAlone(ctx, all[0].number, all[0].old, all[0].next)
	} else {
		err = db.count(db.updateTogether(ctx, all))
		done = err == nil
	}
	verdict := db.judge(err)
	if verdict&lostRace != 0 && len(all) > fewRows/2 {
		db.updateOrHalve(ctx, all[:len(all)/2])
		db.updateOrHalve(ctx, all[len(all)/2:])
		return
	}
	if err != nil && verdict&lostRace == 0 {
		db.scatter()
	}
	if verdict&(noEffect|lostRace) != 0 && len(all) > 1 {
		err = errAlone
	}
	for _, s := range all {
		s.done = done
		s.answer <- err
	}
}

// updateTogether swaps all or none. A row that is gone, as after a purge, leaves it
// unknown whose it was.
func (db *DB) updateTogether(ctx context.Context, all []*swapping) error {
	update, rows := db.updateFew, fewRows
	if len(all) > fewRows {
		update, rows = db.updateMany, manyRows
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
