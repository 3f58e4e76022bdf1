package store

import (
	"bytes"
	"cmp"
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
	"time"

	"github.com/go-sql-driver/mysql"
)

// A mysqlError describes a MySQL error number by its class and a text for the log.
type mysqlError struct {
	class errorClass
	text  string
}

// mysqlErrors classifies the error numbers that MySQL, MariaDB, Galera and proxies return
// for a statement. After an unlisted number, such as 1180 (commit failed) or 1317 (interrupted),
// the outcome is unknown, and Prepare does not return ErrUnavailable.
var mysqlErrors = map[uint16]mysqlError{
	1020: {conflict, "the record changed since it was last read"},
	1040: {notApplied | transient, "too many connections"},
	1044: {notApplied, "the user has no right to the database"},
	1045: {notApplied, "the user or the password is wrong"},
	1047: {notApplied | transient, "the Galera node has no quorum or is not in sync"},
	1048: {conflict, "a version has changed"}, // see updateBatchSQL
	1049: {notApplied, "the database does not exist"},
	1053: {transient, "the server shuts down"}, // possibly during the statement
	1054: {notApplied, "a column is missing"},
	1062: {conflict, "the row is there already"},
	1114: {notApplied, "the table or its disk is full"},
	1142: {notApplied | denied, "the user lacks a right to the table"},
	1143: {notApplied | denied, "the user lacks a right to the column"},
	1146: {notApplied | tableMissing, "the table is missing"},
	1203: {notApplied | transient, "too many connections of this user (max_user_connections)"},
	1205: {notApplied | transient, "timeout while waiting for a lock, or for a Galera node to catch up"},
	1213: {conflict | transient, "a deadlock, or Galera's certification failed"},
	1226: {notApplied | transient, "a limit of this user's resources"},
	1243: {notApplied, "the prepared statement does not exist; a proxy may have changed servers"},
	1264: {notApplied, "a value is out of its column's range"},
	1290: {notApplied | transient, "the server is read-only"}, // for 1290, 1792, 1836 the driver returns ErrBadConn
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
	// MySQL Group Replication. It returns 3101 only if the certification failed. A member that leaves the
	// group while a commit waits returns 3100, and the other members may have the transaction
	// (Blocked_transaction_handler in MySQL's plugin/group_replication/src/plugin_utils.cc). 1180 can be
	// returned before or after the group has the transaction (ha_prepare_low and ha_commit_low in
	// sql/handler.cc), so it is not listed. The other numbers are returned before the statement runs
	// (launch_hook_trans_begin in sql/sql_parse.cc).
	3100: {0, "group replication failed during the commit"},
	3101: {conflict, "group replication's certification failed"},
	3781: {notApplied | transient, "the new primary did not apply its backlog in time"},
	3782: {notApplied | transient, "the group member stopped while the statement waited for its backlog"},
	3783: {notApplied | transient, "the group member failed while the statement waited for its backlog"},
	3796: {notApplied | transient, "the group member is not online"},
	3797: {notApplied | transient, "the wait for earlier transactions of the group failed"},
	3798: {notApplied | transient, "the wait for prepared transactions of the group failed"},
	3799: {notApplied | transient, "the group member is stopping"},
	// TiDB, https://docs.pingcap.com/tidb/stable/error-codes. If TiDB does not know the outcome of a
	// commit, it closes the connection. After 9001 to 9005 the outcome is unknown too, since TiDB can
	// also return them during the commit.
	8005: {conflict | transient, "a write conflict"},
	8022: {conflict | transient, "the commit failed and was rolled back"},
	8027: {notApplied | transient, "the TiDB server's schema is outdated"},
	8028: {notApplied, "the table's schema changed during the statement"},
	8113: {notApplied, "the table's schema changed after the statement was prepared"},
	9001: {transient, "a proxy found no server in time (ProxySQL), or the placement driver timed out (TiDB)"},
	9002: {transient, "TiKV timed out"},
	9003: {transient, "TiKV is busy"},
	9004: {transient, "the resolution of a lock timed out"},
	9005: {transient, "a region is unavailable"},
	9007: {conflict | transient, "a write conflict"},
}

