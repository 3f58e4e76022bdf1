// Package store implements verify.Store on one table in a MySQL-compatible database or a
// SQLite file. It maps every driver error to one of the four outcomes of that contract:
// applied, conflict, not applied, unknown.
package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"strings"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// ErrUnavailable marks an error of Prepare that may disappear by itself: the database
// cannot be reached, is starting, or is read-only for now.
var ErrUnavailable = errors.New("database is not up")

// dsnForms shows the valid forms of a data source name. Errors quote it instead of the
// configured name, which can hold a password.
const dsnForms = "user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db"

// A DB is a verify.Store. Load, Swap and Ready need a Prepare that succeeded.
type DB struct {
	dialect  dialect
	pool     *sql.DB
	direct   direct
	executor executor // runs Load and Swap
	remarks  []string // about the table, for Warnings
	counters counters
}

// newDB returns a DB that runs each request as a statement of its own.
func newDB(dialect dialect, pool *sql.DB) *DB {
	db := &DB{dialect: dialect, pool: pool, counters: newCounters()}
	db.direct.db = db
	db.executor = &db.direct
	return db
}

// A dialect has the parts that differ between the databases.
type dialect struct {
	// insertSuffix is the clause that makes an INSERT do nothing if the row exists. It is ""
	// for a database without one, whose error is then classified as conflict.
	insertSuffix  string
	clockQuery    string // for the database's time in seconds since 1970
	rowCountQuery string // for the approximate number of rows
	engine
}

// An engine implements the parts of a dialect that are not SQL.
type engine interface {
	// replaceDSN makes new connections use the credentials of another data source name.
	replaceDSN(ctx context.Context, dsn string) error
	// limit sets the maximum number of open connections, if the database allows a choice.
	limit(connections int)
	// createFile creates the database file before the first connection, if there is one.
	createFile() error
	classify(err error) errorClass
	// redact returns err without any text that could hold a phone number.
	redact(err error) error
	// hint returns the remedy for an error of Prepare, "" if none is known.
	hint(err error) string
	warnings(ctx context.Context, pool *sql.DB) []string
	// check returns prepared, which is the error of preparing the statements, or instead
	// the reason why the statements cannot rely on the table. It adds to db.remarks, and
	// creates indexes that the shared schema file defines only for MySQL.
	check(ctx context.Context, db *DB, prepared error) error
	// inPlace returns an error if the database is no longer the one that Prepare found.
	inPlace() error
}

// An executor runs loads and swaps: direct, multiRow or groupCommit.
type executor interface {
	// statements returns the statements to prepare before the first load.
	statements() []statement
	load(ctx context.Context, n verify.Number) (verify.Record, error)
	swap(ctx context.Context, s swapRequest) result
	// close fails the requests that wait.
	close()
}

// A statement is prepared into *stmt.
type statement struct {
	stmt **sql.Stmt
	text string
}

// A swapRequest has the parameters of Swap.
type swapRequest struct {
	number verify.Number
	old    verify.Version
	next   verify.Record
}

// An errorClass is a set of facts that an error proves about its statement. Zero means
// unknown: the statement may have been applied or may still be. Every unlisted error is
// zero.
type errorClass uint8

const (
	notApplied   errorClass = 1 << iota // was not applied and never will be
	conflict                            // not applied: another swap was first
	transient                           // at start: retry
	tableMissing                        // at start: apply the schema
	denied                              // the user lacks a right to the table
)

var errOtherDatabase = errors.New("the data source name names another database; that takes a restart")

// Open parses and hardens dsn and uses neither network nor disk. Its errors show the valid
// forms and quote nothing of dsn.
func Open(dsn string) (*DB, error) {
	if path, ok := strings.CutPrefix(dsn, "sqlite:"); ok {
		return openSQLite(path)
	}
	return openMySQL(dsn)
}

// LimitConnections sets the maximum number of connections to a MySQL server. Call it before
// the first connection is opened.
func (db *DB) LimitConnections(n int) { db.dialect.limit(n) }

// ReplaceDSN makes new connections use the user, password and parameters of dsn. dsn must
// name the same database, and the database must accept it. Its errors quote nothing of dsn.
func (db *DB) ReplaceDSN(ctx context.Context, dsn string) error {
	return db.dialect.replaceDSN(ctx, dsn)
}

// PrepareToRead prepares only Load. It creates nothing and needs only the right to read.
func (db *DB) PrepareToRead(ctx context.Context) (err error) {
	db.executor.close()
	db.executor = &db.direct
	if db.direct.selectOne, err = db.pool.PrepareContext(ctx, selectOneSQL); err == nil {
		return nil
	}
	hint := db.dialect.hint(err)
	if db.classify(err)&tableMissing != 0 {
		hint = "the table phone_numbers is not there; the service creates it when it first starts"
	}
	return withHint(hint, err)
}

func withHint(hint string, err error) error {
	if hint == "" {
		return err
	}
	return fmt.Errorf("%s: %w", hint, err)
}

