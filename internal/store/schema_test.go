package store_test

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/go-sql-driver/mysql"

	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// shippedColumns are the columns of phonenumberservice.sql, without a key.
const shippedColumns = "phone_number VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, version BINARY(16) NOT NULL, begun_at BIGINT NOT NULL, state VARBINARY(1024) NOT NULL"

// created returns the shipped CREATE TABLE, with each old text replaced by the new text after
// it.
func created(replacements ...string) string {
	shipped := "CREATE TABLE phone_numbers (" + shippedColumns + ", PRIMARY KEY (phone_number), KEY begun_at (begun_at)) ENGINE=InnoDB"
	return strings.NewReplacer(replacements...).Replace(shipped)
}

// run runs statements on a separate connection, not through the store.
func run(t *testing.T, driver, dsn string, statements ...string) error {
	t.Helper()
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	for _, statement := range statements {
		if _, err := db.Exec(statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	return nil
}

func mustRun(t *testing.T, driver, dsn string, statements ...string) {
	t.Helper()
	if err := run(t, driver, dsn, statements...); err != nil {
		t.Fatal(err)
	}
}

func prepare(t *testing.T, dsn string) error {
	t.Helper()
	db, err := store.Open(dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	return db.Prepare(t.Context())
}

// prepareError returns the final error of Prepare, which must contain all of wants, and the
// ALTER TABLE in it.
func prepareError(t *testing.T, dsn string, wants ...string) (text, alter string) {
	t.Helper()
	err := prepare(t, dsn)
	if err == nil || errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("Prepare = %v; want a final error", err)
	}
	for _, want := range wants {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Prepare = %q; want %q in it", err, want)
		}
	}
	alter = regexp.MustCompile(`ALTER TABLE [^;]+`).FindString(err.Error())
	if alter == "" {
		t.Fatalf("Prepare = %q; want an ALTER TABLE", err)
	}
	return err.Error(), alter
}

// mustKeepRecords checks that the table stores, compares and returns records exactly.
func mustKeepRecords(t *testing.T, db *store.DB) {
	t.Helper()
	contend(t, db)
	present := verify.Record{Version: verify.Version{1}, BegunAt: 1_790_000_000_123_457}
	for i := range verify.MaxStateBytes {
		present.State = append(present.State, byte(i))
	}
	for _, n := range []verify.Number{number + "0", number + "1", "+123456789012345"} {
		mustSwap(t, db, n, none, present, true)
		mustSwap(t, db, n, none, record("second", 2), false)
		mustLoad(t, db, n, present)
		next := record(strings.Repeat("\x00", verify.MaxStateBytes), 3)
		mustSwap(t, db, n, present.Version, next, true)
		mustSwap(t, db, n, present.Version, record("third", 3), false)
		mustLoad(t, db, n, next)
	}
	if err := db.Ready(t.Context()); err != nil {
		t.Errorf("Ready = %v; want nil", err)
	}
}

// TestMySQLTable_RejectedUntilAltered runs the ALTER TABLE that each error has.
func TestMySQLTable_RejectedUntilAltered(t *testing.T) {
	const key = "PRIMARY KEY (phone_number)"
	noKey := "no unique key is on phone_number alone"
	for _, c := range []struct {
		name, create string
		wants        []string
	}{
		{"no key", "CREATE TABLE phone_numbers AS SELECT * FROM (SELECT CAST('+1' AS CHAR(16)) phone_number, CAST('x' AS BINARY(16)) version, CAST(1 AS SIGNED) begun_at, CAST('' AS BINARY(1024)) state) s", []string{noKey}},
		{"a plain index", created(key, "KEY (phone_number)"), []string{noKey}},
		{"a primary key over more columns", created(key, "PRIMARY KEY (phone_number, begun_at)"), []string{noKey}},
		{
			"a key over a part of the number", created(key, "UNIQUE KEY part (phone_number(8))"),
			[]string{noKey, "the unique key part rejects other numbers"},
		},
		{
			"a key over a part of the number beside the right one", created(key, key+", UNIQUE KEY part (phone_number(8))"),
			[]string{"the unique key part rejects other numbers"},
		},
		{
			"a key over a part of the version", created(key, key+", UNIQUE KEY part (version(1))"),
			[]string{"the unique key part rejects other numbers"},
		},
		{"a unique key over the time", created(key, key+", UNIQUE KEY time (begun_at)"), []string{"the unique key time rejects other numbers"}},
		{"a primary key over a constant", created(key, "tenant INT NOT NULL DEFAULT 1, PRIMARY KEY (tenant), UNIQUE (phone_number)"), []string{"the primary key rejects other numbers"}},
		{"partitions by the time", created(key, "PRIMARY KEY (phone_number, begun_at)") + " PARTITION BY RANGE (begun_at) (PARTITION p VALUES LESS THAN MAXVALUE)", []string{noKey}},
		{"MyISAM", created("InnoDB", "MyISAM"), []string{"the engine MyISAM has no transactions"}},
		{"MEMORY", created("InnoDB", "MEMORY"), []string{"the engine MEMORY has no transactions"}},
		{"Aria", created("InnoDB", "MyISAM /*M! ENGINE=Aria */"), []string{" has no transactions"}},
		{"a number too short", created("VARCHAR(16)", "VARCHAR(15)"), []string{"phone_number is varchar(15)"}},
		{
			"a number with padding", created("VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin", "BINARY(16)"),
			[]string{"phone_number is binary(16)"},
		},
		{"a number in a BIGINT", created("VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin", "BIGINT"), []string{"phone_number is bigint"}},
		{
			"a number in a TEXT", created("VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin", "TEXT", "(phone_number)", "(phone_number(16))"),
			[]string{"phone_number is text", noKey},
		},
		{"a version too short", created("BINARY(16)", "BINARY(15)"), []string{"version is binary(15)"}},
		{"a version with padding", created("BINARY(16)", "BINARY(17)"), []string{"version is binary(17)"}},
		{"a version of text", created("BINARY(16)", "VARCHAR(64)"), []string{"version is varchar(64)"}},
		{"a version that may be NULL", created("BINARY(16) NOT NULL", "BINARY(16)"), []string{"version may be NULL"}},
		{"a time of seconds", created("BIGINT", "INT"), []string{"begun_at is int"}},
		{"a time that is a date", created("BIGINT", "DATETIME(6)"), []string{"begun_at is datetime(6)"}},
		{"a time that is inexact", created("BIGINT", "DOUBLE"), []string{"begun_at is double"}},
		{"a state too short", created("VARBINARY(1024)", "VARBINARY(1023)"), []string{"state is varbinary(1023)"}},
		{"a state of a TINYBLOB", created("VARBINARY(1024)", "TINYBLOB"), []string{"state is tinyblob"}},
		{"a state with padding", created("VARBINARY(1024)", "BINARY(255)"), []string{"state is binary(255)"}},
		{"a state of text", created("VARBINARY(1024)", "TEXT"), []string{"state is text"}},
		{"a column without a default", created(key, key+", `house``s rule` VARCHAR(8) NOT NULL"), []string{"house`s rule has no default"}},
		{
			"a column without a default in the primary key", created(key, "tenant INT NOT NULL, PRIMARY KEY (phone_number, tenant)"),
			[]string{"tenant has no default", noKey},
		},
		{"a column without a default as the primary key", created(key, "id BIGINT UNSIGNED NOT NULL PRIMARY KEY, UNIQUE (phone_number)"), []string{"id has no default"}},
		{"a column without a default in a unique key", created(key, key+", serial INT NOT NULL UNIQUE"), []string{"serial has no default"}},
		{"columns are missing", "CREATE TABLE phone_numbers (phone_number VARCHAR(16) NOT NULL PRIMARY KEY)", []string{"the column version is missing", "the column begun_at is missing", "the column state is missing"}},
		{"everything", "CREATE TABLE phone_numbers (phone_number CHAR(8), version CHAR(16), begun_at TIMESTAMP NULL, state BLOB, tenant INT NOT NULL, UNIQUE KEY both_ (tenant, phone_number)) ENGINE=MyISAM", []string{
			"phone_number is char(8)", "version is char(16)", "begun_at is timestamp", "tenant has no default", noKey,
			"the engine MyISAM has no transactions",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dsn := mysqltest.DSN(t)
			mustRun(t, "mysql", dsn, c.create)
			_, alter := prepareError(t, dsn, c.wants...)
			mustRun(t, "mysql", dsn, alter)
			db := open(t, dsn)
			if got := db.Warnings(); len(got) != 0 {
				t.Errorf("Warnings after the ALTER TABLE = %q; want none", got)
			}
			mustKeepRecords(t, db)
		})
	}
}

func TestMySQLTable_AcceptedIfUsable(t *testing.T) {
	const key = "PRIMARY KEY (phone_number)"
	for name, create := range map[string]string{
		"as shipped":                created(),
		"an id beside a unique key": created(key, "id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY, UNIQUE KEY (phone_number)"),
		"audit columns":             created(key, key+", created TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP, changed DATETIME(6) NULL ON UPDATE CURRENT_TIMESTAMP(6), who VARCHAR(32) NOT NULL DEFAULT '', note TEXT"),
		"generated columns":         created(key, key+", seconds BIGINT AS (begun_at DIV 1000000) VIRTUAL, minutes BIGINT AS (begun_at DIV 60000000) STORED"),
		"an enumeration":            created(key, key+", kind ENUM('a', 'b') NOT NULL"), // which defaults to its first value
		"a hidden column":           created(key, key+", hidden INT NOT NULL DEFAULT 1 INVISIBLE"),
		"harmless unique keys":      created(key, key+", id CHAR(36) NOT NULL DEFAULT (UUID()) UNIQUE, absent INT UNIQUE, UNIQUE both_ (begun_at, phone_number), UNIQUE (version)"),
		"wider columns": created("VARCHAR(16)", "VARCHAR(64)", "BINARY(16)", "VARBINARY(64)", "BIGINT", "BIGINT UNSIGNED",
			"VARBINARY(1024)", "VARBINARY(4096)"),
		"BLOBs": created("BINARY(16)", "TINYBLOB", "VARBINARY(1024)", "MEDIUMBLOB"),
		"nullable columns": created("BIGINT NOT NULL", "BIGINT", "VARBINARY(1024) NOT NULL", "BLOB", key, "UNIQUE (phone_number)",
			"COLLATE ascii_bin NOT NULL", "COLLATE ascii_bin"),
		"a number of bytes":          created("VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin", "VARBINARY(16)"),
		"a number of a fixed length": created("VARCHAR(16)", "CHAR(20)"),
		"a collation without case":   created("CHARACTER SET ascii COLLATE ascii_bin", "CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci"),
		"another order":              "CREATE TABLE phone_numbers (STATE VARBINARY(1024) NOT NULL, Begun_At BIGINT NOT NULL, version BINARY(16) NOT NULL, PHONE_NUMBER VARCHAR(16) NOT NULL UNIQUE, KEY (begun_at))",
		"partitions by number":       created() + " PARTITION BY KEY (phone_number) PARTITIONS 4",
		"kept versions":              created() + " /*M! WITH SYSTEM VERSIONING */",
	} {
		t.Run(name, func(t *testing.T) {
			dsn := mysqltest.DSN(t)
			mustRun(t, "mysql", dsn, create)
			db := open(t, dsn)
			if got := db.Warnings(); len(got) != 0 {
				t.Errorf("Warnings = %q; want none", got)
			}
			mustKeepRecords(t, db)
		})
	}
}

// TestMySQLTable_DuplicateRowsFailItsAlter has two rows of one number, which are possible in a
// table without a key. The error also has a TRUNCATE TABLE for them.
func TestMySQLTable_DuplicateRowsFailItsAlter(t *testing.T) {
	dsn := mysqltest.DSN(t)
	mustRun(t, "mysql", dsn, "CREATE TABLE phone_numbers ("+shippedColumns+")", "INSERT INTO phone_numbers VALUES ('+1', 'a', 1, ''), ('+1', 'b', 2, '')")
	text, alter := prepareError(t, dsn)
	var duplicate *mysql.MySQLError
	if err := run(t, "mysql", dsn, alter); !errors.As(err, &duplicate) || duplicate.Number != 1062 {
		t.Fatalf("the ALTER TABLE = %v; want error 1062", err)
	}
	mustRun(t, "mysql", dsn, regexp.MustCompile(`TRUNCATE TABLE \w+`).FindString(text), alter)
	mustKeepRecords(t, open(t, dsn))
}

// TestMySQLTable_AlteredLaterFailsWithoutEffect alters the table so that it is no longer usable
// while the service runs. A swap fails and returns an error that means "not applied".
func TestMySQLTable_AlteredLaterFailsWithoutEffect(t *testing.T) {
	for code, alter := range map[string]string{
		"1264": "MODIFY begun_at INT NOT NULL",
		"1364": "ADD tenant INT NOT NULL",
		"1366": "MODIFY state VARCHAR(1024) CHARACTER SET utf8mb4 NOT NULL",
	} {
		t.Run(code, func(t *testing.T) {
			dsn := mysqltest.DSN(t)
			db := open(t, dsn)
			mustRun(t, "mysql", dsn, "ALTER TABLE phone_numbers "+alter)
			done, err := db.Swap(t.Context(), number, none, record("\xff", 1_790_000_000_123_457))
			if done || err == nil || isUnknown(err) || !strings.Contains(err.Error(), "MySQL error "+code) {
				t.Errorf("Swap = %v, %v; want MySQL error %s, and no unknown outcome", done, err, code)
			}
		})
	}
}

func TestMySQLTable_WarnsIfThePurgeIndexIsMissing(t *testing.T) {
	dsn := mysqltest.DSN(t)
	mustRun(t, "mysql", dsn, created(", KEY begun_at (begun_at)", ""))
	got := strings.Join(open(t, dsn).Warnings(), "\n")
	alter := regexp.MustCompile(`ALTER TABLE [^;]+`).FindString(got)
	if alter == "" {
		t.Fatalf("Warnings = %q; want an ALTER TABLE", got)
	}
	mustRun(t, "mysql", dsn, alter)
	if got := open(t, dsn).Warnings(); len(got) != 0 {
		t.Errorf("Warnings after it = %q; want none", got)
	}
}

// TestMySQLTable_WarnsOfAView has a view: information_schema does not have enough data on it
// to check it.
func TestMySQLTable_WarnsOfAView(t *testing.T) {
	dsn := mysqltest.DSN(t)
	mustRun(t, "mysql", dsn, created("phone_numbers (", "numbers ("), "CREATE VIEW phone_numbers AS SELECT * FROM numbers")
	db := open(t, dsn)
	mustKeepRecords(t, db)
	if got := db.Warnings(); len(got) != 1 || !strings.Contains(got[0], "failed to check the table phone_numbers") {
		t.Errorf("Warnings = %q; want one that the table could not be checked", got)
	}
}

// TestMySQLTable_CheckNeedsRightsOnItAlone has users with rights on the table only. These are
// enough to find the errors of a table, and to read it.
func TestMySQLTable_CheckNeedsRightsOnItAlone(t *testing.T) {
	server := mysqltest.Start(t)
	dsn := server.DSN(mysqltest.Database)
	mustRun(t, "mysql", dsn, "CREATE TABLE phone_numbers ("+shippedColumns+", tenant INT NOT NULL)",
		"CREATE USER writer@'%' IDENTIFIED BY 'w'", "GRANT SELECT, INSERT, UPDATE, DELETE ON phone_numbers TO writer@'%'",
		"CREATE USER reader@'%' IDENTIFIED BY 'r'", "GRANT SELECT ON phone_numbers TO reader@'%'")
	_, alter := prepareError(t, mysqltest.As(dsn, "writer:w"), "no unique key is on phone_number alone", "tenant has no default")
	reader, err := store.Open(mysqltest.As(dsn, "reader:r"))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := reader.PrepareToRead(t.Context()); err != nil {
		t.Errorf("PrepareToRead = %v; want nil", err)
	}
	mustRun(t, "mysql", dsn, alter)
	mustKeepRecords(t, open(t, mysqltest.As(dsn, "writer:w")))
}

// TestMySQLCollations_DistinguishNumbers shows why any collation of phone_number is accepted.
func TestMySQLCollations_DistinguishNumbers(t *testing.T) {
	db, err := sql.Open("mysql", mysqltest.DSN(t))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query("SELECT CHARACTER_SET_NAME, COLLATION_NAME FROM information_schema.COLLATION_CHARACTER_SET_APPLICABILITY WHERE CHARACTER_SET_NAME <> 'binary'")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var all [][2]string
	for rows.Next() {
		var set, collation string
		if err := rows.Scan(&set, &collation); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(collation, set) {
			collation = set + "_" + collation
		}
		all = append(all, [2]string{set, collation})
	}
	if rows.Err() != nil || len(all) < 100 {
		t.Fatalf("got %d collations, %v; want 100 or more, all of the server", len(all), rows.Err())
	}
	texts := []string{"+", "+0", "0", "purge"}
	for digit := range 10 {
		texts = append(texts, fmt.Sprint("+861860000000", digit))
	}
	for _, c := range all {
		var different int
		query := fmt.Sprintf("SELECT COUNT(DISTINCT CONVERT(x USING %s) COLLATE %s) FROM (SELECT '' x UNION SELECT '%s') texts", c[0], c[1], strings.Join(texts, "' UNION SELECT '"))
		if err := db.QueryRow(query).Scan(&different); err != nil || different != len(texts)+1 {
			t.Errorf("%s: got %d distinct texts, %v; want %d", c[1], different, err, len(texts)+1)
		}
	}
}

// TestSQLiteTable_RejectedUntilRenamed runs the statements that each error has.
func TestSQLiteTable_RejectedUntilRenamed(t *testing.T) {
	sqliteTable := func(columns string) string { return "CREATE TABLE phone_numbers (" + columns + ")" }
	for name, create := range map[string]string{
		"no key":                       sqliteTable("phone_number TEXT NOT NULL, version BLOB NOT NULL, begun_at INTEGER NOT NULL, state BLOB NOT NULL"),
		"a key over more columns":      sqliteTable("phone_number TEXT, version BLOB, begun_at INTEGER, state BLOB, PRIMARY KEY (phone_number, begun_at)"),
		"a key over some rows":         sqliteTable("phone_number TEXT, version BLOB, begun_at INTEGER, state BLOB") + "; CREATE UNIQUE INDEX i ON phone_numbers (phone_number) WHERE begun_at > 5",
		"another unique key":           sqliteTable("phone_number TEXT PRIMARY KEY, version BLOB, begun_at INTEGER UNIQUE, state BLOB"),
		"a number in an INTEGER":       sqliteTable("phone_number INTEGER PRIMARY KEY, version BLOB, begun_at INTEGER, state BLOB"),
		"a number with NUMERIC's form": sqliteTable("phone_number DECIMAL UNIQUE, version BLOB, begun_at INTEGER, state BLOB"),
		"a time of text":               sqliteTable("phone_number TEXT PRIMARY KEY, version BLOB, begun_at TEXT, state BLOB"),
		"a time that is inexact":       sqliteTable("phone_number TEXT PRIMARY KEY, version BLOB, begun_at REAL, state BLOB"),
		"strict text for bytes":        sqliteTable("phone_number TEXT PRIMARY KEY, version TEXT, begun_at INTEGER, state BLOB") + " STRICT",
		"a column without a default":   sqliteTable("phone_number TEXT PRIMARY KEY, version BLOB, begun_at INTEGER, state BLOB, tenant INTEGER NOT NULL"),
		"an id that is not filled":     sqliteTable("id INTEGER PRIMARY KEY, phone_number TEXT UNIQUE, version BLOB, begun_at INTEGER, state BLOB") + " WITHOUT ROWID",
		"a state too short":            sqliteTable("phone_number TEXT PRIMARY KEY, version BLOB, begun_at INTEGER, state BLOB CHECK (length(state) < 1000)"),
		"columns are missing":          sqliteTable("phone_number TEXT PRIMARY KEY"),
		"a trigger that changes rows":  sqliteTable("phone_number TEXT PRIMARY KEY, version BLOB, begun_at INTEGER, state BLOB") + "; CREATE TRIGGER t AFTER UPDATE ON phone_numbers BEGIN UPDATE phone_numbers SET state = x'00' WHERE phone_number = NEW.phone_number; END",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "codes.db")
			mustRun(t, "sqlite", path, create)
			text, alter := prepareError(t, "sqlite:"+path, "the table phone_numbers cannot be used")
			_, rest, _ := strings.Cut(text, alter)
			mustRun(t, "sqlite", path, alter+rest)
			mustKeepRecords(t, open(t, "sqlite:"+path))
			if got := indexes(t, path); got != 1 {
				t.Errorf("got %d indexes for the purge; want 1", got)
			}
		})
	}
}