// permanentErrorNumbers lists the config errors among the error numbers of opening a connection. The
// user, the rights, the data source name or its parameters are wrong. Every other error number of
// opening a connection is transient; see isPermanent for the errors without a number.
var permanentErrorNumbers = []uint16{
	// User, password, host or database.
	1044, 1045, 1049, 1130, 1251, 1524, 1698, 1862, 3118, 3159, 3955, 4150, 4151,
	// Parameters of the data source name, which the driver sets with SET.
	1064, 1115, 1193, 1227, 1229, 1231, 1232, 1238, 1273,
}

// permanentErrors lists the config errors among the driver's errors.
var permanentErrors = []error{
	mysql.ErrNoTLS, mysql.ErrCleartextPassword, mysql.ErrNativePassword, mysql.ErrOldPassword, mysql.ErrUnknownPlugin, mysql.ErrOldProtocol,
}

// mysqlHints contains the remedies that the method hint returns. hint replaces {database} and {user}.
// Then an operator can copy the SQL statements, each of which ends at a semicolon, into a MySQL client.
var mysqlHints = map[uint16]string{
	1044: "the user may not use the database, or the database does not exist; as a user with the right to create it, run: " +
		createDatabase + " GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON {database}.* TO {user};",
	1045: "the user or the password of the data source name is not right, or the user's account requires TLS: then " + addTLS,
	1049: "the database does not exist; as a user with the right to create it, run: " + createDatabase,
	1054: "the table phone_numbers lacks a column of phonenumberservice.sql",
	1142: grantRights,
	1143: grantRights,
	3159: "the server requires TLS: " + addTLS,
}

const (
	addTLS         = "add tls=true to the parameters of the data source name"
	createDatabase = "CREATE DATABASE IF NOT EXISTS {database} DEFAULT CHARACTER SET ascii COLLATE ascii_bin;"
	grantRights    = "the user needs SELECT, INSERT, UPDATE and DELETE on the table phone_numbers; as a user with the right" +
		" to grant them, run: GRANT SELECT, INSERT, UPDATE, DELETE ON {database}.* TO {user}; and if the table is missing," +
		" run phonenumberservice.sql as a user with the right to create tables"
)

type mysqlEngine struct{ connections *connections }

func openMySQL(dsn string) (*DB, error) {
	conns := &connections{}
	if err := conns.setDSN(context.Background(), dsn); err != nil {
		return nil, err
	}
	pool := sql.OpenDB(connector{conns})
	pool.SetConnMaxLifetime(5 * time.Minute)  // new connections follow changes in DNS
	pool.SetConnMaxIdleTime(30 * time.Second) // so that other replicas can open connections
	db := newDB(dialect{
		clockQuery: "SELECT UNIX_TIMESTAMP()",
		// Otherwise MySQL returns a cached number, up to a day old. Other engines lack this variable.
		beforeRowCount: "SET SESSION information_schema_stats_expiry = 0",
		rowCountQuery:  "SELECT TABLE_ROWS FROM information_schema.TABLES WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'phone_numbers'",
		engine:         mysqlEngine{conns},
	}, pool)
	db.executor = newMultiRow(&db.direct)
	db.connections, conns.pool, conns.countError = conns, pool, db.countError
	conns.limit(DefaultConnections)
	return db, nil
}

var errDSN = errors.New("the data source name cannot be read; want " + dsnForms +
	" (after the database name, parameters in the form ?name=value&name=value, with durations such as 2s, and %2F for /;" +
	" do not escape the password)")

