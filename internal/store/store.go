// Package store keeps verify's records in one table, of a MySQL-compatible
// database or of a SQLite file. Whatever a database answers is sorted here into
// what a verify.Store may say: done, not done, surely no effect, unknown.
package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// ErrUnavailable marks an error of Prepare that time may cure: the database cannot be
// reached, is starting, or is read-only for now.
var ErrUnavailable = errors.New("database is not up")

// What a data source name may look like; the start of one can hold a password,
// so that an error shows this and never the name itself.
const dsnForms = "user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db"

// A DB is a verify.Store. Load, Swap and Ready need a Prepare that succeeded.
type DB struct {
	dialect dialect
	pool    *sql.DB

	load, insert, update                               *sql.Stmt
	selectSmall, selectLarge, updateSmall, updateLarge *sql.Stmt // see batch.go

	// Where an engine does better with many at once; nil where it does not.
	loads   *batcher[loadRequest]
	swaps   *batcher[*swapRequest]
	inserts bool // the swaps take those of new numbers too

	remarks []string // about the table, for Warnings

	batchingPausedUntil atomic.Int64 // until when all go alone, in nanoseconds since 1970
	counters            counters
}

// An dialect is what differs between the databases.
type dialect interface {
	// replaceDSN takes the credentials of another data source name for new connections.
	replaceDSN(ctx context.Context, dsn string) error
	// limit sets how many connections are open at most, if the engine has a choice.
	limit(connections int)
	// createFile makes what must be there before the first connection.
	createFile() error
	// insertSuffix ends an INSERT for engines that can be told to do nothing where
	// the row is there; the others answer with a lostRace.
	insertSuffix() string
	classify(err error) errorClass
	// redact returns err without anything that could hold a phone number.
	redact(err error) error
	// hint says what cures an error of Prepare, "" where nothing is known.
	hint(err error) string
	warnings(ctx context.Context, pool *sql.DB) []string
	// check returns prepared, which is the error of preparing the statements, or in its
	// place why they could not rely on the table. It adds to db.remarks.
	check(ctx context.Context, db *DB, prepared error) error
	// inPlace says whether the database is still the one that Prepare found.
	inPlace() error
	// createIndexes makes what the schema's file says to other engines alone.
	createIndexes(ctx context.Context, pool *sql.DB) error
	// metaQueries are the queries for the database's clock in seconds since 1970, and for
	// about how many rows there are.
	metaQueries() (clock, rows string)
	// startBatching makes the crowds that pay with this engine, ofMany says what they need.
	startBatching(db *DB)
	batchStatements(db *DB) []statement
}

// A errorClass is what an error says of the statement that met it. Zero, that of
// every error nobody listed: the statement may have been done, or may yet be.
type errorClass uint8

const (
	notApplied   errorClass = 1 << iota // surely not done, neither now nor later
	conflict                            // the same, because another swap came first
	transient                           // at start: worth another attempt
	tableMissing                        // at start: apply the schema
	denied                              // the user lacks a right to the table
)

var errOtherDatabase = errors.New("the data source name names another database; that takes a restart")

// Open reads and hardens dsn and touches neither network nor disk. Its errors
// name what would be right and nothing of dsn.
func Open(dsn string) (*DB, error) {
	if path, ok := strings.CutPrefix(dsn, "sqlite:"); ok {
		return openSQLite(path)
	}
	return openMySQL(dsn)
}

// LimitConnections sets how many connections a MySQL server is asked for at most, before
// the first one is opened.
func (db *DB) LimitConnections(n int) { db.dialect.limit(n) }

// ReplaceDSN has new connections use the user, password and parameters of dsn, which
// must name the same database and be accepted by it. Its errors quote nothing of dsn.
func (db *DB) ReplaceDSN(ctx context.Context, dsn string) error {
	return db.dialect.replaceDSN(ctx, dsn)
}

// PrepareToRead makes Load ready and nothing else: it creates nothing, and needs the
// right to read alone.
func (db *DB) PrepareToRead(ctx context.Context) (err error) {
	if db.load, err = db.pool.PrepareContext(ctx, loadOne); err == nil {
		return nil
	}
	advice := db.dialect.hint(err)
	if db.classify(err)&tableMissing != 0 {
		advice = "the table phone_numbers is not there; the service creates it when it first starts"
	}
	return withHint(advice, err)
}

func withHint(advice string, err error) error {
	if advice == "" {
		return err
	}
	return fmt.Errorf("%s: %w", advice, err)
}

