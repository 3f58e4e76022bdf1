package store

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// BenchmarkSQLiteSwap measures swaps a second on a file, as a ratio of writes of a page that
// are flushed one after the other.
func BenchmarkSQLiteSwap(b *testing.B) {
	const rounds, span = 5, time.Second
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			for b.Loop() {
				db := openHere(b, "sqlite:"+filepath.Join(b.TempDir(), "store.db"))
				var ratios, p99 []float64
				for range rounds {
					flushes := flushes(b, span)
					swaps, slow := swaps(b, db, callers, span)
					ratios = append(ratios, swaps/flushes)
					p99 = append(p99, float64(slow.Microseconds())/1000)
				}
				slices.Sort(ratios)
				slices.Sort(p99)
				b.ReportMetric(ratios[rounds/2], "of-the-disk") // ratio to sequential flushes
				b.ReportMetric(p99[rounds/2], "p99-ms")
			}
		})
	}
}

func flushes(b *testing.B, span time.Duration) (perSecond float64) {
	b.Helper()
	file, err := os.Create(filepath.Join(b.TempDir(), "page"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	const pages = 1000 // as SQLite's log, which it rewrites
	page := make([]byte, 4096)
	file.Write(make([]byte, pages*len(page)))
	n := 0
	for start := time.Now(); time.Since(start) < span; n++ {
		if _, err := file.WriteAt(page, int64(n%pages*len(page))); err != nil {
			b.Fatal(err)
		}
		if err := syscall.Fdatasync(int(file.Fd())); err != nil {
			b.Fatal(err)
		}
	}
	return float64(n) / span.Seconds()
}

func swaps(b *testing.B, db *DB, callers int, span time.Duration) (perSecond float64, p99 time.Duration) {
	b.Helper()
	var group sync.WaitGroup
	var failed atomic.Value
	took := make([][]time.Duration, callers)
	start := time.Now()
	for caller := range callers {
		group.Go(func() {
			var old verify.Version
			for n := verify.Number(""); time.Since(start) < span; {
				if old == (verify.Version{}) || rand.N(3) == 0 {
					n, old = verify.Number(fmt.Sprintf("+86%013d", rand.N(uint64(1e13)))), verify.Version{}
				}
				next := verify.Record{State: make([]byte, 59)}
				*(*[8]byte)(next.Version[:]) = [8]byte(fmt.Appendf(nil, "%08x", rand.Uint32()))
				began := time.Now()
				if done, err := db.Swap(b.Context(), n, old, next); err != nil || !done {
					failed.Store(fmt.Sprint(done, err))
					return
				}
				took[caller] = append(took[caller], time.Since(began))
				old = next.Version
			}
		})
	}
	group.Wait()
	if failure := failed.Load(); failure != nil {
		b.Fatal(failure)
	}
	all := slices.Concat(took...)
	slices.Sort(all)
	return float64(len(all)) / span.Seconds(), all[len(all)*99/100]
}
