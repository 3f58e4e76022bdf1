package store

import (
	"context"
)

// With SQLite, flushing to disk is the main cost of a swap, so a batch of swaps is one
// transaction.
const maxTxSwaps = 256

// groupCommit runs swaps in one transaction for each batch, and loads directly.
type groupCommit struct {
	*direct
	swaps *batcher[swapRequest]
}

func newGroupCommit(d *direct) *groupCommit {
	g := &groupCommit{direct: d}
	// The breaker never opens: flush returns no error.
	g.swaps = newBatcher(1, maxTxSwaps, &breaker{}, d.swap, g.flush)
	return g
}

func (g *groupCommit) close() { g.swaps.close() }

func (g *groupCommit) swap(ctx context.Context, s swapRequest) result { return g.swaps.do(ctx, s) }

// flush runs all swaps in one transaction: all are applied, or none.
func (g *groupCommit) flush(all []*request[swapRequest]) error {
	claimed, done, err := g.swapTx(all)
	_ = g.db.countError(err)
	for i, r := range claimed {
		finish(g.db.swapResult(err == nil && done[i], err), r)
	}
	return nil
}

// swapTx claims the requests after it got the lock of the database, for which it may wait,
// and returns the claimed ones.
func (g *groupCommit) swapTx(all []*request[swapRequest]) (claimed []*request[swapRequest], done []bool, err error) {
	ctx := context.Background() // one request's context must not end the others
	tx, err := g.db.pool.BeginTx(ctx, nil)
	claimed = claim(all)
	if err != nil {
		return claimed, nil, &notAppliedError{err}
	}
	defer tx.Rollback() // if something panics
	insert, update := tx.StmtContext(ctx, g.insert), tx.StmtContext(ctx, g.update)
	done = make([]bool, len(claimed))
	for i, r := range claimed {
		if done[i], err = swap(ctx, insert, update, r.value); err != nil {
			if tx.Rollback() == nil {
				err = &notAppliedError{err}
			}
			return claimed, nil, err
		}
	}
	return claimed, done, tx.Commit()
}
