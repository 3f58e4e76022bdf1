package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-sql-driver/mysql"
)

// DefaultConnections is the default maximum number of connections in the pool. Batches use at most
// loadWorkers + updateWorkers of them. The other connections are for inserts, for swaps after a
// conflict, and for every request while batching is paused.
const DefaultConnections = 64

const (
	growInterval = time.Second // at which a reduced pool grows by one connection
	// closeInterval is long, since another application may open each connection that the pool closes.
	closeInterval = time.Minute
)

var errOtherDatabase = errors.New("the data source name names another database; only a restart can change the database")

// connections opens the connections of a pool, and adapts the maximum size of the pool to the server.
// If the server rejects a connection because the server or the user has too many, the maximum becomes
// the present number of connections. Then calls wait for one of these connections instead of failing.
// The maximum grows again by one each second. After a rejection, but once a minute at most, the pool
// closes a connection for a second, unless it is the last. Then a replica without a connection can open
// one.
type connections struct {
	dsn        atomic.Pointer[parsedDSN] // the last that setDSN accepted
	pool       *sql.DB
	countError func(error) error // of DB

	mu        sync.Mutex
	max       int       // the configured maximum
	size      int       // the current maximum
	rejected  bool      // the server rejected a connection since the last grow
	lastClose time.Time // when grow last closed a connection
}

// A parsedDSN opens connections with one data source name.
type parsedDSN struct {
	*mysql.Config
	connector driver.Connector
}

// setDSN replaces the data source name by dsn. The first call does not connect. After it, dsn must name
// the same database, because replicas on two databases would not share codes. The server must also
// accept dsn. setDSN is not safe for concurrent use.
func (c *connections) setDSN(ctx context.Context, dsn string) error {
	cfg, err := mysqlConfig(dsn)
	if err != nil {
		return err
	}
	inner, err := mysql.NewConnector(cfg)
	if err != nil {
		return errDSN
	}
	next := &parsedDSN{cfg, inner}
	if old := c.dsn.Load(); old != nil {
		if cfg.Net != old.Net || cfg.Addr != old.Addr || cfg.DBName != old.DBName {
			return errOtherDatabase
		}
		conn, err := next.connect(ctx)
		if err == nil {
			conn.Close()
		} else if !isUserLimit(err) { // a user limit means that the password was accepted
			return mysqlEngine{}.redact(err)
		}
	}
	c.dsn.Store(next)
	return nil
}

// connect opens a connection. Unless the data source name sets innodb_lock_wait_timeout, connect sets
// this variable to one second, which is less than storeTimeout of package verify. So a call that is
// blocked on a row lock gets an error with the outcome "not applied" instead of an unknown outcome. If
// the server rejects the variable, the session keeps its default timeout.
func (d *parsedDSN) connect(ctx context.Context) (driver.Conn, error) {
	conn, err := d.connector.Connect(ctx)
	if err != nil || d.Params["innodb_lock_wait_timeout"] != "" {
		return conn, err
	}
	_, err = conn.(driver.ExecerContext).ExecContext(ctx, "SET innodb_lock_wait_timeout = 1", nil)
	if err != nil && mysqlNumber(err) == 0 {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Connect implements driver.Connector. If the server has too many connections (1040), or isUserLimit
// reports a limit of the user, it returns driver.ErrBadConn. Then database/sql asks the pool for a
// connection again, and the pool is smaller.
func (c *connections) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.dsn.Load().connect(ctx)
	if mysqlNumber(err) != 1040 && !isUserLimit(err) {
		return conn, err
	}
	if !c.shrink() { // no other connection can become free: wait before the retry
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return nil, fmt.Errorf("%w: %w", driver.ErrBadConn, c.countError(err))
}

// Driver implements driver.Connector.
func (*connections) Driver() driver.Driver { return mysql.MySQLDriver{} }

// isUserLimit reports whether the server rejected a connection because of a limit of this user: its
// connections (1203) or its resources (1226). In this case it has accepted the password.
func isUserLimit(err error) bool {
	n := mysqlNumber(err)
	return n == 1203 || n == 1226
}

// shrink reduces the maximum size of the pool after a rejected connection. It reports whether the
// pool has another connection.
func (c *connections) shrink() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	others := c.pool.Stats().OpenConnections - 1
	c.rejected = true
	// Another rejected connection can still count as open, so subtract at least one.
	size := max(min(others, c.size-1), 1)
	if c.size == c.max && size < c.max {
		time.AfterFunc(growInterval, c.grow)
	}
	c.resize(size)
	return others > 0
}

// grow increases the maximum size of the pool by one, or closes a connection. It repeats this each
// second until the size is c.max.
func (c *connections) grow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	size := min(c.size+1, c.max)
	if c.rejected && time.Since(c.lastClose) > closeInterval {
		size, c.lastClose = max(c.size-1, 1), time.Now()
	}
	c.rejected = false
	c.resize(size)
	if c.size < c.max {
		time.AfterFunc(growInterval, c.grow)
	}
}

// limit sets the configured maximum size of the pool. It is called before the first connection.
func (c *connections) limit(limit int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.max = limit
	c.resize(limit)
}

// resize sets the current maximum size of the pool. The calling function must hold c.mu.
func (c *connections) resize(size int) {
	c.size = size
	c.pool.SetMaxOpenConns(size)
	c.pool.SetMaxIdleConns(size)
}
