package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-sql-driver/mysql"
)

// A mysqlError is what a number means: for the call, and for whoever reads the log.
type mysqlError struct {
	verdict errorClass
	text    string
}

// mysqlErrors is all that is known of the numbers of MySQL, MariaDB, Galera and the
// proxies before them, as the answer to a statement. A number that is not here leaves
// the outcome unknown, and is final at start: so do 1180 (commit failed) and 1317
// (interrupted).
var mysqlErrors = map[uint16]mysqlError{
	1020: {conflict, "the record changed since it was last read"},
	1040: {notApplied | transient, "too many connections"},
	1044: {notApplied, "the user may not use the database"},
	1045: {notApplied, "the user or the password is wrong"},
	1047: {notApplied | transient, "the Galera node has no quorum or is not in sync"},
	1048: {conflict, "a version has changed"}, // see updateMany
	1049: {notApplied, "the database does not exist"},
	1053: {transient, "the server shuts down"}, // perhaps in the middle of the statement
	1054: {notApplied, "a column is missing"},
	1062: {conflict, "the row is there already"},
	1114: {notApplied, "the table or its disk is full"},
	1142: {notApplied | denied, "the user may not do this to the table"},
	1143: {notApplied | denied, "the user may not do this to the column"},
	1146: {notApplied | tableMissing, "the table is missing"},
	1203: {notApplied | transient, "too many connections of this user (max_user_connections)"},
	1205: {notApplied | transient, "a lock, or a Galera node to catch up, was waited for too long"},
	1213: {conflict | transient, "a deadlock, or Galera's certification"},
	1226: {notApplied | transient, "a limit of this user's resources"},
	1243: {notApplied, "the statement is unknown; a proxy may have changed servers"},
	1264: {notApplied, "a value is out of its column's range"},
	1290: {notApplied | transient, "the server is read-only"}, // for this, 1792 and 1836 the driver says ErrBadConn
	1364: {notApplied, "a column has no default"},
	1366: {notApplied, "a value does not fit its column's type"},
	1406: {notApplied, "the data is too long"},
	1461: {notApplied | transient, "too many prepared statements (max_prepared_stmt_count)"},
	1615: {notApplied, "the statement must be prepared again"},
	1792: {notApplied | transient, "the transaction is read-only"},
	1836: {notApplied | transient, "the server is in read-only mode"},
	1927: {transient, "the connection was killed"},
	2002: {transient, "a proxy does not reach the server"},
	2003: {transient, "a proxy does not reach the server"},
	2006: {transient, "a proxy's connection to the server is gone"},
	2013: {transient, "a proxy lost its connection to the server"},
	3032: {transient, "the server is in offline mode"},
	3101: {conflict, "group replication's certification"},
	9001: {transient, "a proxy found no server in time"}, // ProxySQL; with TiDB, its PD timed out
}

// incurable are the numbers that, before a statement can be sent, mean a fault of the
// configuration: of the user, the rights, the data source name or its parameters. If
// anything else keeps a connection from being opened, time may cure it.
var incurable = []uint16{
	1044, 1045, 1049, 1130, 1251, 1524, 1698, 1862, 3118, 3159, 3955, 4150, 4151, // user, host, database
	1064, 1115, 1193, 1227, 1229, 1231, 1232, 1238, 1273, // parameters
}

// incurableErrors are those of the driver.
var incurableErrors = []error{
	mysql.ErrNoTLS, mysql.ErrCleartextPassword, mysql.ErrNativePassword, mysql.ErrOldPassword, mysql.ErrUnknownPlugin, mysql.ErrOldProtocol,
}

// mysqlAdvice can be pasted into a client, up to its semicolons, once {database} and
// {user} are replaced.
var mysqlAdvice = map[uint16]string{
	1044: "the user may not use the database, or the database does not exist; as a user who may, run: " + createDatabase +
		" GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON {database}.* TO {user};",
	1045: "the user or the password of the data source name is not right",
	1049: "the database does not exist; as a user who may, run: " + createDatabase,
	1054: "the table phone_numbers lacks a column of phonenumberservice.sql",
	1142: grantRights,
	1143: grantRights,
}

