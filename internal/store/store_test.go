package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// An errorCase is an error with the class that it must have.
type errorCase struct {
	err   error
	want  errorClass
	about string
}

func checkClasses(t *testing.T, db *DB, cases []errorCase) {
	t.Helper()
	for _, c := range cases {
		// First as the error of a statement, then as the error of opening a connection:
		// then no statement can have been sent.
		if got := db.classify(fmt.Errorf("wrapped: %w", c.err)); got != c.want {
			t.Errorf("%v (%s): got class %04b, want %04b", c.err, c.about, got, c.want)
		}
		got, want := db.classify(&notAppliedError{c.err}), c.want|notApplied
		if _, ok := db.dialect.engine.(mysqlEngine); ok { // TestMySQLErrors_BeforeALoginAreTransient has the rest
			got, want = got&^transient, want&^transient
		}
		if got != want {
			t.Errorf("%v (%s) while connecting: got class %04b, want %04b", c.err, c.about, got, want)
		}
	}
}

func number(n uint16) error { return &mysql.MySQLError{Number: n} }

func TestMySQLErrors_HaveTheirClass(t *testing.T) {
	const unknown = errorClass(0)
	db := newDB(dialect{engine: mysqlEngine{}}, nil)
	cases := []errorCase{
		{number(1020), conflict, "record changed since last read"},
		{number(1040), notApplied | transient, "too many connections"},
		{number(1044), notApplied, "no access to the database"},
		{number(1045), notApplied, "user or password"},
		{number(1047), notApplied | transient, "Galera node is not primary"},
		{number(1048), conflict, "a version changed in a batch of updates"},
		{number(1049), notApplied, "unknown database"},
		{number(1053), transient, "shutdown in progress"},
		{number(1054), notApplied, "unknown column"},
		{number(1062), conflict, "duplicate key"},
		{number(1114), notApplied, "table full"},
		{number(1142), notApplied | denied, "table access denied"},
		{number(1143), notApplied | denied, "column access denied"},
		{number(1146), notApplied | tableMissing, "no such table"},
		{number(1180), unknown, "error during commit, before or after Group Replication has the transaction"},
		{number(1203), notApplied | transient, "max_user_connections"},
		{number(1205), notApplied | transient, "lock wait timeout"},
		{number(1213), conflict | transient, "deadlock"},
		{number(1226), notApplied | transient, "user's resource limit"},
		{number(1243), notApplied, "unknown statement handler"},
		{number(1264), notApplied, "out of range value"},
		{number(1290), notApplied | transient, "read-only option"},
		{number(1317), unknown, "query interrupted"},
		{number(1364), notApplied, "no default value"},
		{number(1366), notApplied, "incorrect value"},
		{number(1406), notApplied, "data too long"},
		{number(1461), notApplied | transient, "max_prepared_stmt_count"},
		{number(1615), notApplied, "must be re-prepared"},
		{number(1792), notApplied | transient, "read-only transaction"},
		{number(1836), notApplied | transient, "read-only mode"},
		{number(1927), transient, "connection killed"},
		{number(2002), transient, "a proxy without its server"},
		{number(2003), transient, "a proxy without its server"},
		{number(2006), transient, "a proxy whose server has gone"},
		{number(2013), transient, "a proxy whose server has gone"},
		{number(3032), transient, "offline mode"},
		{number(3100), unknown, "group replication: the member left during the commit, for example"},
		{number(3101), conflict, "group replication: lost certification"},
		{number(3781), notApplied | transient, "group replication: before the statement"},
		{number(3782), notApplied | transient, "group replication: before the statement"},
		{number(3783), notApplied | transient, "group replication: before the statement"},
		{number(3796), notApplied | transient, "group replication: before the statement"},
		{number(3797), notApplied | transient, "group replication: before the statement"},
		{number(3798), notApplied | transient, "group replication: before the statement"},
		{number(3799), notApplied | transient, "group replication: before the statement"},
		{number(8005), conflict | transient, "TiDB: write conflict"},
		{number(8022), conflict | transient, "TiDB: commit rolled back"},
		{number(8027), notApplied | transient, "TiDB: outdated schema"},
		{number(8028), notApplied, "TiDB: schema changed during the statement"},
		{number(8113), notApplied, "TiDB: schema changed since PREPARE"},
		{number(9001), transient, "a proxy without a server; TiDB: placement driver"},
		{number(9002), transient, "TiDB: TiKV timeout"},
		{number(9003), transient, "TiDB: TiKV is busy"},
		{number(9004), transient, "TiDB: resolve lock timeout"},
		{number(9005), transient, "TiDB: region unavailable"},
		{number(9007), conflict | transient, "TiDB: write conflict"},
		{number(1105), unknown, "a number that is not listed"},
		{driver.ErrBadConn, notApplied | transient, "nothing was sent"},
		{mysql.ErrInvalidConn, transient, "connection lost after the statement was sent"},
		{&net.OpError{Op: "write", Err: syscall.EPIPE}, transient, "half a statement was sent"},
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, transient, "notApplied by notAppliedError"},
		{&net.DNSError{Name: "db", IsNotFound: true}, transient, "the name does not exist yet"},
		{context.DeadlineExceeded, transient, "the statement may be running"},
		{context.Canceled, unknown, "the statement may be running"},
		{x509.UnknownAuthorityError{}, unknown, "waiting does not help"},
		{io.ErrUnexpectedEOF, unknown, "anything else"},
	}
	checkClasses(t, db, cases)
	for n := range mysqlErrors {
		tested := false
		for _, c := range cases {
			var server *mysql.MySQLError
			tested = tested || errors.As(c.err, &server) && server.Number == n
		}
		if !tested {
			t.Errorf("MySQL error %d of mysqlErrors: got no case here; want one", n)
		}
	}
	if got := db.classify(nil); got != 0 {
		t.Errorf("no error: got class %04b, want 0", got)
	}
}

