// Package store implements verify.Store on one table in a MySQL-compatible database or a SQLite
// file. A swap is a compare-and-swap of one row. It has one of four outcomes: applied, conflict, not
// applied, or unknown. The package maps every driver error to one of the last three. It also groups
// concurrent requests (group commit) and deletes old rows (purge).
package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// ErrUnavailable marks an error of Prepare after which a retry can succeed: the database
// cannot be reached, is starting, or is temporarily read-only.
var ErrUnavailable = errors.New("database unavailable")

// dsnForms shows the valid forms of a data source name (DSN). Errors contain it instead of the
// configured DSN, which can contain a password.
const dsnForms = "user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db"

// A DB is a verify.Store. Call Load only after Prepare or PrepareToRead has succeeded, and Swap, Ready
// and RunPurge only after Prepare has.
type DB struct {
	dialect     dialect
	pool        *sql.DB
	direct      direct
	executor    executor               // runs Load and Swap
	connections *connections           // nil for SQLite
	files       map[string]fs.FileInfo // identities of SQLite's files by name; Prepare sets them
	warnings    []string
	counters    counters
}

// newDB returns a DB that runs each load and each swap as one statement, without batches.
func newDB(dialect dialect, pool *sql.DB) *DB {
	db := &DB{dialect: dialect, pool: pool, counters: newCounters()}
	db.direct.db = db
	db.executor = &db.direct
	return db
}

// A dialect contains the SQL that differs between MySQL and SQLite, and an engine.
type dialect struct {
	// insertSuffix is the clause that makes an INSERT do nothing if the row exists. It is "" for
	// MySQL: there the INSERT fails, and classify returns conflict for its error.
	insertSuffix   string
	clockQuery     string // returns the database's time in seconds since 1970
	beforeRowCount string // runs before rowCountQuery; its error is ignored
	rowCountQuery  string // returns the approximate number of rows
	engine
}

// An engine implements the parts of a dialect that are not SQL.
type engine interface {
	// prepare prepares the statements by db.prepareStatements, and returns an error if they cannot
	// rely on the table. It may set db.warnings.
	prepare(ctx context.Context, db *DB) error
	classify(err error) errorClass
	// redact returns err without any text that can contain a phone number.
	redact(err error) error
	// hint returns the remedy for an error of Prepare, PrepareToRead or Purge, as a text for the
	// operator. It returns "" if it has none.
	hint(err error) string
}

// An executor runs the loads and swaps. direct, multiRow and groupCommit implement it.
type executor interface {
	// statements returns the statements that Prepare prepares.
	statements() []statement
	load(ctx context.Context, n verify.Number) (verify.Record, error)
	swap(ctx context.Context, s swapRequest) result
	// close fails the waiting requests with errClosed.
	close()
}

// A statement is the text of a statement. Prepare prepares it, and stores the result in *stmt.
type statement struct {
	stmt **sql.Stmt
	text string
}

// A swapRequest contains the parameters of Swap.
type swapRequest struct {
	number verify.Number
	old    verify.Version
	next   verify.Record
}

// An errorClass is a set of flags that describe the error of a statement. If notApplied and conflict
// are both unset, the outcome is unknown: the statement may have been applied already, or may be
// applied later. So each of these two flags is set only if it is true each time the error
// occurs. The class of an unlisted error number is 0, unless a connection was being opened.
type errorClass uint8

const (
	notApplied   errorClass = 1 << iota // not applied, and will not be applied
	conflict                            // the same: another write came first, or a deadlock
	transient                           // Prepare can succeed later
	tableMissing                        // Prepare must create the table
	denied                              // the user lacks a right to the table
)

// Open returns a DB for dsn. It overrides the parameters of dsn that correctness depends on. It does
// not use the network or the disk. Its errors show the valid forms and contain no part of dsn.
func Open(dsn string) (*DB, error) {
	if path, ok := strings.CutPrefix(dsn, "sqlite:"); ok {
		return openSQLite(path)
	}
	return openMySQL(dsn)
}

