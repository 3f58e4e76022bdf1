package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"sync"
	"time"
)

// DefaultConnections is the default size of the pool. A pool that is smaller than the
// number of concurrent calls costs throughput.
const DefaultConnections = 64

const (
	// growEvery is how long a pool that the server made smaller waits before it tries
	// one connection more.
	growEvery = time.Second
	// emptyPause is how long an attempt to connect waits after a refusal, if the pool
	// has no connection that could become free instead.
	emptyPause = 50 * time.Millisecond
)

// connections opens the connections of a pool, and fits the pool's size to the number
// that the server grants. If the server has no further connection for this user, the
// pool becomes as small as it is then, and the call waits for one of its connections
// instead of failing. The pool grows again by one each second.
type connections struct {
	driver.Connector
	pool  *sql.DB
	count func(error) error

	mu        sync.Mutex
	max, size int // as set; current
}

// Connect implements driver.Connector. After a refusal it returns driver.ErrBadConn,
// for which database/sql asks the pool again; the pool is smaller by then.
func (c *connections) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if mysqlNumber(err) != 1040 && !isUserFull(err) {
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

// isUserFull reports whether the server refused a user whose password it accepted, for
// the number of the user's connections.
func isUserFull(err error) bool {
	n := mysqlNumber(err)
	return n == 1203 || n == 1226
}

// shrink makes the pool smaller by the refused connection, and reports whether the pool has
// another one.
func (c *connections) shrink() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	others := c.pool.Stats().OpenConnections - 1
	size := max(min(others, c.size-1), 1) // each of two concurrent refusals shrinks it
	if c.size == c.max && size < c.max {
		time.AfterFunc(growEvery, c.grow)
	}
	c.resize(size)
	return others > 0
}

func (c *connections) grow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resize(min(c.size+1, c.max))
	if c.size < c.max {
		time.AfterFunc(growEvery, c.grow)
	}
}

// limit sets the size of the pool, before it is used.
func (c *connections) limit(limit int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.max = limit
	c.resize(limit)
}

func (c *connections) resize(size int) {
	c.size = size
	c.pool.SetMaxOpenConns(size)
	c.pool.SetMaxIdleConns(size)
}