// Conflicts are normal. The alert DatabaseErrors must leave out the number of each.
func TestMySQLErrors_ConflictsRaiseNoAlert(t *testing.T) {
	alerts := testutil.ReadFile(t, "../../deploy/prometheus/alerts.yaml")
	var conflicts []string
	for _, n := range slices.Sorted(maps.Keys(mysqlErrors)) {
		if mysqlErrors[n].class&conflict != 0 {
			conflicts = append(conflicts, strconv.Itoa(int(n)))
		}
	}
	if want := `error!~"` + strings.Join(conflicts, "|") + `"`; !strings.Contains(alerts, want) {
		t.Errorf("alerts.yaml: got no %s; want it in DatabaseErrors", want)
	}
}

// TestMySQLErrors_BeforeALoginAreTransient tests errors of opening a connection. They are
// transient, since containers, routers and their servers start in any order.
func TestMySQLErrors_BeforeALoginAreTransient(t *testing.T) {
	for _, c := range []struct {
		want bool
		errs []error
	}{
		{true, []error{
			number(1040), number(1105), number(1129), number(1226), number(2003), number(2013), number(3032), number(4031), number(9001),
			number(65535),
			driver.ErrBadConn, mysql.ErrInvalidConn, mysql.ErrMalformPkt, io.ErrUnexpectedEOF, context.DeadlineExceeded,
			&net.DNSError{Name: "db", IsNotFound: true}, errors.New("unsupported protocol version 72"),
		}},
		{false, []error{
			number(1044), number(1045), number(1049), number(1130), number(1193), number(3159), number(4151),
			&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, mysql.ErrNoTLS, mysql.ErrUnknownPlugin,
		}},
	} {
		for _, err := range c.errs {
			if got := (mysqlEngine{}).classify(&notAppliedError{err})&transient != 0; got != c.want {
				t.Errorf("%v: got transient %v; want %v", err, got, c.want)
			}
		}
	}
}