// mysqlConfig parses dsn and overrides the parameters that correctness depends on. It does not change
// other parameters that the operator has set.
func mysqlConfig(dsn string) (*mysql.Config, error) {
	cfg, err := mysql.ParseDSN(dsn)
	// Do not return the driver's error, which can contain a part of dsn. The driver accepts any
	// word as a network, such as host in user:password@host:3306/name.
	if err != nil || !slices.Contains([]string{"tcp", "tcp4", "tcp6", "unix"}, cfg.Net) {
		return nil, errDSN
	}
	if cfg.DBName == "" {
		return nil, errors.New("the data source name has no database name; want " + dsnForms)
	}
	cfg.ClientFoundRows = true // RowsAffected counts matched rows, not changed rows
	cfg.Loc = time.UTC
	cfg.InterpolateParams = false // keep values out of the SQL text
	cfg.RejectReadOnly = true     // after a failover, reconnect to the new primary
	cfg.Logger = &mysql.NopLogger{}
	forced := map[string]string{
		"autocommit": "1", // each statement is its own transaction
		"sql_mode":   "'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'",
		"time_zone":  "'+00:00'",
	}
	maps.DeleteFunc(cfg.Params, func(name, _ string) bool {
		name = strings.ToLower(name)
		// If the session has two character sets, the server converts the bytes of versions and states.
		return forced[name] != "" || strings.HasPrefix(name, "character_set_") || strings.HasPrefix(name, "collation_")
	})
	maps.Copy(forced, cfg.Params)
	cfg.Params = forced
	// If the server no longer responds, these timeouts end the opening of a connection. They also end a
	// statement whose context has no deadline, such as a statement of the purge. The contexts of calls
	// and batches end earlier.
	cfg.Timeout = cmp.Or(cfg.Timeout, 2*time.Second)
	cfg.ReadTimeout = cmp.Or(cfg.ReadTimeout, 5*time.Second)
	cfg.WriteTimeout = cmp.Or(cfg.WriteTimeout, 5*time.Second)
	return cfg, nil
}

// mysqlNumber returns the number of a server's error, 0 for any other error.
func mysqlNumber(err error) uint16 {
	if server, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return server.Number
	}
	return 0
}

// classify implements engine. An error of opening a connection is transient, unless isPermanent
// reports a config error.
func (mysqlEngine) classify(err error) errorClass {
	number := mysqlNumber(err)
	class := mysqlErrors[number].class
	var network net.Error
	if number == 0 && (errors.As(err, &network) || errors.Is(err, driver.ErrBadConn) || errors.Is(err, mysql.ErrInvalidConn)) {
		class = transient
	}
	if _, ok := errors.AsType[*notAppliedError](err); ok && !isPermanent(err) {
		class |= transient
	}
	return class
}

// isPermanent reports whether err, an error of opening a connection, is a config error, which a retry
// does not resolve.
func isPermanent(err error) bool {
	if n := mysqlNumber(err); n != 0 {
		return slices.Contains(permanentErrorNumbers, n)
	}
	_, untrusted := errors.AsType[*tls.CertificateVerificationError](err)
	return untrusted || slices.ContainsFunc(permanentErrors, func(e error) bool { return errors.Is(err, e) })
}

func (mysqlEngine) redact(err error) error {
	if server, ok := errors.AsType[*mysql.MySQLError](err); ok {
		// The server's text can contain a value: 1062 contains the phone number.
		text := "MySQL error " + strconv.Itoa(int(server.Number))
		if state := bytes.Trim(server.SQLState[:], "\x00"); len(state) > 0 {
			text += " (" + string(state) + ")"
		}
		if meaning := mysqlErrors[server.Number].text; meaning != "" {
			text += ": " + meaning
		}
		return errors.New(text)
	}
	if errors.Is(err, driver.ErrBadConn) {
		return fmt.Errorf("%w (the server went away or is read-only)", err)
	}
	return err
}

