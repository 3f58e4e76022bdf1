package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	dto "github.com/prometheus/client_model/go"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const testRetention = 24 * time.Hour

// onShared runs a test on every engine that two handles can share.
func onShared(t *testing.T, test func(t *testing.T, dsn string)) {
	t.Run("server", func(t *testing.T) { test(t, mysqltest.DSN(t)) })
	t.Run("SQLite", func(t *testing.T) { test(t, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")) })
}

// begunAgo stores numbers whose last send was that long ago.
func begunAgo(t testing.TB, db *DB, ago time.Duration, numbers ...verify.Number) {
	t.Helper()
	for _, n := range numbers {
		if done, err := db.Swap(t.Context(), n, verify.Version{}, randomRecord(time.Now().Add(-ago).UnixMicro())); !done || err != nil {
			t.Fatalf("Swap = %v, %v; want true", done, err)
		}
	}
}

func numbered(prefix string, count int) (numbers []verify.Number) {
	for i := range count {
		numbers = append(numbers, verify.Number(fmt.Sprintf("+%s%06d", prefix, i)))
	}
	return numbers
}

func mustPurge(t *testing.T, db *DB, want int64) {
	t.Helper()
	if got, err := db.Purge(t.Context(), testRetention); got != want || err != nil {
		t.Fatalf("Purge = %d, %v; want %d", got, err, want)
	}
}

func isThere(t *testing.T, db *DB, n verify.Number) bool {
	t.Helper()
	r, err := db.direct.load(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return r.Version != verify.Version{}
}

// setLease makes the next purge due at that time.
func setLease(t *testing.T, db *DB, due time.Time) {
	t.Helper()
	lease, err := db.direct.load(t.Context(), purgeLeaseKey)
	if err != nil {
		t.Fatal(err)
	}
	if held, err := db.renewLease(t.Context(), &lease, time.Until(due)); !held || err != nil {
		t.Fatalf("renewLease = %v, %v; want true", held, err)
	}
}

func TestPurge_DeletesOnlyRowsOlderThanTheRetention(t *testing.T) {
	onShared(t, func(t *testing.T, dsn string) {
		db := openHere(t, dsn)
		old, young := numbered("1", 2*purgeRows+7), numbered("2", 30)
		begunAgo(t, db, testRetention+time.Second, old...)
		begunAgo(t, db, testRetention-time.Minute, young...)
		mustPurge(t, db, int64(len(old)))
		for _, n := range old {
			if isThere(t, db, n) {
				t.Fatalf("%s: got a row; want it purged", n)
			}
		}
		for _, n := range young {
			if !isThere(t, db, n) {
				t.Fatalf("%s: got no row; want it kept", n)
			}
		}
		if got := counted(t, db.counters.purged); got != float64(len(old)) {
			t.Errorf("the metric: got %v rows; want %d", got, len(old))
		}
	})
}

func TestPurge_OneReplicaPurgesOncePerHour(t *testing.T) {
	onShared(t, func(t *testing.T, dsn string) {
		db, other := openHere(t, dsn), openHere(t, dsn)
		begunAgo(t, db, 2*testRetention, numbered("1", 10)...)
		mustPurge(t, db, 10)
		begunAgo(t, db, 2*testRetention, numbered("2", 10)...)
		mustPurge(t, other, 0)
		mustPurge(t, db, 0)
		setLease(t, db, time.Now().Add(purgeLeaseTTL/2)) // another replica is purging
		mustPurge(t, other, 0)
		setLease(t, db, time.Now().Add(-time.Second)) // another replica was killed while purging
		mustPurge(t, other, 10)
		begunAgo(t, db, 2*testRetention, numbered("3", 10)...)
		setLease(t, db, time.Now().Add(24*time.Hour)) // written by a clock that was ahead
		mustPurge(t, db, 10)
		lease, err := db.direct.load(t.Context(), purgeLeaseKey)
		if next := time.Until(time.UnixMicro(lease.BegunAt)); err != nil || next > purgeInterval || next < purgeInterval-time.Minute {
			t.Errorf("the next purge is due in %v, %v; want an hour", next, err)
		}
	})
}

func TestPurge_OneOfManyConcurrentReplicasPurges(t *testing.T) {
	onShared(t, func(t *testing.T, dsn string) {
		handles := []*DB{openHere(t, dsn), openHere(t, dsn), openHere(t, dsn)}
		begunAgo(t, handles[0], 2*testRetention, numbered("1", 3*purgeRows)...)
		var purging sync.WaitGroup
		purged := make([]int64, len(handles))
		for i, db := range handles {
			purging.Go(func() {
				var err error
				if purged[i], err = db.Purge(t.Context(), testRetention); err != nil {
					t.Errorf("handle %d: %v", i, err)
				}
			})
		}
		purging.Wait()
		purgers := 0
		for _, n := range purged {
			if n > 0 {
				purgers++
			}
		}
		if purgers != 1 {
			t.Errorf("rows purged by each handle: got %v; want some by one handle only", purged)
		}
	})
}

func TestPurge_KeepsANumberWithANewSend(t *testing.T) {
	onShared(t, func(t *testing.T, dsn string) {
		db, other := openHere(t, dsn), openHere(t, dsn)
		numbers := numbered("1", 20*purgeRows)
		begunAgo(t, db, 2*testRetention, numbers...)
		var sending sync.WaitGroup
		sent := make([]bool, len(numbers))
		const senders = 8
		// Not the order of the purge, which could come too late for every row.
		order := rand.Perm(len(numbers))
		for s := range senders {
			sending.Go(func() {
				for j := s; j < len(numbers); j += senders {
					i := order[j]
					old, err := other.direct.load(t.Context(), numbers[i])
					if err != nil && other.classify(err)&(conflict|notApplied) == 0 {
						t.Error(err)
						return
					}
					if err != nil || old.Version == (verify.Version{}) {
						continue
					}
					got := other.direct.swap(t.Context(), swapRequest{numbers[i], old.Version, randomRecord(time.Now().UnixMicro())})
					if sent[i] = got.outcome == outcomeApplied; got.outcome == outcomeUnknown {
						t.Error(got.err)
						return
					}
				}
			})
		}
		purged, err := db.Purge(t.Context(), testRetention)
		sending.Wait()
		if err != nil {
			t.Fatal(err)
		}
		kept := 0
		for i, n := range numbers {
			if sent[i] {
				kept++
				if !isThere(t, db, n) {
					t.Fatalf("%s: got no row; want it kept after its send", n)
				}
			}
		}
		t.Logf("%d numbers with a send, %d purged", kept, purged)
		if kept == 0 || purged == 0 || int64(kept)+purged < int64(len(numbers)) {
			t.Errorf("got %d numbers with a send and %d purged, of %d; want some of each, and all in one of them", kept, purged, len(numbers))
		}
	})
}

func TestPurge_UsesTheEarlierOfTwoClocks(t *testing.T) {
	cfg, err := mysql.ParseDSN(mysqltest.DSN(t))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Params = map[string]string{"timestamp": fmt.Sprint(time.Now().Add(-48 * time.Hour).Unix())} // the current time of its sessions
	db := openHere(t, cfg.FormatDSN())
	begunAgo(t, db, 47*time.Hour, "+1")
	begunAgo(t, db, 73*time.Hour, "+2")
	mustPurge(t, db, 1)
	if !isThere(t, db, "+1") {
		t.Error("a send in the future of the database's clock: got no row; want it kept")
	}
}

func TestPurge_FindsOldRowsByIndex(t *testing.T) {
	const oldest = "EXPLAIN %s SELECT phone_number, begun_at FROM phone_numbers WHERE begun_at >= 0 AND begun_at < 5 ORDER BY begun_at LIMIT 100"
	for name, c := range map[string]struct{ dsn, explain, want string }{
		"server": {mysqltest.DSN(t), fmt.Sprintf(oldest, "FORMAT=TRADITIONAL"), "begun_at"},
		"SQLite": {"sqlite:" + filepath.Join(t.TempDir(), "codes.db"), fmt.Sprintf(oldest, "QUERY PLAN"), "USING INDEX phone_numbers_begun_at"},
	} {
		t.Run(name, func(t *testing.T) {
			db := openHere(t, c.dsn)
			begunAgo(t, db, 0, numbered("1", 500)...)
			rows, err := db.pool.Query(c.explain)
			if err != nil {
				t.Fatal(err)
			}
			defer rows.Close()
			columns, _ := rows.Columns()
			var plan []string
			for rows.Next() {
				values := make([]any, len(columns))
				for i := range values {
					values[i] = new(any)
				}
				if err := rows.Scan(values...); err != nil {
					t.Fatal(err)
				}
				for i, v := range values {
					text := fmt.Sprintf("%s", *v.(*any))
					if name != "server" || columns[i] == "key" {
						plan = append(plan, text)
					}
				}
			}
			if got := strings.Join(plan, " "); !strings.Contains(got, c.want) || rows.Err() != nil {
				t.Errorf("got the plan %q, %v; want %q in it", got, rows.Err(), c.want)
			}
		})
	}
}

// A locked row stops the purge only when the purge deletes that row, and the next purge is
// due within minutes, not after an hour.
func TestPurge_LockedRowDelaysItsOwnDeleteOnly(t *testing.T) {
	db := openHere(t, mysqltest.DSN(t))
	old, young := numbered("1", 3*purgeRows), numbered("2", 40) // few: an engine could read the whole table
	begunAgo(t, db, 2*testRetention, old...)
	begunAgo(t, db, 0, young...)
	lock := func(n verify.Number) (unlock func() error) {
		tx, err := db.pool.BeginTx(t.Context(), nil)
		if err == nil {
			_, err = tx.ExecContext(t.Context(), "UPDATE phone_numbers SET state = '' WHERE phone_number = ?", string(n))
		}
		if err != nil {
			t.Fatal(err)
		}
		return tx.Rollback
	}
	unlockYoung, unlockOld := lock(young[0]), lock(old[purgeRows+3])
	purged, err := db.Purge(t.Context(), testRetention)
	if purged != purgeRows || err == nil || !strings.Contains(err.Error(), "1205") {
		t.Errorf("Purge = %d, %v; want the first %d, then 1205", purged, err, purgeRows)
	}
	if err := unlockOld(); err != nil {
		t.Fatal(err)
	}
	lease, err := db.direct.load(t.Context(), purgeLeaseKey)
	if wait := time.Until(time.UnixMicro(lease.BegunAt)); err != nil || wait > purgeLeaseTTL {
		t.Errorf("the next purge is due in %v, %v; want %v at most", wait, err, purgeLeaseTTL)
	}
	setLease(t, db, time.Now().Add(-time.Second))
	mustPurge(t, db, int64(len(old)-purgeRows))
	if err := unlockYoung(); err != nil {
		t.Fatal(err)
	}
}

func TestPurge_ContinuesAfterAnInterruption(t *testing.T) {
	onShared(t, func(t *testing.T, dsn string) {
		db := openHere(t, dsn)
		begunAgo(t, db, 2*testRetention, numbered("1", 5*purgeRows)...)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if purged, err := db.Purge(ctx, testRetention); purged != 0 || !errors.Is(err, context.Canceled) {
			t.Errorf("Purge = %d, %v; want 0 and %v", purged, err, context.Canceled)
		}
		mustPurge(t, db, 5*purgeRows)
	})
}

func TestRunPurge_CountsRowsAndLogsMissingRights(t *testing.T) {
	mysqltest.SkipOnExisting(t, "triggers")
	db := openHere(t, mysqltest.DSN(t))
	begunAgo(t, db, 2*testRetention, numbered("1", 50)...)
	exec(t, db, "ANALYZE TABLE phone_numbers")
	exec(t, db, "CREATE TRIGGER keeps BEFORE DELETE ON phone_numbers FOR EACH ROW SIGNAL SQLSTATE '42000' SET MYSQL_ERRNO = 1142")
	var log testutil.Output
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); db.RunPurge(ctx, testRetention, slog.New(slog.NewTextHandler(&log, nil))) }()
	testutil.Eventually(t, "the log has the cause", func() bool { return log.Contains("the user needs SELECT, INSERT, UPDATE and DELETE") })
	cancel()
	<-done
	if got := log.String(); strings.Count(got, "1142") != 1 {
		t.Errorf("got the log %q; want one line with 1142", got)
	}
	if got := counted(t, db.counters.rows); got < 40 || got > 60 {
		t.Errorf("got %v rows, want about 51", got)
	}
	if !isThere(t, db, numbered("1", 1)[0]) {
		t.Error("got no row; want it kept, since it cannot be deleted")
	}
}

// MySQL caches the number of rows for a day, unless the session forbids it.
func TestEstimateRows_IsCurrent(t *testing.T) {
	onShared(t, func(t *testing.T, dsn string) {
		db := openHere(t, dsn)
		estimate := func() float64 {
			if err := db.estimateRows(t.Context()); err != nil {
				t.Fatalf("estimateRows = %v; want nil", err)
			}
			return counted(t, db.counters.rows)
		}
		begunAgo(t, db, 0, numbered("1", 50)...)
		testutil.Eventually(t, "the estimate has the first 50 rows", func() bool { n := estimate(); return n > 25 && n < 100 })
		begunAgo(t, db, 0, numbered("2", 500)...)
		testutil.Eventually(t, "the estimate has 500 more rows", func() bool { return estimate() > 400 })
	})
}

// TestPurge_WithoutTheRightWaitsAnHour purges as a user without the right to delete. A retry
// each minute would not help.
func TestPurge_WithoutTheRightWaitsAnHour(t *testing.T) {
	mysqltest.SkipOnExisting(t, "an account of its own")
	dsn := mysqltest.DSN(t)
	admin := openHere(t, dsn)
	cfg, err := mysql.ParseDSN(dsn)
	if err != nil {
		t.Fatal(err)
	}
	cfg.User, cfg.Passwd = cfg.DBName[:20], "w" // a user of this test only
	account := "'" + cfg.User + "'@'%'"
	exec(t, admin, "CREATE USER "+account+" IDENTIFIED BY 'w'")
	t.Cleanup(func() { admin.pool.Exec("DROP USER " + account) })
	exec(t, admin, "GRANT SELECT, INSERT, UPDATE ON phone_numbers TO "+account)
	db := openHere(t, cfg.FormatDSN())
	begunAgo(t, db, 2*testRetention, numbered("1", 1)...)
	if _, err := db.Purge(t.Context(), testRetention); err == nil ||
		!strings.Contains(err.Error(), "needs SELECT, INSERT, UPDATE and DELETE") {
		t.Errorf("Purge = %v; want an error that names the rights", err)
	}
	lease, err := db.direct.load(t.Context(), purgeLeaseKey)
	if next := time.Until(time.UnixMicro(lease.BegunAt)); err != nil || next < purgeInterval-time.Minute {
		t.Errorf("the next purge is due in %v, %v; want an hour", next, err)
	}
}

func counted(t *testing.T, m interface{ Write(*dto.Metric) error }) float64 {
	t.Helper()
	var d dto.Metric
	if err := m.Write(&d); err != nil {
		t.Fatal(err)
	}
	return d.GetCounter().GetValue() + d.GetGauge().GetValue()
}

func TestMetrics_CountStatementErrorsByNumber(t *testing.T) {
	mysqltest.SkipOnExisting(t, "triggers")
	db := openHere(t, mysqltest.DSN(t))
	exec(t, db, "CREATE TRIGGER breaks BEFORE INSERT ON phone_numbers FOR EACH ROW SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 1205")
	if _, err := db.Swap(t.Context(), "+1", verify.Version{}, randomRecord(1)); err == nil {
		t.Fatal("Swap = nil; want an error")
	}
	if got := counted(t, db.counters.errors.WithLabelValues("1205")); got != 1 {
		t.Errorf("errors 1205: got a count of %v; want 1", got)
	}
	db.pool.Close()
	if _, err := db.direct.load(t.Context(), "+1"); err == nil {
		t.Fatal("load on a closed pool = nil; want an error")
	}
	if got := counted(t, db.counters.errors.WithLabelValues("other")); got != 1 {
		t.Errorf("other errors: got a count of %v; want 1", got)
	}
}