func TestMySQLDSN_IsHardened(t *testing.T) {
	cfg, err := mysqlConfig("u:p@tcp(db)/PhoneNumberService?clientFoundRows=false&loc=Asia%2FShanghai&interpolateParams=true&rejectReadOnly=false" +
		"&Time_Zone=%27%2B08%3A00%27&SQL_MODE=%27%27&autocommit=0&wsrep_sync_wait=15&tls=skip-verify" +
		"&character_set_connection=latin1&Collation_Connection=latin1_bin&character_set_client=latin1&character_set_results=latin1")
	if err != nil {
		t.Fatal(err)
	}
	if !cfg.ClientFoundRows || cfg.Loc != time.UTC || cfg.InterpolateParams || !cfg.RejectReadOnly {
		t.Errorf("got ClientFoundRows %v, Loc %v, InterpolateParams %v, RejectReadOnly %v; want true, UTC, false, true",
			cfg.ClientFoundRows, cfg.Loc, cfg.InterpolateParams, cfg.RejectReadOnly)
	}
	want := map[string]string{
		"time_zone": "'+00:00'", "sql_mode": "'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'", "autocommit": "1",
		"wsrep_sync_wait": "15",
	}
	if fmt.Sprint(cfg.Params) != fmt.Sprint(want) {
		t.Errorf("got parameters %v; want %v", cfg.Params, want)
	}
	if cfg.TLSConfig != "skip-verify" {
		t.Errorf("got tls %q; want the operator's", cfg.TLSConfig)
	}
	for dsn, want := range map[string][3]time.Duration{
		"u@tcp(db)/d": {2 * time.Second, 5 * time.Second, 5 * time.Second},
		"u@tcp(db)/d?timeout=7s&readTimeout=8s&writeTimeout=9s": {7 * time.Second, 8 * time.Second, 9 * time.Second},
	} {
		cfg, err := mysqlConfig(dsn)
		if err != nil {
			t.Fatal(err)
		}
		if got := [3]time.Duration{cfg.Timeout, cfg.ReadTimeout, cfg.WriteTimeout}; got != want {
			t.Errorf("%s: got timeouts %v; want %v", dsn, got, want)
		}
	}
}

func TestOpen_AcceptsEveryDocumentedForm(t *testing.T) {
	for _, dsn := range []string{
		"root:password@tcp([192.168.1.100]:3306)/PhoneNumberService",
		"root:password@tcp(db:3306)/PhoneNumberService?wsrep_sync_wait=15",
		"root:pass/w@rd?x@tcp(db)/PhoneNumberService",
		"root@unix(/run/mysqld.sock)/PhoneNumberService",
		"sqlite:/path/to/file.db", "sqlite:relative.db", "sqlite::memory:",
	} {
		db, err := Open(dsn)
		if err != nil {
			t.Errorf("Open(%q) = %v; want nil", dsn, err)
			continue
		}
		db.Close()
	}
}

func TestOpen_ErrorShowsTheFormAndHidesTheDSN(t *testing.T) {
	for _, dsn := range []string{
		"", "sqlite:", "hunter2", "root:hunter2@tcp(db:3306)", "root:hunter2@tcp(db:3306)/", "root:hunter2@tcp(db:3306)/?tls=true",
		"root:hun/ter2@tcp(db:3306)", "root:hunter2@db:3306/PhoneNumberService", "mysql://root:hunter2@db/PhoneNumberService",
		"root:hunter2@tcp(db:3306/PhoneNumberService", "root:hunter2@tcp(db)/d?timeout=hunter2", "root:hunter2@tcp(db)/d?tls=hunter2",
		"root:hunter2@tcp(db)/%zzhunter2", "hunter2@udp(db)/PhoneNumberService", "root:hunter2@tcp(db)/d?loc=Asia/Shanghai",
	} {
		db, err := Open(dsn)
		if err == nil {
			db.Close()
			t.Errorf("Open(%q) = nil; want an error", dsn)
			continue
		}
		if text := err.Error(); strings.Contains(text, "ter2") || !strings.Contains(text, "sqlite:/path/to/file.db") {
			t.Errorf("Open(%q) = %q; want the valid form and no part of the name", dsn, text)
		}
		if strings.Contains(dsn, "Asia") && !strings.Contains(err.Error(), "%2F for /") {
			t.Errorf("Open(%q) = %q; want %%2F for /", dsn, err)
		}
	}
}

func TestRedact_RemovesTheServersText(t *testing.T) {
	duplicate := &mysql.MySQLError{
		Number: 1062, SQLState: [5]byte{'2', '3', '0', '0', '0'},
		Message: "Duplicate entry '+8618612345678' for key 'PRIMARY'",
	}
	for err, want := range map[error]string{
		duplicate: "MySQL error 1062 (23000): the row is there already",
		&notAppliedError{fmt.Errorf("deep: %w", duplicate)}: "MySQL error 1062 (23000): the row is there already",
		number(1040):        "MySQL error 1040: too many connections",
		number(1105):        "MySQL error 1105",
		driver.ErrBadConn:   "driver: bad connection (the server went away or is read-only)",
		io.ErrUnexpectedEOF: "unexpected EOF",
	} {
		if got := (mysqlEngine{}).redact(err).Error(); got != want {
			t.Errorf("redact(%v) = %q; want %q", err, got, want)
		}
	}
}

