package store

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// For a MySQL server, one more statement costs more than one more row. So a batch of loads is one
// statement, and a batch of swaps is one statement. Each statement is prepared in two sizes, for 16
// and for 64 requests. In a smaller batch, the unused parameters repeat a number of the batch, or
// match no number, so they change nothing.
const (
	loadWorkers   = 2
	updateWorkers = 4 // more, since a commit can take longer than a read
	smallBatch    = 16
	largeBatch    = 64
	// batchTimeout is shorter than storeTimeout of package verify. So after a timeout of its batch, a
	// call has time to load the record and find out whether its swap was applied.
	batchTimeout = 1500 * time.Millisecond
)

// multiRow runs a batch of loads as one SELECT, and a batch of swaps as one UPDATE. It
// inserts new numbers directly.
type multiRow struct {
	*direct
	selects, updates [len(batchRows)]*sql.Stmt
	loads            *batcher[verify.Number]
	swaps            *batcher[swapRequest]
}

// batchRows contains the maximum number of requests of a statement for each size.
var batchRows = [...]int{smallBatch, largeBatch}

// sizeFor returns the index in batchRows of the smallest statement for a number of requests.
func sizeFor(requests int) int {
	return slices.IndexFunc(batchRows[:], func(rows int) bool { return rows >= requests })
}

func newMultiRow(d *direct) *multiRow {
	m := &multiRow{direct: d}
	shared := &breaker{pauses: d.db.counters.batchingPaused}
	m.loads = newBatcher(loadWorkers, largeBatch, shared, m.loadDirect, m.runLoads)
	m.swaps = newBatcher(updateWorkers, largeBatch, shared, d.swap, m.runUpdates)
	return m
}

func (m *multiRow) statements() []statement {
	all := m.direct.statements()
	for i, rows := range batchRows {
		all = append(all, statement{&m.selects[i], selectBatchSQL(rows)}, statement{&m.updates[i], updateBatchSQL(rows)})
	}
	return all
}

func (m *multiRow) close() {
	m.loads.close()
	m.swaps.close()
}

func (m *multiRow) load(ctx context.Context, n verify.Number) (verify.Record, error) {
	r := m.loads.do(ctx, n)
	return r.record, r.err
}

func (m *multiRow) loadDirect(ctx context.Context, n verify.Number) result {
	record, err := m.direct.load(ctx, n)
	if err != nil {
		return result{err: err}
	}
	return result{outcome: outcomeApplied, record: record}
}

// runLoads runs a batch of loads as one statement.
func (m *multiRow) runLoads(all []*request[verify.Number]) error {
	all = claim(all)
	ctx, cancel := context.WithTimeout(context.Background(), batchTimeout)
	defer cancel()
	switch len(all) {
	case 0:
		return nil
	case 1:
		r := m.loadDirect(ctx, all[0].value)
		finish(r, all[0])
		return r.err
	}
	records, err := m.loadBatch(ctx, all)
	if err != nil {
		return m.db.countError(err)
	}
	for _, r := range all {
		finish(result{outcome: outcomeApplied, record: records[r.value]}, r)
	}
	return nil
}

func selectBatchSQL(rows int) string {
	return "SELECT version, begun_at, state, phone_number FROM phone_numbers WHERE phone_number IN (?" + strings.Repeat(", ?", rows-1) + ")"
}

func (m *multiRow) loadBatch(ctx context.Context, all []*request[verify.Number]) (map[verify.Number]verify.Record, error) {
	size := sizeFor(len(all))
	numbers := make([]any, batchRows[size])
	for i := range numbers {
		numbers[i] = string(all[min(i, len(all)-1)].value) // a repeated number returns one row
	}
	rows, err := m.selects[size].QueryContext(ctx, numbers...)
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

func (m *multiRow) swap(ctx context.Context, s swapRequest) result {
	if s.old == (verify.Version{}) {
		return m.direct.swap(ctx, s)
	}
	return m.swaps.do(ctx, s)
}

// updateBatchSQL returns an UPDATE that swaps all of its rows that exist, or none. A row whose version
// is not the expected version gets version = NULL. The column is NOT NULL, so in strict mode the
// whole statement fails (error 1048). The last condition matches no row if the session is
// not strict. A transaction of several statements would return a result for each row. But a pause of
// this process between two statements, for example by its hypervisor, would prolong the locks.
func updateBatchSQL(rows int) string {
	return "UPDATE phone_numbers SET begun_at = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, state = CASE phone_number" + strings.Repeat(" WHEN ? THEN ?", rows) +
		" END, version = CASE" + strings.Repeat(" WHEN phone_number = ? AND version = ? THEN ?", rows) +
		" END WHERE phone_number IN (?" + strings.Repeat(", ?", rows-1) + ") AND @@sql_mode LIKE '%STRICT_ALL_TABLES%'"
}

// runUpdates runs a batch of swaps as one statement. If a number occurs twice, its second swap
// runs directly.
func (m *multiRow) runUpdates(all []*request[swapRequest]) error {
	var batch []*request[swapRequest]
	for _, r := range claim(all) {
		if slices.ContainsFunc(batch, func(other *request[swapRequest]) bool { return other.value.number == r.value.number }) {
			finish(result{outcome: outcomeRunDirect}, r)
			continue
		}
		batch = append(batch, r)
	}
	if len(batch) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), batchTimeout)
	defer cancel()
	return m.updateBisecting(ctx, batch)
}

// updateBisecting runs the swaps as one statement. If a row conflicts, no swap was applied. Then it
// retries each half of the batch. If the batch has eight swaps or fewer, they run directly.
func (m *multiRow) updateBisecting(ctx context.Context, all []*request[swapRequest]) error {
	if len(all) == 1 {
		r := m.direct.swap(ctx, all[0].value)
		finish(r, all[0])
		return r.err
	}
	err := m.db.countError(m.updateBatch(ctx, all))
	r := m.db.swapResult(err == nil, err)
	if r.outcome == outcomeConflict && len(all) > smallBatch/2 {
		half := len(all) / 2
		return errors.Join(m.updateBisecting(ctx, all[:half]), m.updateBisecting(ctx, all[half:]))
	}
	failure := r.err
	if r.outcome == outcomeConflict || r.outcome == outcomeNotApplied {
		r = result{outcome: outcomeRunDirect}
	}
	finish(r, all...)
	return failure
}

// updateBatch applies all swaps or none, with one exception. If a row is missing, for example after a
// purge, the other swaps are applied, and the returned error makes every outcome unknown.
func (m *multiRow) updateBatch(ctx context.Context, all []*request[swapRequest]) error {
	size := sizeFor(len(all))
	rows := batchRows[size]
	args := make([]any, 8*rows)
	begunAt, state, version, numbers := args[:2*rows], args[2*rows:4*rows], args[4*rows:7*rows], args[7*rows:]
	for i := range rows {
		number, old, next := "", []byte{}, verify.Record{State: []byte{}} // unused: matches no number
		if i < len(all) {
			s := &all[i].value
			number, old, next = string(s.number), s.old[:], s.next
		}
		numbers[i] = cmp.Or(number, string(all[0].value.number))
		begunAt[2*i], begunAt[2*i+1] = number, next.BegunAt
		state[2*i], state[2*i+1] = number, next.State
		version[3*i], version[3*i+1], version[3*i+2] = number, old, next.Version[:]
	}
	result, err := m.updates[size].ExecContext(ctx, args...)
	if err != nil {
		return err
	}
	changed, err := result.RowsAffected()
	if err == nil && changed != int64(len(all)) {
		err = fmt.Errorf("%d of %d rows were there", changed, len(all))
	}
	return err
}
