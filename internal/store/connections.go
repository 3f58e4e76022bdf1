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
// loadWorkers and updateWorkers. The others are for inserts, for swaps after a conflict, and for every
// call while batching is paused.
const DefaultConnections = 64

const growEvery = time.Second // a reduced pool grows by one connection

var errOtherDatabase = errors.New("the data source name names another database; that takes a restart")

// connections opens the connections of a pool, and adapts the maximum size of the pool to the server.
// If the server rejects a connection because it or the user has too many, the maximum becomes the
// present number of connections. Then calls wait for one of these connections instead of failing.
// The maximum grows again by one each second.
type connections struct {
	dsn   atomic.Pointer[parsedDSN] // the last one that setDSN accepted
	pool  *sql.DB
	count func(error) error

	mu   sync.Mutex
	max  int // the configured maximum
	size int // the current maximum
}

// A parsedDSN opens connections with one data source name.
type parsedDSN struct {
	*mysql.Config
	connector driver.Connector
}

// setDSN replaces the data source name by dsn. If there was one before, dsn must name the same
// database, because replicas on two databases would not share codes, and the server must accept dsn.
// setDSN is not safe for concurrent use.
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
		} else if !isUserLimit(err) { // too many connections: the password was accepted
			return mysqlEngine{}.redact(err)
		}
	}
	c.dsn.Store(next)
	return nil
}

// connect opens a connection. Unless the data source name sets innodb_lock_wait_timeout, it sets it to
// one second, which is less than storeTimeout of package verify. So a call that is blocked on a row lock
// gets an error with the outcome "not applied" instead of an unknown outcome. If the server rejects the
// variable, the session keeps its default timeout.
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
	if !c.shrink() { // no other connection can become free: do not ask at once again
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return nil, fmt.Errorf("%w: %w", driver.ErrBadConn, c.count(err))
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
	size := max(min(others, c.size-1), 1) // another rejected connection can still count as open, so subtract at least one
	if c.size == c.max && size < c.max {
		time.AfterFunc(growEvery, c.grow)
	}
	c.resize(size)
	return others > 0
}

// grow increases the maximum size of the pool by one, and repeats this until it is max.
func (c *connections) grow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resize(min(c.size+1, c.max))
	if c.size < c.max {
		time.AfterFunc(growEvery, c.grow)
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
