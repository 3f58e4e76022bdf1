// Command testengine tests the service's guarantees on a server that is already there, and prints a table of
// the properties that held: see the target test-engine of the Makefile. It takes the data source name from
// the environment and never prints it, since it contains a password.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/go-sql-driver/mysql"

	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Stdout, os.Getenv(mysqltest.Existing), properties)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "test-engine:", err)
		os.Exit(1)
	}
}

const usage = "make test-engine DSN='user:password@tcp(host:3306)/empty_database'"

// run tests the properties on the database of dsn and writes the results to w. It returns an error if it
// cannot use the database, or if a property does not hold. The database is empty before and afterwards.
func run(ctx context.Context, w io.Writer, dsn string, properties []property) (err error) {
	if dsn == "" || strings.HasPrefix(dsn, "sqlite:") {
		return errors.New("no data source name of a server: " + usage)
	}
	service, err := store.Open(dsn)
	if err != nil {
		return err
	}
	defer service.Close()
	database, err := sql.Open("mysql", dsn)
	if err != nil {
		return errors.New("the data source name cannot be read")
	}
	defer database.Close()
	summary, err := inspect(ctx, service, database)
	if err != nil {
		return err
	}
	fmt.Fprint(w, summary)
	// The tests drop their tables too, unless they are interrupted.
	defer func() { err = errors.Join(err, mysqltest.Drop(database)) }()

	began := time.Now()
	tests, err := runTests(ctx, w, dsn, properties)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\n%s", summary)
	failed := printTable(w, properties, tests)
	fmt.Fprintf(w, "%.0f s\n", time.Since(began).Seconds())
	if failed > 0 {
		return fmt.Errorf("%d of %d properties did not hold", failed, len(properties))
	}
	return nil
}

const inspectTimeout = time.Minute

// inspect checks that the tests can use the database, and describes the server. It leaves no table behind.
func inspect(ctx context.Context, service *store.DB, database *sql.DB) (summary string, err error) {
	ctx, cancel := context.WithTimeout(ctx, inspectTimeout)
	defer cancel()
	if _, err := service.Diagnose(ctx); err != nil { // creates nothing
		return "", err
	}
	tables, err := mysqltest.Tables(database)
	if err != nil {
		return "", err
	}
	if len(tables) > 0 {
		return "", fmt.Errorf("the database has tables, such as %s; want an empty database, since the tests drop the tables in it", tables[0].Name)
	}
	// The first statement shows if the user may drop a table, before there is one.
	if err := execute(ctx, database, "DROP TABLE IF EXISTS phone_numbers"); err != nil {
		return "", err
	}
	if err := service.Prepare(ctx); err != nil {
		return "", err
	}
	err = execute(ctx, database, "RENAME TABLE phone_numbers TO hidden")
	if err := errors.Join(err, mysqltest.Drop(database)); err != nil {
		return "", err
	}
	var version, comment string
	if err := database.QueryRowContext(ctx, "SELECT VERSION(), @@version_comment").Scan(&version, &comment); err != nil {
		return "", err
	}
	summary = fmt.Sprintf("server: %s, %s\n", version, comment)
	for _, warning := range service.Warnings() {
		summary += "warning: " + warning + "\n"
	}
	return summary, nil
}

// execute runs a statement that needs all rights on the database.
func execute(ctx context.Context, database *sql.DB, statement string) error {
	_, err := database.ExecContext(ctx, statement)
	if server, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return fmt.Errorf("%s: MySQL error %d; the user needs all rights on this database, and none on others: GRANT ALL ON database.*", statement, server.Number)
	}
	return err
}
