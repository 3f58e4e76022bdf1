package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

// TestReload_WrongPasswordIsDialledLessAndLess counts the logins that the server rejected.
// A slow machine makes fewer attempts than the bound allows.
func TestReload_WrongPasswordIsDialledLessAndLess(t *testing.T) {
	t.Parallel()
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	rejected := func() (n int) {
		var name string
		if err := admin.QueryRow("SHOW GLOBAL STATUS LIKE 'Access_denied_errors'").Scan(&name, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	dir := t.TempDir()
	dsn := server.DSN(mysqltest.Database)
	env := append(write(t, dir, map[string]string{"DATA_SOURCE_NAME": dsn}), slices.DeleteFunc(servicetest.Environment(fake, dsn), func(v string) bool {
		return strings.HasPrefix(v, "DATA_SOURCE_NAME=")
	})...)
	p := run(t, env).serving(t)
	bad := strings.Replace(dsn, server.Password(), "wr0ng", 1)
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": bad})
	testutil.Eventually(t, "the first attempt", func() bool { return rejected() > 0 })
	time.Sleep(11 * time.Second) // attempts follow after 2, 6 and 14 s
	if n := rejected(); n > 3 {
		t.Errorf("rejected logins within 11 s of the first: got %d; want at most 3", n)
	}
	before := rejected()
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": strings.Replace(bad, "wr0ng", "wr0ng again", 1)})
	testutil.Eventually(t, "a further change is attempted", func() bool { return rejected() > before })
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": dsn + "?timeout=1s"})
	testutil.Eventually(t, "the correct password is in use", func() bool { return strings.Contains(p.Output.String(), "reloaded secrets") })
	if out := p.Output.String(); strings.Contains(out, "wr0ng") {
		t.Errorf("the log contains a password:\n%s", out)
	}
}