const (
	createDatabase = "CREATE DATABASE IF NOT EXISTS {database} DEFAULT CHARACTER SET ascii COLLATE ascii_bin;"
	grantRights    = "the user needs SELECT, INSERT, UPDATE and DELETE on the table phone_numbers; as a user who may, run:" +
		" GRANT SELECT, INSERT, UPDATE, DELETE ON {database}.* TO {user}; and if the table is missing, run phonenumberservice.sql as a user who may create tables"
)

const (
	mysqlConnLifetime = 5 * time.Minute  // so that a change behind a name or a balancer is noticed
	mysqlConnIdleTime = 30 * time.Second // then another replica may have it
	mysqlDialTimeout  = 2 * time.Second
	mysqlIOTimeout    = 5 * time.Second // for a peer that vanished: calls give up by their context
)

type mysqlDialect struct {
	database    string
	current     *swappableConnector
	connections *connections
}

func openMySQL(dsn string) (*DB, error) {
	current := &swappableConnector{}
	if err := current.use(context.Background(), dsn); err != nil {
		return nil, err
	}
	opened := &connections{Connector: current}
	pool := sql.OpenDB(connector{opened})
	pool.SetConnMaxLifetime(mysqlConnLifetime)
	pool.SetConnMaxIdleTime(mysqlConnIdleTime)
	db := &DB{dialect: mysqlDialect{current.cfg.DBName, current, opened}, pool: pool, counters: newCounters()}
	opened.pool, opened.count = pool, db.countError
	opened.limit(DefaultConnections)
	return db, nil
}

// swappableConnector connects as the last data source name that it took says.
type swappableConnector struct {
	cfg   *mysql.Config // take's alone
	inner atomic.Pointer[login]
}

// A login opens connections of one user.
type login struct {
	driver.Connector
	user string
}

// use takes dsn. Where there was one before, it must name the same database (replicas
// on two would know nothing of each other's codes) and work. It is called by one at a
// time.
func (r *swappableConnector) use(ctx context.Context, dsn string) error {
	cfg, err := mysqlConfig(dsn)
	if err != nil {
		return err
	}
	inner, err := mysql.NewConnector(cfg)
	if err != nil {
		return errDSN
	}
	if cfg.Params["innodb_lock_wait_timeout"] == "" {
		inner = lockTimeoutConnector{inner}
	}
	if r.cfg != nil {
		if cfg.Net != r.cfg.Net || cfg.Addr != r.cfg.Addr || cfg.DBName != r.cfg.DBName {
			return errOtherDatabase
		}
		conn, err := inner.Connect(ctx)
		if err == nil {
			conn.Close()
		} else if !isUserFull(err) { // the password was right, and the pool may have all connections
			return mysqlDialect{}.redact(err)
		}
	}
	r.cfg = cfg
	r.inner.Store(&login{inner, cfg.User})
	return nil
}

func (r *swappableConnector) Connect(ctx context.Context) (driver.Conn, error) {
	return r.inner.Load().Connect(ctx)
}

func (r *swappableConnector) Driver() driver.Driver { return mysql.MySQLDriver{} }

// lockTimeoutConnector sessions wait for a lock for a second at most: less than a caller does, who
// then knows that nothing was done. An engine that does not know the variable is
// taken as it is.
type lockTimeoutConnector struct{ driver.Connector }