func TestMySQLWarnings_NameTheSettingAndTheFix(t *testing.T) {
	for _, c := range []struct{ flush, bin, sync, wsrep, wait, user, want string }{
		{flush: "1", bin: "OFF", sync: "0", wsrep: "OFF", wait: "0"},
		{flush: "1", bin: "ON", sync: "1", wsrep: "ON", wait: "1"},
		{flush: "1", bin: "OFF", sync: "0", wsrep: "ON", wait: "15"},
		{flush: "2", bin: "OFF", sync: "0", want: "innodb_flush_log_at_trx_commit is 2"},
		{flush: "0", bin: "OFF", sync: "0", want: "innodb_flush_log_at_trx_commit is 0"},
		{flush: "1", bin: "ON", sync: "0", want: "sync_binlog is 0"},
		{flush: "1", wsrep: "ON", wait: "0", sync: "1", want: "wsrep_sync_wait=15"},
		{flush: "1", wsrep: "ON", wait: "6", sync: "1", want: "wsrep_sync_wait=15"},
		{flush: "1", user: "0"},
		{flush: "1", user: "64"},
		{flush: "1", user: "63", want: "max_user_connections is 63"},
	} {
		got := mysqlWarnings(map[string]string{
			"innodb_flush_log_at_trx_commit": c.flush, "log_bin": c.bin,
			"sync_binlog": c.sync, "wsrep_on": c.wsrep, "wsrep_sync_wait": c.wait, "max_user_connections": c.user,
		}, 64)
		if c.want == "" && len(got) != 0 || c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)) {
			t.Errorf("%+v: got %q; want one warning with %q, or none for the empty text", c, got, c.want)
		}
	}
	for want, values := range map[string]map[string]string{
		"SET GLOBAL tidb_redact_log = ON": {"tidb_redact_log": "OFF", "tidb_retry_limit": "10"},
		"tidb_redact_log is MARKER":       {"tidb_redact_log": "MARKER", "tidb_retry_limit": "1"},
		"tidb_retry_limit is 0":           {"tidb_redact_log": "ON", "tidb_retry_limit": "0"},
	} {
		if got := mysqlWarnings(values, 64); len(got) != 1 || !strings.Contains(got[0], want) {
			t.Errorf("%v: got %q; want one warning with %q", values, got, want)
		}
	}
	for _, c := range []struct{ group, singlePrimary, level, want string }{
		{"a", "ON", "EVENTUAL", "EVENTUAL: after a failover a stale read can reject a correct code just after its send; add group_replication_consistency=%27BEFORE_ON_PRIMARY_FAILOVER%27 "},
		{"a", "ON", "BEFORE_ON_PRIMARY_FAILOVER", ""},
		{"a", "ON", "AFTER", ""},
		{"a", "OFF", "EVENTUAL", "EVENTUAL: in multi-primary mode a stale read can reject a correct code just after its send; add group_replication_consistency=%27BEFORE%27 "},
		{"a", "OFF", "BEFORE_ON_PRIMARY_FAILOVER", "=%27BEFORE%27 "},
		{"a", "OFF", "BEFORE", ""},
		{"a", "OFF", "AFTER", ""},
		{"a", "OFF", "BEFORE_AND_AFTER", ""},
		{"", "ON", "EVENTUAL", ""}, // the plugin without a group
		{"", "", "EVENTUAL", ""},
	} {
		got := mysqlWarnings(map[string]string{
			"group_replication_group_name": c.group, "group_replication_single_primary_mode": c.singlePrimary,
			"group_replication_consistency": c.level,
		}, 64)
		if c.want == "" && len(got) != 0 || c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)) {
			t.Errorf("%+v: got %q; want one warning with %q, or none for the empty text", c, got, c.want)
		}
	}
	if got := mysqlWarnings(nil, 64); len(got) != 0 {
		t.Errorf("an engine without these settings: got %q; want none", got)
	}
}