// Prepare makes one attempt to be ready: it applies schema where the table is
// missing, which any number of replicas may do at once, prepares the statements,
// and refuses a table that they could not rely on. Its error says what to run, and is ErrNotUp where waiting may do.
func (db *DB) Prepare(ctx context.Context, schema string) error {
	err := db.prepare(ctx, schema)
	if err == nil {
		return nil
	}
	err = withHint(db.dialect.hint(err), err)
	if db.classify(err)&transient != 0 {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func (db *DB) prepare(ctx context.Context, schema string) error {
	if err := db.dialect.createFile(); err != nil {
		return err
	}
	// To prepare is to probe: the engine looks for table, columns and rights.
	err := db.prepareStatements(ctx)
	if db.classify(err)&tableMissing != 0 {
		if _, err = db.pool.ExecContext(ctx, schema); err == nil {
			err = db.prepareStatements(ctx)
		}
	}
	if db.remarks = nil; db.classify(err)&transient == 0 {
		err = db.dialect.check(ctx, db, err)
	}
	if err == nil {
		err = db.dialect.createIndexes(ctx, db.pool)
	}
	if err == nil {
		err = db.probe(ctx) // a Galera node without a quorum prepares, but does no more
	}
	if err == nil {
		db.dialect.startBatching(db)
	}
	return err
}

const loadOne = "SELECT version, begun_at, state FROM phone_numbers WHERE phone_number = ?"

type statement struct {
	stmt **sql.Stmt
	text string
}

func (db *DB) prepareStatements(ctx context.Context) error {
	for _, s := range append([]statement{
		{&db.load, loadOne},
		{&db.insert, "INSERT INTO phone_numbers (phone_number, version, begun_at, state) VALUES (?, ?, ?, ?)" + db.dialect.insertSuffix()},
		{&db.update, "UPDATE phone_numbers SET version = ?, begun_at = ?, state = ? WHERE phone_number = ? AND version = ?"},
	}, db.dialect.batchStatements(db)...) {
		if *s.stmt != nil {
			continue // an earlier attempt got this far
		}
		var err error
		if *s.stmt, err = db.pool.PrepareContext(ctx, s.text); err != nil { //nolint:sqlclosecheck // lives as long as the pool
			return err
		}
	}
	return nil
}

// Load implements verify.Store.
func (db *DB) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	read := db.loadDirect
	if db.loads != nil && !db.batchingPaused() {
		read = db.loadBatched
	}
	r, err := read(ctx, n)
	if err != nil {
		return verify.Record{}, fmt.Errorf("load: %w", db.dialect.redact(err))
	}
	return r, nil
}

func (db *DB) loadDirect(ctx context.Context, n verify.Number) (verify.Record, error) {
	r, err := scan(db.load.QueryRowContext(ctx, string(n)))
	if errors.Is(err, sql.ErrNoRows) {
		return verify.Record{}, nil
	}
	return r, db.countError(err)
}

func scan(row interface{ Scan(...any) error }, also ...any) (verify.Record, error) {
	var r verify.Record
	var version []byte
	err := row.Scan(append([]any{&version, &r.BegunAt, &r.State}, also...)...)
	if err == nil && len(version) != len(r.Version) {
		err = fmt.Errorf("a stored version has %d bytes; want %d", len(version), len(r.Version))
	}
	copy(r.Version[:], version)
	return r, err
}

// Swap implements verify.Store. It also answers false where a deadlock or a
// Galera certification was lost: another write came first, and a reload tells
// which.
func (db *DB) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	if len(next.State) > verify.MaxStateBytes {
		return false, fmt.Errorf("swap: a state of %d bytes; at most %d are stored", len(next.State), verify.MaxStateBytes)
	}
	if next.State == nil {
		next.State = []byte{} // nil would be NULL
	}
	var done bool
	var err error
	if db.swaps != nil && (db.inserts || old != verify.Version{}) && !db.batchingPaused() {
		done, err = db.swapBatched(ctx, n, old, next)
	} else {
		done, err = db.swapDirect(ctx, n, old, next)
	}
	switch v := db.classify(err); {
	case err == nil:
		return done, nil
	case v&conflict != 0:
		return false, nil
	case v&notApplied != 0:
		return false, fmt.Errorf("swap: %w", db.dialect.redact(err))
	default:
		return false, fmt.Errorf("swap: %w: %w", verify.ErrOutcomeUnknown, db.dialect.redact(err))
	}
}

func (db *DB) swapDirect(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	done, err := swap(ctx, db.insert, db.update, n, old, next)
	return done, db.countError(err)
}

func swap(ctx context.Context, insert, update *sql.Stmt, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	var result sql.Result
	var err error
	if old == (verify.Version{}) {
		result, err = insert.ExecContext(ctx, string(n), next.Version[:], next.BegunAt, next.State)
	} else {
		result, err = update.ExecContext(ctx, next.Version[:], next.BegunAt, next.State, string(n), old[:])
	}
	if err != nil {
		return false, err
	}
	rows, err := result.RowsAffected()
	return rows == 1, err
}

// Ready reports whether the table can be read and written now. It changes nothing.
func (db *DB) Ready(ctx context.Context) error {
	if err := db.probe(ctx); err != nil {
		return fmt.Errorf("probe: %w", db.dialect.redact(err))
	}
	return db.dialect.inPlace()
}

// probe reads, and updates a row that is not there, which a server that is
// read-only refuses all the same.
func (db *DB) probe(ctx context.Context) error {
	if _, err := db.loadDirect(ctx, ""); err != nil {
		return err
	}
	_, err := db.update.ExecContext(ctx, []byte{}, 0, []byte{}, "", []byte{})
	return db.countError(err)
}

// Warnings says, for the log, which settings of the database and what of the table
// weaken the guarantees, and what to do about each.
func (db *DB) Warnings(ctx context.Context) []string {
	return append(db.dialect.warnings(ctx, db.pool), db.remarks...)
}

// Close closes all connections. Who still waits is told.
func (db *DB) Close() error {
	db.loads.close()
	db.swaps.close()
	return db.pool.Close()
}

func (db *DB) classify(err error) errorClass {
	if err == nil {
		return 0 // here, since what looks at an error allocates
	}
	v := db.dialect.classify(err)
	var surely *notAppliedError
	if errors.As(err, &surely) || errors.Is(err, driver.ErrBadConn) {
		// Both drivers return ErrBadConn only before a statement left, and for a
		// server that refused it as read-only; database/sql repeats on that promise.
		v |= notApplied
	}
	return v
}

// A connector marks what went wrong before there was a connection, whatever it
// was: no statement can have left.
type connector struct{ driver.Connector }

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, &notAppliedError{err}
	}
	return conn, nil
}

// notAppliedError marks the error of a statement that surely was not done.
type notAppliedError struct{ error }

func (e *notAppliedError) Unwrap() error { return e.error }
