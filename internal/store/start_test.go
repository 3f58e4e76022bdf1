package store_test

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/go-sql-driver/mysql"

	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
)

// TestPrepare_WaitsBehindARouterWithoutAServer lets a router reject
// connections with the errors of MySQL Router, ProxySQL, MaxScale, and of a server that starts
// or stops.
func TestPrepare_WaitsBehindARouterWithoutAServer(t *testing.T) {
	router := mysqltest.NewRouter(t, mysqltest.DSN(t))
	for name, c := range map[string]struct {
		refuse  func(uint16)
		numbers []uint16
		wait    bool
	}{
		"before the login":              {router.RefuseGreetings, []uint16{1040, 1053, 1105, 1129, 2003, 2013, 3032, 4031, 9001}, true},
		"before the login, final":       {router.RefuseGreetings, []uint16{1044, 1045, 1049, 1130, 3159}, false},
		"at the first command":          {router.RefuseCommands, []uint16{1047, 1927, 2003, 2006, 2013, 3032, 9001}, true},
		"at the first statement":        {router.RefuseStatements, []uint16{1047, 1053, 1927, 2002, 2003, 2006, 2013, 3032, 3781, 3782, 3783, 3796, 3797, 3798, 3799, 8027, 9001, 9002, 9003, 9004, 9005, 9007}, true},
		"at the first statement, final": {router.RefuseStatements, []uint16{1045, 1049, 1105, 8028, 8113}, false},
	} {
		for _, number := range c.numbers {
			c.refuse(number)
			err := prepare(t, router.DSN)
			var server *mysql.MySQLError
			if !errors.As(err, &server) || server.Number != number {
				t.Fatalf("%s: Prepare = %v; want the router's %d", name, err, number)
			}
			if got := errors.Is(err, store.ErrUnavailable); got != c.wait {
				t.Errorf("%s, %d: got ErrUnavailable %v; want %v", name, number, got, c.wait)
			}
		}
	}
	router.Pass()
	if err := prepare(t, router.DSN); err != nil {
		t.Errorf("Prepare after all rejections = %v; want nil", err)
	}
}

// TestPrepare_EndsIfWaitingDoesNotHelp lets a real server reject connections because
// of the configuration.
func TestPrepare_EndsIfWaitingDoesNotHelp(t *testing.T) {
	server := mysqltest.Start(t)
	run := admin(t, server.DSN(""))
	own := server.DSN(mysqltest.Database)
	dir := t.TempDir()
	certificate, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	pem, keyPEM := catest.New(t).Issue("127.0.0.1") // of a CA that this machine does not trust
	if err := errors.Join(os.WriteFile(certificate, []byte(pem), 0o600), os.WriteFile(key, []byte(keyPEM), 0o600)); err != nil {
		t.Fatal(err)
	}
	secured := mysqltest.StartWith(t, mysqltest.Options{Args: []string{"--ssl-cert=" + certificate, "--ssl-key=" + key}})
	plugin := "unix_socket"
	if server.Engine == mysqltest.MySQL {
		plugin = "auth_socket"
		run("INSTALL PLUGIN auth_socket SONAME 'auth_socket.so'")
	}
	run("CREATE USER locked@'%' IDENTIFIED BY 'p' ACCOUNT LOCK", "CREATE USER elsewhere@'10.1.2.3' IDENTIFIED BY 'p'",
		"CREATE USER plugged@'%' IDENTIFIED WITH "+plugin)
	cases := map[string]struct {
		dsn, set, reset string
	}{
		"an account that is locked":         {dsn: mysqltest.As(own, "locked:p")},
		"a user of another host":            {dsn: mysqltest.As(own, "elsewhere:p")},
		"a user without password login":     {dsn: mysqltest.As(own, "plugged:p")},
		"TLS that the server does not have": {dsn: own + "?tls=skip-verify"},
		"a certificate that is not trusted": {dsn: secured.DSN(mysqltest.Database) + "?tls=true"},
		"a parameter that the server lacks": {dsn: own + "?no_such_variable=1"},
		"an invalid value of a parameter":   {dsn: own + "?tx_isolation=%27SOMETIMES%27"},
		"a global parameter":                {dsn: own + "?max_connections=7"},
		"TLS that the server requires":      {own, "SET GLOBAL require_secure_transport = ON", "SET GLOBAL require_secure_transport = OFF"},
	}
	if server.Engine == mysqltest.MySQL {
		delete(cases, "TLS that the server does not have") // MySQL makes a certificate
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if c.set != "" {
				run(c.set)
				defer run(c.reset)
			}
			if err := prepare(t, c.dsn); err == nil || errors.Is(err, store.ErrUnavailable) {
				t.Errorf("Prepare = %v; want a final error", err)
			}
		})
	}
}

// TestPrepare_AdvisesStatementsThatWork runs the statements in an error on the server that
// caused it.
func TestPrepare_AdvisesStatementsThatWork(t *testing.T) {
	server := mysqltest.Start(t)
	run := admin(t, server.DSN(""))
	statement := regexp.MustCompile("(CREATE|GRANT) ([^`;]|`[^`]*`)*;")
	for i, name := range []string{"PhoneNumberService2", "no-db", "back`tick", "key", "a;b"} {
		user := fmt.Sprintf("o'brien-%d", i)
		run("CREATE USER '" + strings.ReplaceAll(user, "'", "''") + "'@'%' IDENTIFIED BY 'p/w@rd?'")
		database := "/" + url.PathEscape(name)
		mine := mysqltest.As(server.DSN(""), user+":p/w@rd?")
		mine = strings.TrimSuffix(mine, "/") + database
		t.Run(name, func(t *testing.T) {
			if err := prepare(t, strings.TrimSuffix(server.DSN(""), "/")+database); err == nil || !strings.Contains(err.Error(), "1049") {
				t.Fatalf("Prepare as a user with all rights = %v; want 1049", err)
			}
			err := prepare(t, mine)
			if err == nil || !strings.Contains(err.Error(), "1044") {
				t.Fatalf("Prepare = %v; want 1044", err)
			}
			for _, s := range statement.FindAllString(err.Error(), -1) {
				run(s)
			}
			if err := prepare(t, mine); err != nil {
				t.Errorf("Prepare after the advised statements = %v; want nil", err)
			}
			quoted := "`" + strings.ReplaceAll(name, "`", "``") + "`.*"
			run("REVOKE INSERT ON " + quoted + " FROM '" + strings.ReplaceAll(user, "'", "''") + "'@'%'")
			if err = prepare(t, mine); err == nil || !strings.Contains(err.Error(), "1142") {
				t.Fatalf("Prepare without INSERT = %v; want 1142", err)
			}
			run(statement.FindString(err.Error()))
			if err := prepare(t, mine); err != nil {
				t.Errorf("Prepare after the advised statements = %v; want nil", err)
			}
		})
	}
}
