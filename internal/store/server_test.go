package store_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

func TestSwap_SurvivesTheEndOfTheServer(t *testing.T) {
	server := mysqltest.Start(t)
	db := open(t, server.DSN(mysqltest.Database))
	for name, end := range map[string]func(){"killed": server.Kill, "stopped": server.Stop} {
		t.Run(name, func(t *testing.T) {
			const writers = 8
			type history struct{ applied, last verify.Record }
			var histories [writers]history
			var group, running sync.WaitGroup
			running.Add(writers)
			for i := range writers {
				group.Go(func() {
					n, h := verify.Number(fmt.Sprint(name, i)), &histories[i]
					for round := 0; ; round++ {
						h.last = record(fmt.Sprint(round), int64(round))
						done, err := db.Swap(t.Context(), n, h.applied.Version, h.last)
						if err == nil && !done {
							t.Error("Swap = false; want true: there is no other writer")
						}
						if err != nil && !isUnknown(err) {
							h.last = h.applied // definitely not applied
						}
						if !done {
							return
						}
						h.applied = h.last
						if round == 10 {
							running.Done()
						}
					}
				})
			}
			running.Wait()
			end()
			group.Wait()

			if done, err := db.Swap(t.Context(), number, none, record("away", 1)); done || err == nil || isUnknown(err) {
				t.Errorf("Swap while the server is away = %v, %v; want an error that is not unknown", done, err)
			}
			if err := db.Ready(t.Context()); err == nil {
				t.Error("Ready while the server is away = nil; want an error")
			}
			waiting, err := store.Open(server.DSN(mysqltest.Database))
			if err != nil {
				t.Fatal(err)
			}
			defer waiting.Close()
			if err := waiting.Prepare(t.Context()); !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("Prepare while the server is away = %v; want %v", err, store.ErrUnavailable)
			}

			server.Restart()
			testutil.Eventually(t, "the store is prepared", func() bool { return waiting.Prepare(t.Context()) == nil })
			for i, h := range histories {
				got, err := db.Load(t.Context(), verify.Number(fmt.Sprint(name, i)))
				if err != nil {
					t.Fatalf("Load on the handle from before = %v", err)
				}
				if got.Version != h.applied.Version && got.Version != h.last.Version {
					t.Errorf("writer %d: got record %s; want %s, or %s whose outcome is unknown", i, got.State, h.applied.State, h.last.State)
				}
			}
			mustSwap(t, db, verify.Number("after"+name), none, record("back", 1), true)
		})
	}
}

