package store

import "context"

// maxTxSwaps is the maximum size of a batch. With SQLite, the main cost of a swap is the flush to disk.
// A batch of swaps is one transaction, and so needs one flush.
const maxTxSwaps = 256

// groupCommit runs swaps in one transaction for each batch, and loads directly.
type groupCommit struct {
	*direct
	swaps *batcher[swapRequest]
}

func newGroupCommit(d *direct) *groupCommit {
	g := &groupCommit{direct: d}
	// This breaker never opens, because runSwaps returns no error.
	g.swaps = newBatcher(1, maxTxSwaps, &breaker{}, d.swap, g.runSwaps)
	return g
}

func (g *groupCommit) close() { g.swaps.close() }

func (g *groupCommit) swap(ctx context.Context, s swapRequest) result { return g.swaps.do(ctx, s) }

// runSwaps runs a batch of swaps as one transaction. Either all swaps without a conflict are applied, or
// none.
func (g *groupCommit) runSwaps(all []*request[swapRequest]) error {
	claimed, applied, err := g.swapTx(all)
	_ = g.db.countError(err)
	for i, r := range claimed {
		finish(g.db.swapResult(err == nil && applied[i], err), r)
	}
	return nil
}

// swapTx runs a batch of swaps in one transaction. It claims the requests only after it has the lock
// of the database, because their calls can give up while it waits for the lock. It returns the claimed
// requests, and for each whether its swap changed the row.
func (g *groupCommit) swapTx(all []*request[swapRequest]) (claimed []*request[swapRequest], applied []bool, err error) {
	ctx := context.Background() // one call's context must not cancel the batch
	tx, err := g.db.pool.BeginTx(ctx, nil)
	claimed = claim(all)
	if err != nil {
		return claimed, nil, &notAppliedError{err}
	}
	defer tx.Rollback() // for a panic
	insert, update := tx.StmtContext(ctx, g.insert), tx.StmtContext(ctx, g.update)
	applied = make([]bool, len(claimed))
	for i, r := range claimed {
		if applied[i], err = swap(ctx, insert, update, r.value); err != nil {
			if tx.Rollback() == nil {
				err = &notAppliedError{err}
			}
			return claimed, nil, err
		}
	}
	return claimed, applied, tx.Commit()
}
