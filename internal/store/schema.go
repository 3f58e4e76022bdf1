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

	sqlite3 "modernc.org/sqlite/lib"

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

// A requiredColumn is a column that the statements use. shipped is its declaration in schema.sql.
// types are the types that store as many bytes and return the same bytes. Every collation is allowed,
// because a number is a plus and ASCII digits, and no collation treats two of these as equal.
type requiredColumn struct {
	name, shipped string
	types         []string
	length        int64 // minimum
}

var requiredColumns = []requiredColumn{
	{"phone_number", "VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL", []string{"varchar", "char", "varbinary"}, 16},
	{"version", "BINARY(16) NOT NULL", []string{"binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"}, 16},
	{"begun_at", "BIGINT NOT NULL", []string{"bigint"}, 0},
	{"state", "VARBINARY(1024) NOT NULL", []string{"varbinary", "blob", "mediumblob", "longblob"}, verify.MaxStateBytes},
}

// problem returns the reason why c is not usable, or "".
func (n requiredColumn) problem(c mysqlColumn) string {
	switch {
	case !slices.Contains(n.types, c.dataType), c.length < n.length,
		c.dataType == "binary" && c.length > n.length: // it pads with zeros
		return n.name + " is " + c.columnType
	case n.name == "version" && c.nullable: // updateBatchSQL needs NOT NULL
		return n.name + " may be NULL"
	}
	return ""
}

// A mysqlTable is the description of the table phone_numbers in information_schema.
type mysqlTable struct {
	engine, transactional, options string
	columns                        map[string]mysqlColumn
	unique                         map[string][]keyPart
	begunAtIndexed                 bool // begun_at is first in an index
}

type mysqlColumn struct {
	dataType, columnType string
	length               int64
	nullable             bool
	insertable           bool // the INSERT sets or can omit it
	varies               bool // rows can differ, or have NULL
}

// A keyPart is a part of a unique key: a column, or an expression if column is "".
type keyPart struct {
	column string
	whole  bool // not only a prefix
}

// check implements engine. It reads the description of the table, and no rows. It ignores triggers,
// CHECK constraints and foreign keys. If it cannot read the description, it returns prepareErr.
func (mysqlEngine) check(ctx context.Context, db *DB, prepareErr error) error {
	t, err := readMySQLTable(ctx, db.pool)
	if err != nil && prepareErr == nil && (ctx.Err() != nil || db.classify(err)&transient != 0) {
		return err
	}
	if err == nil && (t.engine == "" || len(t.columns) == 0) {
		err = errors.New("information_schema does not describe it; it may be a view")
	}
	if err != nil {
		if prepareErr == nil {
			db.tableWarnings = append(db.tableWarnings, "failed to check the table phone_numbers: "+db.dialect.redact(err).Error())
		}
		return prepareErr
	}
	problems, remedy := t.problems()
	switch {
	case len(problems) > 0:
		return fmt.Errorf("the table phone_numbers cannot be used: %s; as a user who may alter it, run: ALTER TABLE phone_numbers %s; if its rows prevent that, run first: TRUNCATE TABLE phone_numbers; the codes of the last ten minutes are then refused",
			strings.Join(problems, ", "), remedy)
	case !t.begunAtIndexed:
		db.tableWarnings = append(db.tableWarnings, "no index begins with begun_at, so that each purge of old numbers reads the whole table; run: ALTER TABLE phone_numbers "+remedy)
	}
	return prepareErr
}

func readMySQLTable(ctx context.Context, pool *sql.DB) (*mysqlTable, error) {
	const ofTable = " WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'phone_numbers'"
	t := &mysqlTable{columns: map[string]mysqlColumn{}, unique: map[string][]keyPart{}}
	each := func(query string, take func(text []sql.NullString)) error {
		rows, err := pool.QueryContext(ctx, query)
		if err != nil {
			return err
		}
		defer rows.Close()
		names, err := rows.Columns()
		if err != nil {
			return err
		}
		text, into := make([]sql.NullString, len(names)), make([]any, len(names))
		for i := range text {
			into[i] = &text[i]
		}
		for rows.Next() {
			if err := rows.Scan(into...); err != nil {
				return err
			}
			take(text)
		}
		return rows.Err()
	}
	err := each(`SELECT ENGINE, CREATE_OPTIONS, (SELECT MAX(TRANSACTIONS) FROM information_schema.ENGINES e WHERE e.ENGINE = t.ENGINE)
		FROM information_schema.TABLES t`+ofTable, func(text []sql.NullString) {
		t.engine, t.options, t.transactional = text[0].String, text[1].String, text[2].String
	})
	if err == nil {
		err = each("SELECT COLUMN_NAME, DATA_TYPE, COLUMN_TYPE, CHARACTER_MAXIMUM_LENGTH, IS_NULLABLE, COLUMN_DEFAULT, EXTRA FROM information_schema.COLUMNS"+ofTable, func(text []sql.NullString) {
			c := mysqlColumn{dataType: text[1].String, columnType: text[2].String, nullable: text[4].String == "YES"}
			_, _ = fmt.Sscan(text[3].String, &c.length) // NULL leaves 0
			byDefault, extra := text[5], strings.ToLower(text[6].String)
			hasDefault := byDefault.Valid && byDefault.String != "NULL" // MariaDB returns the text NULL
			computed := strings.Contains(extra, "auto_increment") || strings.Contains(extra, "generated")
			// The default of an enumeration is its first value. A default such as uuid() differs
			// between rows.
			c.insertable = c.nullable || hasDefault || computed || c.dataType == "enum"
			c.varies = computed || c.nullable && !hasDefault || strings.Contains(byDefault.String, "(")
			name := strings.ToLower(text[0].String)
			if slices.ContainsFunc(requiredColumns, func(n requiredColumn) bool { return n.name == name }) {
				c.insertable, c.varies = true, false
			}
			t.columns[name] = c
		})
	}
	if err == nil {
		err = each("SELECT INDEX_NAME, NON_UNIQUE, SEQ_IN_INDEX, COLUMN_NAME, SUB_PART FROM information_schema.STATISTICS"+ofTable+" ORDER BY INDEX_NAME, SEQ_IN_INDEX", func(text []sql.NullString) {
			index, part := text[0].String, keyPart{strings.ToLower(text[3].String), !text[4].Valid}
			t.begunAtIndexed = t.begunAtIndexed || text[2].String == "1" && part.column == "begun_at"
			if text[1].String == "0" {
				t.unique[index] = append(t.unique[index], part)
			}
		})
	}
	return t, err
}

