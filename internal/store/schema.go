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

// schema is equal to phonenumberservice.sql, which an operator can apply by hand. go:embed
// cannot read a file outside its package.
//
//go:embed schema.sql
var schema string

// A table that phonenumberservice.sql did not create can break every guarantee without an
// error: if it has no unique key, a number can have several rows. Prepare therefore rejects
// a table that the statements cannot rely on, and returns the SQL that repairs it.

// A mysqlNeed is a column that the statements use, with the types that hold as much as the
// shipped type and return the same bytes. Any collation works: a number is a plus and ASCII
// digits, and no collation treats two of these as equal.
type mysqlNeed struct {
	name, shipped string
	types         []string
	length        int64 // at least
}

var mysqlNeeds = []mysqlNeed{
	{"phone_number", "VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL", []string{"varchar", "char", "varbinary"}, 16},
	{"version", "BINARY(16) NOT NULL", []string{"binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"}, 16},
	{"begun_at", "BIGINT NOT NULL", []string{"bigint"}, 0},
	{"state", "VARBINARY(1024) NOT NULL", []string{"varbinary", "blob", "mediumblob", "longblob"}, verify.MaxStateBytes},
}

// problem returns the reason why c is unusable, "" if it is usable.
func (n mysqlNeed) problem(c mysqlColumn) string {
	switch {
	case !slices.Contains(n.types, c.dataType), c.length < n.length,
		c.dataType == "binary" && c.length > n.length: // it pads with zeros
		return n.name + " is " + c.columnType
	case n.name == "version" && c.nullable: // updateBatchSQL needs NOT NULL
		return n.name + " may be NULL"
	}
	return ""
}

// A mysqlTable is the description of phone_numbers in information_schema.
type mysqlTable struct {
	engine, transactional, options string
	columns                        map[string]mysqlColumn
	unique                         map[string][]keyPart
	begunAt                        bool // an index begins with it
}

type mysqlColumn struct {
	dataType, columnType string
	length               int64
	nullable             bool
	filled               bool // the INSERT sets it, or may omit it
	varies               bool // rows differ in it, or have NULL
}

// A keyPart with the column "" is an expression.
type keyPart struct {
	column string
	whole  bool
}

// check reads the table's description and none of its rows. It does not examine triggers,
// checks and foreign keys. If the description cannot be read, it returns prepared.
func (mysqlEngine) check(ctx context.Context, db *DB, prepared error) error {
	t, err := readMySQLTable(ctx, db.pool)
	if err != nil && prepared == nil && (ctx.Err() != nil || db.classify(err)&transient != 0) {
		return err
	}
	if err == nil && (t.engine == "" || len(t.columns) == 0) {
		err = errors.New("information_schema does not describe it; it may be a view")
	}
	if err != nil {
		if prepared == nil {
			db.remarks = append(db.remarks, "failed to check the table phone_numbers: "+db.dialect.redact(err).Error())
		}
		return prepared
	}
	problems, cures := t.problems()
	switch {
	case len(problems) > 0:
		return fmt.Errorf("the table phone_numbers cannot be used: %s; as a user who may alter it, run: ALTER TABLE phone_numbers %s; if its rows prevent that, run first: TRUNCATE TABLE phone_numbers; the codes of the last ten minutes are then refused",
			strings.Join(problems, ", "), cures)
	case !t.begunAt:
		db.remarks = append(db.remarks, "no index begins with begun_at, so that each purge of old numbers reads the whole table; run: ALTER TABLE phone_numbers "+cures)
	}
	return prepared
}