// LimitConnections sets the maximum number of connections to a MySQL server. Call it before
// the first connection is opened. For SQLite it does nothing.
func (db *DB) LimitConnections(n int) {
	if db.connections != nil {
		db.connections.limit(n)
	}
}

// ReplaceDSN makes new connections use the user, password and parameters of dsn. dsn must
// name the same database, and the database must accept it. Its errors contain no part of dsn.
func (db *DB) ReplaceDSN(ctx context.Context, dsn string) error {
	if db.connections == nil {
		return errOtherDatabase
	}
	return db.connections.setDSN(ctx, dsn)
}

// PrepareToRead prepares only Load, so that Swap and Ready cannot be used. It creates no table, and
// needs only the right to read.
func (db *DB) PrepareToRead(ctx context.Context) (err error) {
	db.executor.close()
	db.executor = &db.direct
	db.direct.selectOne, err = db.pool.PrepareContext(ctx, selectOneSQL)
	if db.classify(err)&tableMissing != 0 {
		return withHint("the table phone_numbers is not there; the service creates it when it first starts", err)
	}
	return withHint(db.dialect.hint(err), err)
}

func withHint(hint string, err error) error {
	if hint == "" || err == nil {
		return err
	}
	return fmt.Errorf("%s: %w", hint, err)
}

