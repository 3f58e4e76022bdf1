package store_test

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// gauge returns the value of a metric of db.
func gauge(t *testing.T, db *store.DB, name string) float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(db.Collectors()...)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

// startWithFew starts a server with the user few, who may have a number of connections. run runs statements
// as an administrator, and dsn is the data source name of few.
func startWithFew(t *testing.T, connections int) (server *mysqltest.Server, run func(statements ...string), dsn string) {
	t.Helper()
	server = mysqltest.Start(t)
	run = admin(t, server.DSN(""))
	run(fmt.Sprintf("CREATE USER few@'%%' IDENTIFIED BY 'p' WITH MAX_USER_CONNECTIONS %d", connections),
		"GRANT ALL ON "+mysqltest.Database+".* TO few@'%'")
	return server, run, mysqltest.As(server.DSN(mysqltest.Database), "few:p")
}

// TestPool_WaitsForItsOwnConnectionsAtALimit sends a hundred requests at once
// over two replicas whose user may have five connections.
func TestPool_WaitsForItsOwnConnectionsAtALimit(t *testing.T) {
	server, run, dsn := startWithFew(t, 5)
	replicas := []*store.DB{open(t, dsn), open(t, dsn)}
	numbers := 0
	burst := func() {
		t.Helper()
		var group sync.WaitGroup
		for i := range 100 {
			numbers++
			db, n := replicas[i%2], verify.Number(fmt.Sprintf("+86186%08d", numbers))
			group.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				first := record("first", 1)
				if done, err := db.Swap(ctx, n, none, first); !done || err != nil {
					t.Errorf("Swap = %v, %v; want true", done, err)
				}
				if got, err := db.Load(ctx, n); err != nil || got.Version != first.Version {
					t.Errorf("Load = %v; want the stored record", err)
				}
				if done, err := db.Swap(ctx, n, first.Version, record("second", 2)); !done || err != nil {
					t.Errorf("Swap = %v, %v; want true", done, err)
				}
			})
		}
		group.Wait()
	}
	for began := time.Now(); time.Since(began) < 5*time.Second; { // long enough for the pools to try to grow
		burst()
		for _, db := range replicas {
			if err := db.Ready(t.Context()); err != nil {
				t.Errorf("Ready = %v; want nil", err)
			}
		}
	}
	for _, db := range replicas {
		if got := gauge(t, db, "go_sql_max_open_connections"); got > 10 {
			t.Errorf("got a pool of %v connections; want 10 at most, about as many as the server grants", got)
		}
	}

	run("ALTER USER few@'%' WITH MAX_USER_CONNECTIONS 0", "FLUSH USER_RESOURCES")
	testutil.Eventually(t, "the pool has more than 10 connections", func() bool {
		burst()
		return len(server.Connections(t, "few")) > 10
	})
}

// TestPool_LeavesAConnectionToAReplicaThatHasNone starts a replica while another one is busy and
// has all connections.
func TestPool_LeavesAConnectionToAReplicaThatHasNone(t *testing.T) {
	server, _, dsn := startWithFew(t, 3)
	busy := open(t, dsn)
	ctx, cancel := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	defer callers.Wait()
	defer cancel()
	var numbers atomic.Int64
	for range 20 {
		callers.Go(func() {
			for ctx.Err() == nil {
				busy.Swap(ctx, verify.Number(fmt.Sprintf("+86186%08d", numbers.Add(1))), none, record("first", 1))
			}
		})
	}
	testutil.Eventually(t, "one replica has all connections", func() bool { return len(server.Connections(t, "few")) == 3 })
	late, err := store.Open(dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	testutil.Eventually(t, "the other replica is ready", func() bool { return late.Prepare(t.Context()) == nil })
}

func TestPool_FailsCallsIfOthersHaveAllConnections(t *testing.T) {
	server, run, dsn := startWithFew(t, 2)
	db := open(t, dsn)
	others, err := sql.Open("mysql", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer others.Close()
	for _, id := range server.Connections(t, "few") {
		run("KILL CONNECTION " + id)
	}
	var taken []*sql.Conn
	testutil.Eventually(t, "others have both connections", func() bool {
		if conn, err := others.Conn(t.Context()); err == nil {
			taken = append(taken, conn)
		}
		return len(taken) == 2
	})
	call, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if _, err := db.Load(call, number); err == nil || !strings.Contains(err.Error(), "MySQL error 1226") {
		t.Errorf("Load = %v; want MySQL error 1226", err)
	}
	if err := db.Ready(call); err == nil || !strings.Contains(err.Error(), "MySQL error 1226") {
		t.Errorf("Ready = %v; want MySQL error 1226", err)
	}
	for _, conn := range taken {
		conn.Close()
	}
	others.Close()
	testutil.Eventually(t, "the database is ready", func() bool { return db.Ready(t.Context()) == nil })
}

// TestReplaceDSN_WorksWithoutAFreeConnection changes a password while the pool has all
// connections that its user may have.
func TestReplaceDSN_WorksWithoutAFreeConnection(t *testing.T) {
	server, run, dsn := startWithFew(t, 1)
	db := open(t, dsn)
	if n := len(server.Connections(t, "few")); n != 1 {
		t.Fatalf("got %d connections; want 1", n)
	}
	run("ALTER USER few@'%' IDENTIFIED BY 'q'")
	if err := db.ReplaceDSN(t.Context(), mysqltest.As(dsn, "few:p")); err == nil || !strings.Contains(err.Error(), "1045") {
		t.Errorf("ReplaceDSN with a wrong password = %v; want 1045", err)
	}
	if err := db.ReplaceDSN(t.Context(), mysqltest.As(dsn, "few:q")); err != nil {
		t.Errorf("ReplaceDSN = %v; want nil", err)
	}
}