func readMySQLTable(ctx context.Context, pool *sql.DB) (*mysqlTable, error) {
	const ours = " WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = 'phone_numbers'"
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
		FROM information_schema.TABLES t`+ours, func(text []sql.NullString) {
		t.engine, t.options, t.transactional = text[0].String, text[1].String, text[2].String
	})
	if err == nil {
		err = each("SELECT COLUMN_NAME, DATA_TYPE, COLUMN_TYPE, CHARACTER_MAXIMUM_LENGTH, IS_NULLABLE, COLUMN_DEFAULT, EXTRA FROM information_schema.COLUMNS"+ours, func(text []sql.NullString) {
			c := mysqlColumn{dataType: text[1].String, columnType: text[2].String, nullable: text[4].String == "YES"}
			_, _ = fmt.Sscan(text[3].String, &c.length) // NULL leaves 0
			byDefault, extra := text[5], strings.ToLower(text[6].String)
			hasDefault := byDefault.Valid && byDefault.String != "NULL" // MariaDB writes the word
			computed := strings.Contains(extra, "auto_increment") || strings.Contains(extra, "generated")
			// An enumeration defaults to its first value; a default such as uuid() varies.
			c.filled = c.nullable || hasDefault || computed || c.dataType == "enum"
			c.varies = computed || c.nullable && !hasDefault || strings.Contains(byDefault.String, "(")
			name := strings.ToLower(text[0].String)
			if slices.ContainsFunc(mysqlNeeds, func(n mysqlNeed) bool { return n.name == name }) {
				c.filled, c.varies = true, false
			}
			t.columns[name] = c
		})
	}
	if err == nil {
		err = each("SELECT INDEX_NAME, NON_UNIQUE, SEQ_IN_INDEX, COLUMN_NAME, SUB_PART FROM information_schema.STATISTICS"+ours+" ORDER BY INDEX_NAME, SEQ_IN_INDEX", func(text []sql.NullString) {
			index, part := text[0].String, keyPart{strings.ToLower(text[3].String), !text[4].Valid}
			t.begunAt = t.begunAt || text[2].String == "1" && part.column == "begun_at"
			if text[1].String == "0" {
				t.unique[index] = append(t.unique[index], part)
			}
		})
	}
	return t, err
}

// problems returns the table's problems, and the clauses of one ALTER TABLE that repairs
// them and adds the index that the purge needs.
func (t *mysqlTable) problems() (problems []string, cures string) {
	var clauses []string
	add := func(problem, cure string) {
		problems, clauses = append(problems, problem), append(clauses, cure)
	}
	for _, need := range mysqlNeeds {
		if c, ok := t.columns[need.name]; !ok {
			add("the column "+need.name+" is missing or hidden from this user", "ADD "+need.name+" "+need.shipped)
		} else if problem := need.problem(c); problem != "" {
			add(problem, "MODIFY "+need.name+" "+need.shipped)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.columns)) {
		if c := t.columns[name]; !c.filled {
			add(name+" has no default and may not be NULL", "MODIFY "+quoted(name)+" "+c.columnType+" NULL")
		}
	}
	unfilled := func(p keyPart) bool {
		c, seen := t.columns[p.column]
		return seen && !c.filled
	}
	// A key rejects no other number's row if one of its parts differs between numbers. An
	// expression, and a column that this user cannot see, are assumed to differ.
	differs := func(p keyPart) bool {
		c, seen := t.columns[p.column]
		return !seen || c.varies || !c.filled || p == keyPart{"phone_number", true} || p == keyPart{"version", true}
	}
	unique, dropPrimary := false, false
	for _, name := range slices.Sorted(maps.Keys(t.unique)) {
		parts, isPrimary := t.unique[name], name == "PRIMARY"
		switch {
		case len(parts) == 1 && parts[0] == keyPart{"phone_number", true}:
			unique = true
		case isPrimary && slices.ContainsFunc(parts, unfilled): // NULL is not allowed in it
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
	if !t.begunAt {
		clauses = append(clauses, "ADD KEY (begun_at)")
	}
	cures = strings.Join(clauses, ", ")
	if !unique && strings.Contains(t.options, "partitioned") {
		cures += " REMOVE PARTITIONING" // a new key would need the partition columns
	}
	return problems, cures
}

func quoted(name string) string { return "`" + strings.ReplaceAll(name, "`", "``") + "`" }

// errNotShipped marks an error that the trial of a SQLite table found.
var errNotShipped = errors.New("it is not the table of phonenumberservice.sql")

// check stores two numbers in a transaction, reads one back and rolls back. A trial shows
// more than the declaration: SQLite derives a column's affinity from its type's name.
func (e sqliteEngine) check(ctx context.Context, db *DB, prepared error) error {
	err := prepared
	if err == nil {
		err = db.tryTable(ctx)
	}
	if err == nil {
		return e.createIndexes(ctx, db.pool)
	}
	if !errors.Is(err, errNotShipped) &&
		!slices.Contains([]int{sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH}, sqliteCode(err)) {
		return err
	}
	return fmt.Errorf("the table phone_numbers cannot be used: %w; have the service make its own, after which the codes of the last ten minutes are refused: ALTER TABLE phone_numbers RENAME TO phone_numbers_before; DROP INDEX IF EXISTS phone_numbers_begun_at", err)
}

func (db *DB) tryTable(ctx context.Context) error {
	// No phone number begins like these. As text, begunAt sorts after later; as a
	// floating-point number, it loses its last digit.
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
		done, err := swap(ctx, insert, update, s.swapRequest)
		if err != nil {
			return err
		}
		if done != s.want {
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