// Prepare tries once to prepare the database. If the table is missing, it applies schema.sql; several
// replicas may do so at the same time. It prepares the statements, and rejects a table that they
// cannot rely on. If the operator can resolve an error, the error contains the remedy, such as a
// statement to run. The error wraps ErrUnavailable if a retry can succeed.
func (db *DB) Prepare(ctx context.Context) error {
	err := db.dialect.prepare(ctx, db)
	if err == nil {
		err = db.probe(ctx) // a Galera node without quorum prepares statements, but runs none
	}
	err = withHint(db.dialect.hint(err), err)
	if db.classify(err)&transient != 0 {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

// prepareStatements prepares the executor's statements, and creates the table if it is missing. The
// database checks the table, its columns and the user's rights when it prepares a statement.
func (db *DB) prepareStatements(ctx context.Context) (err error) {
	for _, s := range db.executor.statements() {
		if *s.stmt != nil {
			continue // prepared by an earlier call
		}
		*s.stmt, err = db.pool.PrepareContext(ctx, s.text) //nolint:sqlclosecheck // used until the pool closes
		if db.classify(err)&tableMissing != 0 {
			if _, err = db.pool.ExecContext(ctx, schema); err == nil {
				*s.stmt, err = db.pool.PrepareContext(ctx, s.text) //nolint:sqlclosecheck // the same
			}
		}
		if err != nil {
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

// Swap implements verify.Store. After a deadlock or a failed Galera certification it also returns
// false without an error: a conflict. Package verify then loads and swaps again.
func (db *DB) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	if len(next.State) > verify.MaxStateBytes {
		return false, fmt.Errorf("swap: a state of %d bytes; at most %d are stored", len(next.State), verify.MaxStateBytes)
	}
	if next.State == nil {
		next.State = []byte{} // nil would be NULL
	}
	return db.outcome("swap", db.executor.swap(ctx, swapRequest{n, old, next}))
}

// Delete implements verify.Deleter. It can also be called after PrepareToRead, because it uses no
// prepared statement.
func (db *DB) Delete(ctx context.Context, n verify.Number, old verify.Version) (bool, error) {
	var rows int64
	res, err := db.pool.ExecContext(ctx, "DELETE FROM phone_numbers WHERE phone_number = ? AND version = ?", string(n), old[:])
	if err == nil {
		rows, err = res.RowsAffected()
	}
	deleted, deleteErr := db.outcome("delete", db.swapResult(rows == 1, db.countError(err)))
	return deleted, withHint(db.dialect.hint(err), deleteErr)
}

// outcome converts r to the results of Swap and Delete. An error names the operation.
func (db *DB) outcome(operation string, r result) (applied bool, err error) {
	err = db.dialect.redact(r.err)
	if r.outcome == outcomeUnknown {
		err = fmt.Errorf("%w: %w", verify.ErrOutcomeUnknown, err)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", operation, err)
	}
	return r.outcome == outcomeApplied, err
}

// swapResult returns the result of a swap, given the error of its statement. applied is true if the
// statement changed a row.
func (db *DB) swapResult(applied bool, err error) result {
	switch class := db.classify(err); {
	case applied && err == nil:
		return result{outcome: outcomeApplied}
	case err == nil, class&conflict != 0:
		return result{outcome: outcomeConflict}
	case class&notApplied != 0:
		return result{outcome: outcomeNotApplied, err: err}
	}
	return result{outcome: outcomeUnknown, err: err}
}

// direct runs each load and each swap as one statement, without batches.
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

// scan reads a record from the first three columns of row, and the next columns into more.
func scan(row interface{ Scan(...any) error }, more ...any) (verify.Record, error) {
	var r verify.Record
	var version []byte
	err := row.Scan(append([]any{&version, &r.BegunAt, &r.State}, more...)...)
	if err == nil && len(version) != len(r.Version) {
		err = fmt.Errorf("a stored version has %d bytes; want %d", len(version), len(r.Version))
	}
	copy(r.Version[:], version)
	return r, err
}

func (d *direct) swap(ctx context.Context, s swapRequest) result {
	applied, err := swap(ctx, d.insert, d.update, s)
	return d.db.swapResult(applied, d.db.countError(err))
}

// swap runs insert if s.old is the zero Version, otherwise update. These statements can belong to a
// transaction. It reports whether the statement changed the row.
func swap(ctx context.Context, insert, update *sql.Stmt, s swapRequest) (applied bool, err error) {
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
	return unchanged(db.files)
}

// probe reads the row of a number that never exists, and runs an update that matches no row. A
// read-only server rejects even this update. So does MySQL if the session's character set cannot
// represent the bytes of a version or a state.
func (db *DB) probe(ctx context.Context) error {
	if _, err := db.direct.load(ctx, ""); err != nil {
		return err
	}
	anyBytes := []byte{0x00, 0x7f, 0x80, 0xff}
	_, err := db.direct.update.ExecContext(ctx, anyBytes, 0, anyBytes, "", anyBytes)
	return db.countError(err)
}

// Warnings returns the warnings of the last Prepare, each a line for the log. A warning describes a
// setting of the database, or a property of the table, that weakens the guarantees, and the remedy.
func (db *DB) Warnings() []string { return db.warnings }

// Close closes all connections. Requests that wait for a batch fail.
func (db *DB) Close() error {
	db.executor.close()
	return db.pool.Close()
}

// A querier is a pool or a connection.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// eachRow runs a query. For each row it scans the columns into dest, and then calls take.
func eachRow(ctx context.Context, db querier, dest []any, take func(), query string, args ...any) error {
	rows, err := db.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := rows.Scan(dest...); err != nil {
			return err
		}
		take()
	}
	return rows.Err()
}

// classify returns the class of the error of a statement, 0 for nil.
func (db *DB) classify(err error) errorClass {
	if err == nil {
		return 0 // fast path: errors.As allocates
	}
	class := db.dialect.classify(err)
	if _, ok := errors.AsType[*notAppliedError](err); ok || errors.Is(err, driver.ErrBadConn) {
		// Both drivers return ErrBadConn only if they sent no statement, or if the server
		// rejected it because it is read-only. database/sql also relies on this when it retries.
		class |= notApplied
	}
	return class
}

// A connector wraps every error of opening a connection in notAppliedError, because the statement that
// needs the connection was not sent.
type connector struct{ driver.Connector }

func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, &notAppliedError{err}
	}
	return conn, nil
}

// notAppliedError marks the error of a statement that was not applied and will not be applied.
type notAppliedError struct{ error }

func (e *notAppliedError) Unwrap() error { return e.error }