// admin returns a function that runs statements as a user with all rights.
func admin(t *testing.T, dsn string) (run func(statements ...string)) {
	t.Helper()
	db, err := sql.Open("mysql", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return func(statements ...string) {
		t.Helper()
		mysqltest.Exec(t, db, statements...)
	}
}

// TestServer_UsersSettingsAndRoles has its own server, since it changes users, settings and
// roles of the server.
func TestServer_UsersSettingsAndRoles(t *testing.T) {
	server := mysqltest.Start(t)
	run := admin(t, server.DSN(""))
	as := func(user, database string) string {
		return mysqltest.As(server.DSN(database), user+":"+server.Password())
	}
	password := server.Password()
	account := func(name string, grants ...string) {
		t.Helper()
		run("CREATE USER " + name + "@'%' IDENTIFIED BY '" + password + "'")
		for _, grant := range grants {
			run("GRANT " + grant + " TO " + name + "@'%'")
		}
	}
	database := func(t *testing.T, name string, ready bool) string {
		t.Helper()
		run("CREATE DATABASE " + name + " DEFAULT CHARACTER SET ascii COLLATE ascii_bin")
		if ready {
			open(t, server.DSN(name)).Close()
		}
		return name
	}
	// mustFail checks that Prepare returns a final error with each of wants in it.
	mustFail := func(t *testing.T, dsn string, wants ...string) {
		t.Helper()
		db, err := store.Open(dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		err = db.Prepare(t.Context())
		if err == nil || errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("Prepare = %v; want a final error", err)
		}
		for _, want := range wants {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("Prepare = %q; want %q in it", err, want)
			}
		}
		if strings.Contains(err.Error(), password) {
			t.Errorf("Prepare = %q; want no password", err)
		}
	}

	t.Run("a user without the right to create starts if the table exists", func(t *testing.T) {
		name := database(t, "there", true)
		account("writer", "SELECT, INSERT, UPDATE ON "+name+".*")
		db := open(t, as("writer", name))
		first := record("first", 1)
		mustSwap(t, db, number, none, first, true)
		mustSwap(t, db, number, first.Version, record("second", 2), true)
	})
	t.Run("a user without the right to create gets the command if the table is missing", func(t *testing.T) {
		name := database(t, "missing", false)
		account("creator", "SELECT, INSERT, UPDATE ON "+name+".*")
		mustFail(t, as("creator", name), "run phonenumberservice.sql", "CREATE command denied")
	})
	t.Run("a user with the right to read gets the list of needed rights", func(t *testing.T) {
		name := database(t, "reading", true)
		account("reader", "SELECT ON "+name+".*")
		mustFail(t, as("reader", name), "needs SELECT, INSERT, UPDATE and DELETE")
	})
	t.Run("a user without rights gets the statements that set up the database", func(t *testing.T) {
		account("nobody")
		mustFail(t, as("nobody", mysqltest.Database), "CREATE DATABASE IF NOT EXISTS `PhoneNumberService` DEFAULT CHARACTER SET ascii COLLATE ascii_bin;", "1044")
	})
	t.Run("a missing database gives its CREATE DATABASE", func(t *testing.T) {
		mustFail(t, server.DSN("Elsewhere"), "CREATE DATABASE IF NOT EXISTS `Elsewhere` DEFAULT CHARACTER SET ascii COLLATE ascii_bin;", "1049")
	})
	t.Run("a wrong password is named in the error", func(t *testing.T) {
		mustFail(t, strings.Replace(server.DSN(mysqltest.Database), password, "hunter2", 1),
			"the password of the data source name is not right")
	})
	t.Run("an account that requires TLS gives the parameter for it", func(t *testing.T) {
		run("CREATE USER encrypted@'%' IDENTIFIED BY '" + password + "' REQUIRE SSL")
		mustFail(t, as("encrypted", mysqltest.Database), "1045", "add tls=true")
	})
	t.Run("a server that requires TLS gives the parameter for it", func(t *testing.T) {
		run("SET GLOBAL require_secure_transport = ON")
		defer run("SET GLOBAL require_secure_transport = OFF")
		mustFail(t, server.DSN(mysqltest.Database), "add tls=true") // 3159, on MariaDB 1045
	})
	t.Run("a table of another shape gives its ALTER TABLE", func(t *testing.T) {
		name := database(t, "shape", false)
		run("CREATE TABLE " + name + ".phone_numbers (phone_number VARCHAR(16) NOT NULL PRIMARY KEY)")
		mustFail(t, server.DSN(name), "the column version is missing", "ADD version BINARY(16) NOT NULL")
	})
	t.Run("columns of a later version are accepted", func(t *testing.T) {
		name := database(t, "later", true)
		run("ALTER TABLE " + name + ".phone_numbers ADD note INT NOT NULL DEFAULT 7 FIRST")
		db := open(t, server.DSN(name))
		first := record("first", 1)
		mustSwap(t, db, number, none, first, true)
		mustLoad(t, db, number, first)
	})
	t.Run("a server with loose settings does not truncate a number, and commits", func(t *testing.T) {
		name := database(t, "loose", true)
		run("SET GLOBAL sql_mode = ''", "SET GLOBAL autocommit = 0")
		defer run("SET GLOBAL sql_mode = DEFAULT", "SET GLOBAL autocommit = 1")
		db := open(t, server.DSN(name))
		const long = number + "890123"
		if done, err := db.Swap(t.Context(), long, none, record("long", 1)); done || err == nil || isUnknown(err) {
			t.Errorf("Swap of a number of %d characters = %v, %v; want an error that is not unknown", len(long), done, err)
		}
		mustLoad(t, db, long[:16], verify.Record{})
		first := record("first", 1)
		mustSwap(t, db, number, none, first, true)
		mustLoad(t, open(t, server.DSN(name)), number, first)
	})
	t.Run("parameters for character sets do not change the bytes of records", func(t *testing.T) {
		name := database(t, "charsets", true)
		mustKeepRecords(t, open(t, server.DSN(name)+"?character_set_connection=latin1&collation_connection=latin1_bin&character_set_client=latin1"))
	})
	t.Run("a server that does not flush every commit gives a warning", func(t *testing.T) {
		run("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
		defer run("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
		got := open(t, server.DSN(mysqltest.Database)).Warnings()
		if len(got) != 1 || !strings.Contains(got[0], "innodb_flush_log_at_trx_commit is 2") {
			t.Errorf("Warnings = %q; want one about innodb_flush_log_at_trx_commit", got)
		}
	})
	t.Run("an error of the server has no number", func(t *testing.T) {
		name := database(t, "quoting", true)
		db := open(t, server.DSN(name))
		// A trigger fails as 1062 does, with the number in its text.
		run("CREATE TRIGGER " + name + ".quote BEFORE INSERT ON " + name + ".phone_numbers FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no +8618612345678'")
		_, err := db.Swap(t.Context(), number, none, record("first", 1))
		if err == nil || strings.Contains(err.Error(), "1861234") || !strings.Contains(err.Error(), "MySQL error 1644 (45000)") {
			t.Errorf("Swap = %v; want MySQL error 1644 (45000) and no number", err)
		}
	})
	t.Run("a missing table is an error without effect, until it is back", func(t *testing.T) {
		name := database(t, "gone", true)
		db := open(t, server.DSN(name))
		run("RENAME TABLE " + name + ".phone_numbers TO " + name + ".hidden")
		if done, err := db.Swap(t.Context(), number, none, record("first", 1)); done || err == nil || isUnknown(err) {
			t.Errorf("Swap = %v, %v; want an error that is not unknown", done, err)
		}
		if err := db.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "MySQL error 1146 (42S02)") {
			t.Errorf("Ready = %v; want MySQL error 1146 (42S02)", err)
		}
		run("RENAME TABLE " + name + ".hidden TO " + name + ".phone_numbers")
		mustSwap(t, db, number, none, record("first", 1), true)
	})
	t.Run("a lock that is held too long is an error without effect", func(t *testing.T) {
		name := database(t, "locked", true)
		db := open(t, server.DSN(name)+"?innodb_lock_wait_timeout=1")
		first := record("first", 1)
		mustSwap(t, db, number, none, first, true)
		other, err := sql.Open("mysql", server.DSN(name))
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		tx, err := other.Begin()
		if err == nil {
			_, err = tx.Exec("SELECT state FROM phone_numbers FOR UPDATE")
		}
		if err != nil {
			t.Fatal(err)
		}
		next := record("second", 2)
		if done, err := db.Swap(t.Context(), number, first.Version, next); done || err == nil || isUnknown(err) {
			t.Errorf("Swap = %v, %v; want an error that is not unknown", done, err)
		}
		soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if done, err := db.Swap(soon, number, first.Version, next); done || !isUnknown(err) {
			t.Errorf("Swap past its deadline = %v, %v; want unknown", done, err)
		}
		tx.Rollback()
		// The swap that passed its deadline may still be applied first.
		testutil.Eventually(t, "the swap is applied", func() bool {
			got, err := db.Load(t.Context(), number)
			if err == nil && got.Version == next.Version {
				return true
			}
			db.Swap(t.Context(), number, first.Version, next)
			return false
		})
	})
	t.Run("connections to a read-only server are dropped, until it is writable again", func(t *testing.T) {
		name := database(t, "failover", true)
		account("plain", "SELECT, INSERT, UPDATE ON "+name+".*")
		db := open(t, as("plain", name))
		first := record("first", 1)
		mustSwap(t, db, number, none, first, true)
		before := server.Connections(t, "plain")
		if len(before) == 0 {
			t.Fatal("got no connection of the store; want one")
		}
		run("SET GLOBAL read_only = 1")
		defer run("SET GLOBAL read_only = 0")
		done, err := db.Swap(t.Context(), number, first.Version, record("second", 2))
		if done || err == nil || isUnknown(err) || !strings.Contains(err.Error(), "read-only") {
			t.Errorf("Swap = %v, %v; want an error with read-only that is not unknown", done, err)
		}
		if err := db.Ready(t.Context()); err == nil {
			t.Error("Ready on a read-only server = nil; want an error")
		}
		mustLoad(t, db, number, first)
		testutil.Eventually(t, "the connections to the read-only server are closed", func() bool {
			return !slices.ContainsFunc(server.Connections(t, "plain"), func(id string) bool { return slices.Contains(before, id) })
		})
		run("SET GLOBAL read_only = 0")
		mustSwap(t, db, number, first.Version, record("second", 2), true)
	})
	t.Run("offline mode is a transient error", func(t *testing.T) { // a member that its group expels goes offline
		account("offline", "ALL ON "+mysqltest.Database+".*")
		if _, err := server.Open(t).Exec("SET GLOBAL offline_mode = ON"); err != nil {
			t.Skip("MariaDB has no offline mode")
		}
		defer run("SET GLOBAL offline_mode = OFF")
		if err := prepare(t, as("offline", mysqltest.Database)); !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "3032") {
			t.Errorf("Prepare = %v; want %v and 3032", err, store.ErrUnavailable)
		}
	})
	t.Run("too many connections are a transient error", func(t *testing.T) {
		account("many", "ALL ON "+mysqltest.Database+".*")
		run("SET GLOBAL max_connections = 10")
		defer run("SET GLOBAL max_connections = 500")
		many, err := sql.Open("mysql", as("many", mysqltest.Database))
		if err != nil {
			t.Fatal(err)
		}
		defer many.Close()
		for err == nil {
			_, err = many.Conn(t.Context())
		}
		db, err := store.Open(as("many", mysqltest.Database))
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.Prepare(t.Context()); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("Prepare = %v; want %v", err, store.ErrUnavailable)
		}
	})
}

func BenchmarkStore(b *testing.B) {
	for _, engine := range engines {
		b.Run(engine.name, func(b *testing.B) {
			db := open(b, engine.fresh(b))
			each := func(name string, one func(n verify.Number, old verify.Record) (verify.Record, error)) {
				b.Run(name, func(b *testing.B) {
					var mu sync.Mutex
					numbers := 0
					b.SetParallelism(32)
					b.RunParallel(func(pb *testing.PB) {
						mu.Lock()
						numbers++
						n := verify.Number(fmt.Sprint(name, b.N, numbers))
						mu.Unlock()
						present := record(strings.Repeat("s", 59), 1)
						done, err := db.Swap(b.Context(), n, none, present)
						for err == nil && done && pb.Next() {
							present, err = one(n, present)
						}
						if !done || err != nil {
							b.Errorf("got %v, %v; want true", done, err)
						}
					})
				})
			}
			each("Load", func(n verify.Number, present verify.Record) (verify.Record, error) {
				return db.Load(b.Context(), n)
			})
			each("Swap", func(n verify.Number, present verify.Record) (verify.Record, error) {
				next := record(string(present.State), 2)
				_, err := db.Swap(b.Context(), n, present.Version, next)
				return next, err
			})
		})
	}
}