func (c lockTimeoutConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	_, err = conn.(driver.ExecerContext).ExecContext(ctx, "SET innodb_lock_wait_timeout = 1", nil)
	var server *mysql.MySQLError
	if err != nil && !errors.As(err, &server) {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

var errDSN = errors.New("the data source name cannot be read; want " + dsnForms +
	" (after the database name, parameters in the form ?name=value&name=value, times as 2s, and / as %2F, as in loc=Asia%2FShanghai;" +
	" the password as it is)")

// mysqlConfig reads dsn and sets what correctness rests on, whatever the
// operator wrote; everything else that the operator wrote stays.
func mysqlConfig(dsn string) (*mysql.Config, error) {
	cfg, err := mysql.ParseDSN(dsn)
	// The driver's error can quote the name. It takes any word for a network:
	// user:password@host:3306/name, for one.
	if err != nil || !slices.Contains([]string{"tcp", "tcp4", "tcp6", "unix"}, cfg.Net) {
		return nil, errDSN
	}
	if cfg.DBName == "" {
		return nil, errors.New("the data source name has no database name; want " + dsnForms)
	}
	cfg.ClientFoundRows = true // a swap is done where its row was found
	cfg.Loc = time.UTC
	cfg.InterpolateParams = false // values never become part of a statement's text
	cfg.RejectReadOnly = true     // after a failover, look for the new primary
	cfg.Logger = &mysql.NopLogger{}
	forced := map[string]string{
		"autocommit": "1", // each statement is a transaction: nothing here commits
		"sql_mode":   "'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'",
		"time_zone":  "'+00:00'",
	}
	maps.DeleteFunc(cfg.Params, func(name, _ string) bool { return forced[strings.ToLower(name)] != "" })
	if cfg.Params == nil {
		cfg.Params = map[string]string{}
	}
	maps.Copy(cfg.Params, forced)
	for timeout, standard := range map[*time.Duration]time.Duration{
		&cfg.Timeout: mysqlDialTimeout, &cfg.ReadTimeout: mysqlIOTimeout, &cfg.WriteTimeout: mysqlIOTimeout,
	} {
		if *timeout == 0 {
			*timeout = standard
		}
	}
	return cfg, nil
}

func (e mysqlDialect) replaceDSN(ctx context.Context, dsn string) error {
	return e.current.use(ctx, dsn)
}

func (mysqlDialect) createFile() error { return nil }
func (mysqlDialect) startBatching(db *DB) {
	db.loads = newBatcher(loadWorkers, largeBatch, db.flushLoads)
	db.swaps = newBatcher(updateWorkers, largeBatch, db.flushUpdates)
}

func (mysqlDialect) batchStatements(db *DB) []statement {
	return []statement{
		{&db.selectSmall, selectBatchSQL(smallBatch)},
		{&db.selectLarge, selectBatchSQL(largeBatch)},
		{&db.updateSmall, updateBatchSQL(smallBatch)},
		{&db.updateLarge, updateBatchSQL(largeBatch)},
	}
}

func (mysqlDialect) insertSuffix() string { return "" } // the answer is 1062

func (e mysqlDialect) classify(err error) errorClass {
	var before *notAppliedError
	if errors.As(err, &before) && !isIncurable(err) {
		return e.judgeAnswer(err) | transient
	}
	return e.judgeAnswer(err)
}

// isIncurable reports whether waiting does not cure err, which kept a connection from
// being opened.
func isIncurable(err error) bool {
	var server *mysql.MySQLError
	if errors.As(err, &server) {
		return slices.Contains(incurable, server.Number)
	}
	var untrusted *tls.CertificateVerificationError
	return errors.As(err, &untrusted) || slices.ContainsFunc(incurableErrors, func(e error) bool { return errors.Is(err, e) })
}

func (mysqlDialect) judgeAnswer(err error) errorClass {
	var server *mysql.MySQLError
	if errors.As(err, &server) {
		return mysqlErrors[server.Number].verdict
	}
	var network net.Error
	if errors.As(err, &network) || errors.Is(err, driver.ErrBadConn) || errors.Is(err, mysql.ErrInvalidConn) {
		return transient
	}
	return 0
}

func (mysqlDialect) redact(err error) error {
	var server *mysql.MySQLError
	switch {
	case errors.As(err, &server):
		// The server's text can quote a value: 1062 quotes the phone number.
		text := "MySQL error " + strconv.Itoa(int(server.Number))
		if state := bytes.Trim(server.SQLState[:], "\x00"); len(state) > 0 {
			text += " (" + string(state) + ")"
		}
		if means := mysqlErrors[server.Number].text; means != "" {
			text += ": " + means
		}
		return errors.New(text)
	case errors.Is(err, driver.ErrBadConn):
		return fmt.Errorf("%w (the server went away or is read-only)", err)
	}
	return err
}

func (e mysqlDialect) hint(err error) string {
	var server *mysql.MySQLError
	if !errors.As(err, &server) {
		return ""
	}
	return strings.NewReplacer(
		"{database}", "`"+strings.ReplaceAll(e.database, "`", "``")+"`",
		"{user}", "'"+strings.NewReplacer("'", "''", `\`, `\\`).Replace(e.current.inner.Load().user)+"'@'%'",
	).Replace(mysqlAdvice[server.Number])
}

func (mysqlDialect) inPlace() error { return nil }

func (e mysqlDialect) limit(connections int) { e.connections.limit(connections) }

func (mysqlDialect) createIndexes(context.Context, *sql.DB) error { return nil }

// MySQL 8 would answer with yesterday's number of rows, but for the hint.
func (mysqlDialect) metaQueries() (clock, rows string) {
	return "SELECT UNIX_TIMESTAMP()", "SELECT /*+ SET_VAR(information_schema_stats_expiry = 0) */ TABLE_ROWS" +
		" FROM information_schema.TABLES WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'phone_numbers'"
}

func (e mysqlDialect) warnings(ctx context.Context, pool *sql.DB) []string {
	value := map[string]string{}
	rows, err := pool.QueryContext(ctx, `SHOW VARIABLES WHERE Variable_name IN
		('innodb_flush_log_at_trx_commit', 'log_bin', 'max_user_connections', 'sync_binlog', 'wsrep_on', 'wsrep_sync_wait')`)
	if err == nil {
		defer rows.Close()
		for rows.Next() {
			var name, v string
			err = errors.Join(err, rows.Scan(&name, &v))
			value[name] = v
		}
		err = errors.Join(err, rows.Err())
	}
	if err != nil {
		return []string{"the database's settings could not be read: " + err.Error()}
	}
	return mysqlWarnings(value, e.connections.most)
}

func mysqlWarnings(value map[string]string, connections int) (warnings []string) {
	const lost = ": what the database acknowledged can be lost when its power fails, and a used code live again; set it to 1"
	if v, ok := value["innodb_flush_log_at_trx_commit"]; ok && v != "1" {
		warnings = append(warnings, "innodb_flush_log_at_trx_commit is "+v+lost)
	}
	if v, ok := value["sync_binlog"]; ok && v != "1" && value["log_bin"] == "ON" {
		warnings = append(warnings, "sync_binlog is "+v+" beside a binary log"+lost)
	}
	if n, _ := strconv.Atoi(value["max_user_connections"]); n > 0 && n < connections {
		warnings = append(warnings, fmt.Sprintf("max_user_connections is %d, for all replicas, and each opens %d connections to the database, if it can: calls wait for a connection; raise it, or lower PHONENUMBER_DATABASE_CONNECTIONS", n, connections))
	}
	const reads = 1 // the bit for SELECT
	if wait, _ := strconv.Atoi(value["wsrep_sync_wait"]); value["wsrep_on"] == "ON" && wait&reads == 0 {
		warnings = append(warnings, "this is Galera without wsrep_sync_wait: a right code can be refused just after it was sent; add wsrep_sync_wait=15 to the data source name's parameters")
	}
	return warnings
}