// Prepare tries once to prepare the database: it applies schema.sql if the table is missing
// (several replicas may do so at once), prepares the statements, and rejects a table that
// they cannot rely on. Its error says what to run. It wraps ErrUnavailable if a retry may
// succeed.
func (db *DB) Prepare(ctx context.Context) error {
	err := db.prepare(ctx)
	if err == nil {
		return nil
	}
	err = withHint(db.dialect.hint(err), err)
	if db.classify(err)&transient != 0 {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func (db *DB) prepare(ctx context.Context) error {
	if err := db.dialect.createFile(); err != nil {
		return err
	}
	// Preparing a statement also checks its table, columns and rights.
	err := db.prepareStatements(ctx)
	if db.classify(err)&tableMissing != 0 {
		if _, err = db.pool.ExecContext(ctx, schema); err == nil {
			err = db.prepareStatements(ctx)
		}
	}
	if db.remarks = nil; db.classify(err)&transient == 0 {
		err = db.dialect.check(ctx, db, err)
	}
	if err != nil {
		return err
	}
	return db.probe(ctx) // a Galera node without quorum only prepares
}

func (db *DB) prepareStatements(ctx context.Context) error {
	for _, s := range db.executor.statements() {
		if *s.stmt != nil {
			continue // prepared by an earlier call
		}
		var err error
		if *s.stmt, err = db.pool.PrepareContext(ctx, s.text); err != nil { //nolint:sqlclosecheck // used until the pool closes
			return err
		}
	}
	return nil
}

// Load implements verify.Store.
func (db *DB) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	r, err := db.executor.load(ctx, n)
	if err != nil {
		return verify.Record{}, fmt.Errorf("load: %w", db.dialect.redact(err))
	}
	return r, nil
}

// Swap implements verify.Store. It also returns false after a deadlock or a failed Galera
// certification: another write came first, and the next Load shows it.
func (db *DB) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	if len(next.State) > verify.MaxStateBytes {
		return false, fmt.Errorf("swap: a state of %d bytes; at most %d are stored", len(next.State), verify.MaxStateBytes)
	}
	if next.State == nil {
		next.State = []byte{} // nil would be NULL
	}
	switch r := db.executor.swap(ctx, swapRequest{n, old, next}); r.outcome {
	case outcomeApplied:
		return true, nil
	case outcomeConflict:
		return false, nil
	case outcomeNotApplied:
		return false, fmt.Errorf("swap: %w", db.dialect.redact(r.err))
	default:
		return false, fmt.Errorf("swap: %w: %w", verify.ErrOutcomeUnknown, db.dialect.redact(r.err))
	}
}

// swapResult returns the result of a statement, from its error and whether it changed a row.
func (db *DB) swapResult(done bool, err error) result {
	switch class := db.classify(err); {
	case done && err == nil:
		return result{outcome: outcomeApplied}
	case err == nil, class&conflict != 0:
		return result{outcome: outcomeConflict}
	case class&notApplied != 0:
		return result{outcomeNotApplied, err}
	default:
		return result{outcomeUnknown, err}
	}
}

// direct runs each load and each swap as a statement of its own.
type direct struct {
	db                        *DB
	selectOne, insert, update *sql.Stmt
}

const selectOneSQL = "SELECT version, begun_at, state FROM phone_numbers WHERE phone_number = ?"

func (d *direct) statements() []statement {
	return []statement{
		{&d.selectOne, selectOneSQL},
		{&d.insert, "INSERT INTO phone_numbers (phone_number, version, begun_at, state) VALUES (?, ?, ?, ?)" + d.db.dialect.insertSuffix},
		{&d.update, "UPDATE phone_numbers SET version = ?, begun_at = ?, state = ? WHERE phone_number = ? AND version = ?"},
	}
}

func (*direct) close() {} // no request waits

func (d *direct) load(ctx context.Context, n verify.Number) (verify.Record, error) {
	r, err := scan(d.selectOne.QueryRowContext(ctx, string(n)))
	if errors.Is(err, sql.ErrNoRows) {
		return verify.Record{}, nil
	}
	return r, d.db.countError(err)
}

// scan reads a record, and the columns after it into also.
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

func (d *direct) swap(ctx context.Context, s swapRequest) result {
	done, err := swap(ctx, d.insert, d.update, s)
	return d.db.swapResult(done, d.db.countError(err))
}

// swap runs a swap by two prepared statements, which may belong to a transaction.
func swap(ctx context.Context, insert, update *sql.Stmt, s swapRequest) (done bool, err error) {
	var result sql.Result
	if s.old == (verify.Version{}) {
		result, err = insert.ExecContext(ctx, string(s.number), s.next.Version[:], s.next.BegunAt, s.next.State)
	} else {
		result, err = update.ExecContext(ctx, s.next.Version[:], s.next.BegunAt, s.next.State, string(s.number), s.old[:])
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

// probe reads a row and updates a row that does not exist. A read-only server rejects this
// update too.
func (db *DB) probe(ctx context.Context) error {
	if _, err := db.direct.load(ctx, ""); err != nil {
		return err
	}
	_, err := db.direct.update.ExecContext(ctx, []byte{}, 0, []byte{}, "", []byte{})
	return db.countError(err)
}

// Warnings returns lines for the log: the settings of the database and the properties of
// the table that weaken the guarantees, each with its remedy.
func (db *DB) Warnings(ctx context.Context) []string {
	return append(db.dialect.warnings(ctx, db.pool), db.remarks...)
}

// Close closes all connections. Requests that still wait fail.
func (db *DB) Close() error {
	db.executor.close()
	return db.pool.Close()
}

func (db *DB) classify(err error) errorClass {
	if err == nil {
		return 0 // fast path: errors.As allocates
	}
	class := db.dialect.classify(err)
	if _, ok := errors.AsType[*notAppliedError](err); ok || errors.Is(err, driver.ErrBadConn) {
		// Both drivers return ErrBadConn only if no statement was sent, or if the server
		// rejected it as read-only. database/sql relies on that when it retries.
		class |= notApplied
	}
	return class
}

// A connector marks every error of opening a connection as not applied, since no statement
// can have been sent.
type connector struct{ driver.Connector }

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, &notAppliedError{err}
	}
	return conn, nil
}

// notAppliedError marks the error of a statement that was definitely not applied.
type notAppliedError struct{ error }

func (e *notAppliedError) Unwrap() error { return e.error }
