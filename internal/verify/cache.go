package verify

import "sync"

// recordCache keeps the records that this process wrote last, so that the next swap of a number
// needs no load. It keeps only records that have codes. It has two generations: if current is
// full, previous is dropped, and current becomes previous.
type recordCache struct {
	mu                sync.Mutex
	current, previous map[Number]Record
}

const maxGeneration = 1 << 15 // two generations take about 15 MB

// take removes the record of n from the cache and returns it.
func (r *recordCache) take(n Number) (record Record, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, records := range []map[Number]Record{r.current, r.previous} {
		if record, ok = records[n]; ok {
			delete(records, n)
			break
		}
	}
	return record, ok
}

// put adds a record that this process has just written.
func (r *recordCache) put(n Number, record Record) {
	if record.State[headerBytes-1] == 0 {
		return // without codes, a call is not expected soon
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current == nil || len(r.current) >= maxGeneration {
		r.current, r.previous = map[Number]Record{}, r.current
	}
	r.current[n] = record
}
