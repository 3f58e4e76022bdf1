package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
)

func TestMain(m *testing.M) { os.Exit(mysqltest.Run(m)) }

func TestRun_RejectsADatabaseItCannotUse(t *testing.T) {
	server := mysqltest.Start(t)
	db := server.Open(t)
	for _, statement := range []string{
		"CREATE DATABASE used", "CREATE TABLE used.customers (id INT)", "CREATE DATABASE free",
		"CREATE USER limited@'%' IDENTIFIED BY '" + server.Password() + "'",
		"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON free.* TO limited@'%'",
	} {
		if _, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	limited := mysqltest.As(server.DSN("free"), "limited:"+server.Password())
	for _, c := range []struct{ name, dsn, want string }{
		{"none", "", usage},
		{"SQLite", "sqlite:codes.db", usage},
		{"not a data source name", "root:" + server.Password() + "@host:3306/name", "cannot be read"},
		{"a wrong password", mysqltest.As(server.DSN("free"), "limited:"+server.Password()+"x"), "1045"},
		{"a missing database", server.DSN("missing"), "CREATE DATABASE IF NOT EXISTS `missing`"},
		{"a database with tables", server.DSN("used"), "such as customers"},
		{"an account that may not drop tables", limited, "GRANT ALL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			err := run(t.Context(), &out, c.dsn, nil)
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("run = %v; want one line with %q", err, c.want)
			}
			if strings.Contains(err.Error(), server.Password()) || out.Len() > 0 {
				t.Errorf("run = %v, and printed %q; want no password, and nothing", err, &out)
			}
		})
	}
	var tables int
	if err := db.QueryRow("SELECT COUNT(*) FROM information_schema.TABLES WHERE TABLE_SCHEMA IN ('used', 'free')").Scan(&tables); err != nil || tables != 1 {
		t.Errorf("got %d tables, %v; want customers alone", tables, err)
	}
}

// TestRun_LeavesNothingBehind has an account with rights on one database only.
func TestRun_LeavesNothingBehind(t *testing.T) {
	server := mysqltest.Start(t)
	db := server.Open(t)
	for _, statement := range []string{
		"CREATE DATABASE free", "CREATE USER limited@'%' IDENTIFIED BY '" + server.Password() + "'", "GRANT ALL ON free.* TO limited@'%'",
	} {
		if _, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	var some []property
	for _, p := range properties {
		if p.name == "contract of the store" || p.name == "accounts and settings of the server" {
			some = append(some, p)
		}
	}
	var out bytes.Buffer
	err := run(t.Context(), &out, mysqltest.As(server.DSN("free"), "limited:"+server.Password()), some)
	if err != nil {
		t.Errorf("run = %v; want nil\n%s", err, &out)
	}
	for _, want := range []string{
		"server: ", "\ncontract of the store ", " held ", " not run  needs a server of its own; needs an account of its own\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("got no %q; want it in the output:\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), server.Password()) {
		t.Errorf("got the password in the output; want none:\n%s", &out)
	}
	var tables int
	if err := db.QueryRow("SELECT COUNT(*) FROM information_schema.TABLES WHERE TABLE_SCHEMA = 'free'").Scan(&tables); err != nil || tables != 0 {
		t.Errorf("got %d tables, %v; want none", tables, err)
	}
}

func TestVerdict_NeedsATestThatPassed(t *testing.T) {
	type runs = map[string]result
	type verdicts [3]string
	all := []property{
		{name: "parent", store: []string{"TestA"}},
		{name: "child", store: []string{"TestA/b"}},
		{name: "other", consistency: []string{"TestC"}},
	}
	pass, fail, skip := result{action: "pass"}, result{action: "fail"}, result{action: "skip", output: []string{"needs a server"}}
	for _, c := range []struct {
		name    string
		results runs
		want    verdicts
	}{
		{"all pass", runs{"TestA": pass, "TestA/a": pass, "TestA/b": pass, "TestC": pass}, verdicts{held, held, held}},
		{"a subtest fails", runs{"TestA": fail, "TestA/a": fail, "TestA/b": pass, "TestC": fail}, verdicts{failure, held, failure}},
		{"another property fails", runs{"TestA": fail, "TestA/a": pass, "TestA/b": fail, "TestC": pass}, verdicts{held, failure, held}},
		{"all subtests are skipped", runs{"TestA": pass, "TestA/a": skip, "TestA/b": skip, "TestC": skip}, verdicts{notRun, notRun, notRun}},
		{"some are skipped", runs{"TestA": pass, "TestA/a": skip, "TestA/c": pass, "TestA/b": skip, "TestC": pass}, verdicts{held, notRun, held}},
		{"one is missing", runs{"TestA": pass, "TestA/a": pass, "TestA/b": pass}, verdicts{held, held, failure}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i, p := range all {
				if got, detail := p.verdict(all, c.results); got != c.want[i] {
					t.Errorf("%s: got %s, %s; want %s", p.name, got, detail, c.want[i])
				}
			}
		})
	}
}