func (e mysqlEngine) hint(err error) string {
	dsn := e.connections.dsn.Load()
	return strings.NewReplacer(
		"{database}", quoted(dsn.DBName),
		"{user}", "'"+strings.NewReplacer("'", "''", `\`, `\\`).Replace(dsn.User)+"'@'%'",
	).Replace(mysqlHints[mysqlNumber(err)])
}

// prepare implements engine.
func (e mysqlEngine) prepare(ctx context.Context, db *DB) error {
	err := db.prepareStatements(ctx)
	if db.classify(err)&transient != 0 {
		return err
	}
	tableWarnings, err := checkMySQLTable(ctx, db, err)
	if err == nil {
		db.warnings = append(e.settingWarnings(ctx, db.pool), tableWarnings...)
	}
	return err
}

// settingWarnings returns the warnings about the settings of the session.
func (e mysqlEngine) settingWarnings(ctx context.Context, pool *sql.DB) []string {
	value, name, v := map[string]string{}, "", ""
	err := eachRow(ctx, pool, []any{&name, &v}, func() { value[name] = v }, `SHOW VARIABLES WHERE Variable_name IN
		('group_replication_consistency', 'group_replication_group_name', 'group_replication_single_primary_mode',
		'innodb_flush_log_at_trx_commit', 'log_bin', 'max_user_connections', 'sync_binlog', 'tidb_redact_log',
		'tidb_retry_limit', 'wsrep_on', 'wsrep_sync_wait')`)
	if err != nil {
		return []string{"failed to read the database's settings: " + err.Error()}
	}
	return mysqlWarnings(value, e.connections.max)
}

// mysqlWarnings returns the warnings about the variables of a session. connections is the maximum
// that each replica may open.
func mysqlWarnings(value map[string]string, connections int) (warnings []string) {
	const lost = ": a power failure of the database can undo what it acknowledged, and then a used code is accepted again; set it to 1"
	if v, ok := value["innodb_flush_log_at_trx_commit"]; ok && v != "1" {
		warnings = append(warnings, "innodb_flush_log_at_trx_commit is "+v+lost)
	}
	if v, ok := value["sync_binlog"]; ok && v != "1" && value["log_bin"] == "ON" {
		warnings = append(warnings, "sync_binlog is "+v+" and the binary log is on"+lost)
	}
	if n, _ := strconv.Atoi(value["max_user_connections"]); n > 0 && n < connections {
		warnings = append(warnings, fmt.Sprintf("max_user_connections is %d, a limit for all replicas together; each replica may open %d connections, so calls can wait for one; raise the limit, or lower PHONENUMBER_DATABASE_CONNECTIONS", n, connections))
	}
	const reads = 1 // the bit for SELECT
	if wait, _ := strconv.Atoi(value["wsrep_sync_wait"]); value["wsrep_on"] == "ON" && wait&reads == 0 {
		warnings = append(warnings, "this is Galera without wsrep_sync_wait: a stale read can reject a correct code just after its send; add wsrep_sync_wait=15 to the data source name's parameters")
	}
	if value["group_replication_group_name"] != "" {
		level, when, want := value["group_replication_consistency"], "after a failover", "BEFORE_ON_PRIMARY_FAILOVER"
		low := level == "EVENTUAL"
		if value["group_replication_single_primary_mode"] == "OFF" {
			low = low || level == want
			when, want = "in multi-primary mode", "BEFORE"
		}
		if low {
			warnings = append(warnings, "this is Group Replication with group_replication_consistency "+level+": "+when+" a stale read can reject a correct code just after its send; add group_replication_consistency=%27"+want+"%27 to the data source name's parameters")
		}
	}
	if v, ok := value["tidb_redact_log"]; ok && v != "ON" {
		warnings = append(warnings, "tidb_redact_log is "+v+": TiDB's log can contain phone numbers and HMACs of codes, such as in each write conflict; run: SET GLOBAL tidb_redact_log = ON")
	}
	if value["tidb_retry_limit"] == "0" {
		warnings = append(warnings, "tidb_retry_limit is 0: each write conflict is an error (9007), and the service repeats the statement in place of TiDB; set it to 10, the default")
	}
	return warnings
}