// problems returns the problems of the table, and the clauses of an ALTER TABLE statement that repairs
// them. If the purge's index is missing, the clauses also add it.
func (t *mysqlTable) problems() (problems []string, remedy string) {
	var clauses []string
	add := func(problem, remedy string) {
		problems, clauses = append(problems, problem), append(clauses, remedy)
	}
	for _, need := range requiredColumns {
		if c, ok := t.columns[need.name]; !ok {
			add("the column "+need.name+" is missing or hidden from this user", "ADD "+need.name+" "+need.shipped)
		} else if problem := need.problem(c); problem != "" {
			add(problem, "MODIFY "+need.name+" "+need.shipped)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.columns)) {
		if c := t.columns[name]; !c.insertable {
			add(name+" has no default and may not be NULL", "MODIFY "+quoted(name)+" "+c.columnType+" NULL")
		}
	}
	notInsertable := func(p keyPart) bool {
		c, seen := t.columns[p.column]
		return seen && !c.insertable
	}
	// A unique key can reject the row of another number, unless one part of the key has a
	// different value for each number. differs reports whether p is a part of this kind. It assumes this
	// of an expression, and of a column that this user cannot see.
	differs := func(p keyPart) bool {
		c, seen := t.columns[p.column]
		return !seen || c.varies || !c.insertable || p == keyPart{"phone_number", true} || p == keyPart{"version", true}
	}
	unique, dropPrimary := false, false
	for _, name := range slices.Sorted(maps.Keys(t.unique)) {
		parts, isPrimary := t.unique[name], name == "PRIMARY"
		switch {
		case len(parts) == 1 && parts[0] == keyPart{"phone_number", true}:
			unique = true
		case isPrimary && slices.ContainsFunc(parts, notInsertable): // NULL is not allowed in it
			dropPrimary = true
		case slices.ContainsFunc(parts, differs):
		case isPrimary:
			problems, dropPrimary = append(problems, "the primary key refuses other numbers"), true
		default:
			add("the unique key "+name+" refuses other numbers", "DROP INDEX "+quoted(name))
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

// errNotShipped marks the errors of tryTable that are about the table.
var errNotShipped = errors.New("it is not the table of phonenumberservice.sql")

// check implements engine. It tests the table by tryTable, because the declaration of a SQLite table
// does not show which values a column can store: SQLite derives the affinity of a column from the name of its
// type.
func (e sqliteEngine) check(ctx context.Context, db *DB, prepareErr error) error {
	err := prepareErr
	if err == nil {
		err = db.tryTable(ctx)
	}
	if err == nil {
		return e.prepareFiles(ctx, db.pool)
	}
	if !errors.Is(err, errNotShipped) &&
		!slices.Contains([]int{sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}, sqliteCode(err)) {
		return err
	}
	return fmt.Errorf("the table phone_numbers cannot be used: %w; have the service make its own, after which the codes of the last ten minutes are refused: ALTER TABLE phone_numbers RENAME TO phone_numbers_before; DROP INDEX IF EXISTS phone_numbers_begun_at", err)
}

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
	for _, s := range []struct {
		swapRequest
		want bool
	}{
		{swapRequest{one, verify.Version{}, first}, true},
		{swapRequest{one, verify.Version{}, second}, false},
		{swapRequest{other, verify.Version{}, first}, true},
		{swapRequest{one, first.Version, second}, true},
	} {
		applied, err := swap(ctx, insert, update, s.swapRequest)
		if err != nil {
			return err
		}
		if applied != s.want {
			return fmt.Errorf("%w: its keys are others", errNotShipped)
		}
	}
	var number string
	got, err := scan(tx.QueryRowContext(ctx, selectBatchSQL(1)+" AND begun_at < ?", one, later), &number)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil || number != one || got.Version != second.Version || got.BegunAt != begunAt || !bytes.Equal(got.State, second.State) {
		return fmt.Errorf("%w: it does not return what is stored", errNotShipped)
	}
	return nil
}