// indexes counts the indexes for the purge.
func indexes(t *testing.T, path string) (count int) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRow("SELECT COUNT(*) FROM sqlite_master WHERE name = 'phone_numbers_begun_at' AND tbl_name = 'phone_numbers'").Scan(&count); err != nil {
		t.Fatal(err)
	}
	return count
}

// operatorsSchema returns the file that an operator can apply by hand.
func operatorsSchema(t *testing.T) string {
	t.Helper()
	return testutil.ReadFile(t, "../../phonenumberservice.sql")
}

func TestSchema_EqualsTheOperatorsFile(t *testing.T) {
	if got, want := testutil.ReadFile(t, "schema.sql"), operatorsSchema(t); got != want {
		t.Errorf("schema.sql: got\n%s\nwant phonenumberservice.sql\n%s", got, want)
	}
}

func TestSQLiteTable_AcceptedIfUsable(t *testing.T) {
	for name, create := range map[string]string{
		"as shipped":              operatorsSchema(t),
		"an id beside a key":      "CREATE TABLE phone_numbers (id INTEGER PRIMARY KEY AUTOINCREMENT, phone_number TEXT NOT NULL UNIQUE, version BLOB NOT NULL, begun_at INTEGER NOT NULL, state BLOB NOT NULL)",
		"audit columns":           "CREATE TABLE phone_numbers (phone_number TEXT PRIMARY KEY, version BLOB, begun_at INTEGER, state BLOB, created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, note TEXT, seconds INTEGER AS (begun_at / 1000000))",
		"without row identifiers": "CREATE TABLE phone_numbers (phone_number TEXT PRIMARY KEY, version BLOB, begun_at INTEGER, state BLOB) WITHOUT ROWID",
		"strict types":            "CREATE TABLE phone_numbers (phone_number TEXT PRIMARY KEY, version BLOB, begun_at INTEGER, state BLOB) STRICT",
		"no types":                "CREATE TABLE phone_numbers (phone_number PRIMARY KEY, version, begun_at, state)",
		"a unique index":          "CREATE TABLE phone_numbers (phone_number TEXT, version BLOB, begun_at INTEGER, state BLOB); CREATE UNIQUE INDEX i ON phone_numbers (phone_number)",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "codes.db")
			mustRun(t, "sqlite", path, create)
			mustKeepRecords(t, open(t, "sqlite:"+path))
		})
	}
}

