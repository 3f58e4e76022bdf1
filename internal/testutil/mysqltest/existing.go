package mysqltest

import (
	"database/sql"
	"fmt"
	"os"
	"testing"
)

// Existing is the variable with the data source name of an empty database on a running server. The tests
// then use this database, one at a time, in place of servers that they start.
const Existing = "TEST_DATA_SOURCE_NAME"

// SkipOnExisting skips a test that uses a thing that the tests may not have on a running server, such
// as triggers.
func SkipOnExisting(t testing.TB, thing string) {
	t.Helper()
	if os.Getenv(Existing) != "" {
		t.Skipf("needs %s", thing)
	}
}

// existingDSN returns dsn, whose database the end of the test empties. Its errors contain no part of dsn.
func existingDSN(t testing.TB, dsn string) string {
	t.Helper()
	db, err := sql.Open("mysql", dsn)
	if err != nil {
		t.Fatalf("%s is no valid data source name", Existing)
	}
	t.Cleanup(func() { db.Close() })
	tables, err := Tables(db)
	if err != nil {
		t.Fatalf("failed to list the tables of the database of %s: %v", Existing, err)
	}
	if len(tables) > 0 {
		t.Fatalf("the database of %s has tables, such as %s; want an empty one", Existing, tables[0].Name)
	}
	t.Cleanup(func() {
		if err := Drop(db); err != nil {
			t.Errorf("failed to drop the test's tables: %v", err)
		}
	})
	return dsn
}

// A Table is a table or a view.
type Table struct{ Name, Type string }

// Tables returns the tables and views of the database of db.
func Tables(db *sql.DB) (tables []Table, err error) {
	rows, err := db.Query("SHOW FULL TABLES")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var t Table
		if err := rows.Scan(&t.Name, &t.Type); err != nil {
			return nil, err
		}
		tables = append(tables, t)
	}
	return tables, rows.Err()
}

// Drop drops the tables and views of the database of db.
func Drop(db *sql.DB) error {
	tables, err := Tables(db)
	if err != nil {
		return err
	}
	for _, t := range tables {
		kind := "TABLE"
		if t.Type == "VIEW" {
			kind = "VIEW"
		}
		if _, err := db.Exec(fmt.Sprintf("DROP %s `%s`", kind, t.Name)); err != nil {
			return err
		}
	}
	return nil
}
