package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"sync"
	"time"
)

// DefaultConnections is the default maximum number of connections in the pool. If the pool has
// fewer connections than there are concurrent calls, throughput is lower.
const DefaultConnections = 64

const (
	mysqlTooManyConnections = 1040 // of the server
	mysqlUserConnections    = 1203 // of this user (max_user_connections)
	mysqlUserResources      = 1226 // of this user (a resource limit)

	// growEvery is the interval at which a reduced pool grows by one connection.
	growEvery = time.Second
	// emptyPause is the delay after a rejected connection if the pool has no other connection
	// that can become free.
	emptyPause = 50 * time.Millisecond
)

// connections opens the connections of a pool, and adapts the maximum size of the pool to the server.
// If the server rejects a connection because it or the user has too many, the maximum becomes the
// present number of connections. Then calls wait for one of these connections instead of failing.
// The maximum grows again by one each second.
type connections struct {
	driver.Connector
	pool  *sql.DB
	count func(error) error

	mu   sync.Mutex
	max  int // the configured maximum
	size int // the current maximum
}

// Connect implements driver.Connector. If the server rejects the connection, it returns
// driver.ErrBadConn. Then database/sql asks the pool for a connection again, and the pool is smaller.
func (c *connections) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if mysqlNumber(err) != mysqlTooManyConnections && !isUserLimit(err) {
		return conn, err
	}
	if !c.shrink() {
		select {
		case <-time.After(emptyPause):
		case <-ctx.Done():
		}
	}
	return nil, fmt.Errorf("%w: %w", driver.ErrBadConn, c.count(err))
}

// isUserLimit reports whether the server rejected a connection because this user has too many
// connections. In this case it has accepted the password.
func isUserLimit(err error) bool {
	n := mysqlNumber(err)
	return n == mysqlUserConnections || n == mysqlUserResources
}

// shrink reduces the maximum size of the pool after a rejected connection. It reports whether the
// pool has another connection.
func (c *connections) shrink() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	others := c.pool.Stats().OpenConnections - 1
	size := max(min(others, c.size-1), 1) // two concurrent rejections subtract two
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
