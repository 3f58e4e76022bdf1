package store

import (
	"bytes"
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// schema is a copy of phonenumberservice.sql, which an operator can apply by hand. It is a copy
// because go:embed cannot read a file outside its package.
//
//go:embed schema.sql
var schema string

// A table that phonenumberservice.sql did not create can break every guarantee without an
// error. For example, if it has no unique key, a number can have several rows. Prepare therefore
// rejects a table that the statements cannot rely on, and its error contains the SQL that repairs the
// table.

// A requiredColumn is a column that the statements use. definition is for ALTER TABLE, and has the
// effect of schema.sql. types are the data types that return exactly the bytes that were stored. Every
// collation is allowed, because a number is a plus and ASCII digits, and no collation treats two of
// these as equal.
type requiredColumn struct {
	name, definition string
	types            []string
	length           int64 // minimum of the column's maximum length
}

var requiredColumns = []requiredColumn{
	{"phone_number", "VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL", []string{"varchar", "char", "varbinary"}, 16},
	{"version", "BINARY(16) NOT NULL", []string{"binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"}, 16},
	{"begun_at", "BIGINT NOT NULL", []string{"bigint"}, 0},
	{"state", "VARBINARY(1024) NOT NULL", []string{"varbinary", "blob", "mediumblob", "longblob"}, verify.MaxStateBytes},
}

// A mysqlTable is the description of the table phone_numbers in information_schema.
type mysqlTable struct {
	engine, transactional, options string
	columns                        map[string]mysqlColumn
	unique                         map[string][]keyPart // the unique keys
	begunAtIndexed                 bool                 // begun_at is first in an index
}

type mysqlColumn struct {
	dataType, columnType string
	length               int64
	nullable             bool
	// For a column that the statements do not use:
	noDefault bool // an INSERT without a value for it fails
	// distinct is an assumption: no two rows have the same value, except NULL. So a unique key that
	// contains the column accepts every number.
	distinct bool
}

// A keyPart is a part of a unique key: a column, or an expression if column is "".
type keyPart struct {
	column string
	whole  bool // the key has the whole column, not only a prefix
}

// checkMySQLTable reads the description of the table, and no rows. It ignores triggers, CHECK
// constraints and foreign keys. It returns an error if the table is not usable, otherwise prepareErr, the
// error of preparing the statements. If it cannot read the description, it returns a warning and
// prepareErr, or the read error if prepareErr is nil and a retry can succeed.
func checkMySQLTable(ctx context.Context, db *DB, prepareErr error) (warnings []string, err error) {
	t, err := readMySQLTable(ctx, db.pool)
	if err != nil {
		if prepareErr == nil && (ctx.Err() != nil || db.classify(err)&transient != 0) {
			return nil, err
		}
		return []string{"failed to check the table phone_numbers: " + db.dialect.redact(err).Error()}, prepareErr
	}
	problems, remedy := t.problems()
	if len(problems) > 0 {
		return nil, fmt.Errorf("the table phone_numbers cannot be used: %s; as a user with the right to alter it, run: ALTER TABLE phone_numbers %s; if its rows prevent that, run first: TRUNCATE TABLE phone_numbers; Valid then rejects the codes of the last ten minutes",
			strings.Join(problems, ", "), remedy)
	}
	if !t.begunAtIndexed {
		warnings = []string{"no index begins with begun_at, so that each purge of old numbers reads the whole table; run: ALTER TABLE phone_numbers " + remedy}
	}
	return warnings, prepareErr
}

// readMySQLTable reads the description of the table from information_schema.
func readMySQLTable(ctx context.Context, pool *sql.DB) (*mysqlTable, error) {
	const ofTable = " WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'phone_numbers'"
	t := &mysqlTable{columns: map[string]mysqlColumn{}, unique: map[string][]keyPart{}}
	err := eachRow(ctx, pool, []any{&t.engine, &t.options, &t.transactional}, func() {},
		`SELECT COALESCE(ENGINE, ''), COALESCE(CREATE_OPTIONS, ''),
			COALESCE((SELECT MAX(TRANSACTIONS) FROM information_schema.ENGINES e WHERE e.ENGINE = t.ENGINE), '')
		FROM information_schema.TABLES t`+ofTable)
	if err != nil {
		return nil, err
	}
	var name, defaultValue, extra string
	var c mysqlColumn
	err = eachRow(ctx, pool, []any{&name, &c.dataType, &c.columnType, &c.length, &c.nullable, &defaultValue, &extra}, func() {
		hasDefault := defaultValue != "NULL"
		computed := strings.Contains(extra, "auto_increment") || strings.Contains(extra, "generated")
		// The default of an enumeration is its first value.
		c.noDefault = !c.nullable && !hasDefault && !computed && c.dataType != "enum"
		// The remedy for noDefault allows NULL, and each row then has NULL in the column. A default
		// with parentheses, such as uuid(), is assumed to have a different value in each row.
		c.distinct = c.noDefault || computed || c.nullable && !hasDefault || strings.Contains(defaultValue, "(")
		if slices.ContainsFunc(requiredColumns, func(n requiredColumn) bool { return n.name == name }) {
			c.noDefault, c.distinct = false, false
		}
		t.columns[name] = c
	}, `SELECT LOWER(COLUMN_NAME), DATA_TYPE, COLUMN_TYPE, COALESCE(CHARACTER_MAXIMUM_LENGTH, 0), IS_NULLABLE = 'YES',
			COALESCE(COLUMN_DEFAULT, 'NULL'), LOWER(EXTRA) FROM information_schema.COLUMNS`+ofTable)
	if err != nil {
		return nil, err
	}
	var index string
	var unique, first bool
	var part keyPart
	err = eachRow(ctx, pool, []any{&index, &unique, &first, &part.column, &part.whole}, func() {
		t.begunAtIndexed = t.begunAtIndexed || first && part.column == "begun_at"
		if unique {
			t.unique[index] = append(t.unique[index], part)
		}
	}, `SELECT INDEX_NAME, NON_UNIQUE = 0, SEQ_IN_INDEX = 1, COALESCE(LOWER(COLUMN_NAME), ''), SUB_PART IS NULL
		FROM information_schema.STATISTICS`+ofTable+" ORDER BY INDEX_NAME, SEQ_IN_INDEX")
	if err == nil && (t.engine == "" || len(t.columns) == 0) {
		err = errors.New("information_schema does not describe it; it may be a view")
	}
	return t, err
}

// problems returns the problems of the table, and the clauses of an ALTER TABLE statement that repairs
// them. If the purge's index is missing, the clauses also add it.
func (t *mysqlTable) problems() (problems []string, remedy string) {
	var clauses []string
	add := func(problem, clause string) {
		problems, clauses = append(problems, problem), append(clauses, clause)
	}
	for _, n := range requiredColumns {
		switch c, ok := t.columns[n.name]; {
		case !ok:
			add("the column "+n.name+" is missing or hidden from this user", "ADD "+n.name+" "+n.definition)
		case !slices.Contains(n.types, c.dataType), c.length < n.length,
			c.dataType == "binary" && c.length > n.length: // it pads with zeros
			add(n.name+" is "+c.columnType, "MODIFY "+n.name+" "+n.definition)
		case n.name == "version" && c.nullable: // updateBatchSQL needs NOT NULL
			add("version may be NULL", "MODIFY "+n.name+" "+n.definition)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.columns)) {
		if c := t.columns[name]; c.noDefault {
			add(name+" has no default and may not be NULL", "MODIFY "+quoted(name)+" "+c.columnType+" NULL")
		}
	}
	noDefault := func(p keyPart) bool { return t.columns[p.column].noDefault }
	// A unique key can reject the row of another number, unless one part of the key is distinct. An
	// expression, or a column that this user cannot see, counts as distinct.
	distinct := func(p keyPart) bool {
		c, seen := t.columns[p.column]
		return !seen || c.distinct || p == keyPart{"phone_number", true} || p == keyPart{"version", true}
	}
	unique, dropPrimary := false, false
	for _, name := range slices.Sorted(maps.Keys(t.unique)) {
		parts, isPrimary := t.unique[name], name == "PRIMARY"
		switch {
		case len(parts) == 1 && parts[0] == keyPart{"phone_number", true}:
			unique = true
		case isPrimary && slices.ContainsFunc(parts, noDefault): // its remedy, NULL, is not allowed in a primary key
			dropPrimary = true
		case slices.ContainsFunc(parts, distinct):
		case isPrimary:
			problems, dropPrimary = append(problems, "the primary key rejects other numbers"), true
		default:
			add("the unique key "+name+" rejects other numbers", "DROP INDEX "+quoted(name))
		}
	}
	if !unique {
		problems = append(problems, "no unique key is on phone_number alone")
	}
	switch _, primary := t.unique["PRIMARY"]; {
	case dropPrimary:
		clauses = append(clauses, "DROP PRIMARY KEY, ADD PRIMARY KEY (phone_number)")
	case unique:
	case primary:
		clauses = append(clauses, "ADD UNIQUE KEY (phone_number)")
	default:
		clauses = append(clauses, "ADD PRIMARY KEY (phone_number)")
	}
	if t.transactional == "NO" {
		add("the engine "+t.engine+" has no transactions", "ENGINE=InnoDB")
	}
	if !t.begunAtIndexed {
		clauses = append(clauses, "ADD KEY (begun_at)")
	}
	remedy = strings.Join(clauses, ", ")
	if !unique && strings.Contains(t.options, "partitioned") {
		remedy += " REMOVE PARTITIONING" // a new key would need the partition columns
	}
	return problems, remedy
}

func quoted(name string) string { return "`" + strings.ReplaceAll(name, "`", "``") + "`" }

// errOtherTable marks the errors of tryTable that are about the table.
var errOtherTable = errors.New("it is not the table of phonenumberservice.sql")

// tryTable stores two numbers in a transaction, reads one of them, and rolls the transaction back.
func (db *DB) tryTable(ctx context.Context) error {
	// No phone number begins with +0. In a text column, begunAt sorts after later. In a
	// floating-point column, begunAt loses its last digit. So the test finds both.
	const one, other, begunAt, later = "+000000000000001", "+000000000000002", 1<<53 + 1, 1 << 54
	tx, err := db.pool.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	insert, update := tx.StmtContext(ctx, db.direct.insert), tx.StmtContext(ctx, db.direct.update)
	first := verify.Record{Version: verify.Version{1}, BegunAt: begunAt, State: []byte{}}
	second := verify.Record{Version: verify.Version{2}, BegunAt: begunAt, State: make([]byte, verify.MaxStateBytes)}
	var none verify.Version
	for i, s := range []swapRequest{{one, none, first}, {one, none, second}, {other, none, first}, {one, first.Version, second}} {
		applied, err := swap(ctx, insert, update, s)
		if err != nil {
			return err
		}
		if conflicts := i == 1; applied == conflicts {
			return fmt.Errorf("%w: it has other keys", errOtherTable)
		}
	}
	var number string
	got, err := scan(tx.QueryRowContext(ctx, selectBatchSQL(1)+" AND begun_at < ?", one, later), &number)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil || number != one || got.Version != second.Version || got.BegunAt != begunAt || !bytes.Equal(got.State, second.State) {
		return fmt.Errorf("%w: it does not return what is stored", errOtherTable)
	}
	return nil
}