// TestSQLiteTable_CheckLeavesNoRows counts the rows that the check wrote.
func TestSQLiteTable_CheckLeavesNoRows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "codes.db")
	open(t, "sqlite:"+path)
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var rows int
	if err := db.QueryRow("SELECT COUNT(*) FROM phone_numbers").Scan(&rows); err != nil || rows != 0 {
		t.Errorf("got %d rows, %v after a start; want none", rows, err)
	}
}

// TestSQLiteFile_GoneIsNotReady removes or replaces a file of an open database. Writes to a
// file without a name would be lost when the process ends.
func TestSQLiteFile_GoneIsNotReady(t *testing.T) {
	for _, suffix := range []string{"", "-wal"} {
		for name, change := range map[string]func(path, aside string) error{
			"removed": os.Rename,
			"replaced": func(path, aside string) error {
				text, err := os.ReadFile(path)
				return errors.Join(err, os.Rename(path, aside), os.WriteFile(path, text, 0o600))
			},
		} {
			t.Run("codes.db"+suffix+" "+name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "codes.db")
				db := open(t, "sqlite:"+path)
				mustSwap(t, db, number, none, record("first", 1), true)
				if err := change(path+suffix, path+".aside"); err != nil {
					t.Fatal(err)
				}
				if err := db.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), path+suffix+" was removed or replaced") {
					t.Errorf("Ready = %v; want an error that names the file", err)
				}
				if err := os.Rename(path+".aside", path+suffix); err != nil {
					t.Fatal(err)
				}
				if err := db.Ready(t.Context()); err != nil {
					t.Errorf("Ready after the file was put back = %v; want nil", err)
				}
			})
		}
	}
}
