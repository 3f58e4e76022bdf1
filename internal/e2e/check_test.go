package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

// check runs the command check, and returns its output and whether its exit code is 0.
func check(t *testing.T, env []string, args ...string) (stdout string, ok bool) {
	t.Helper()
	cmd := command(env, append([]string{"check"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if _, exited := err.(interface{ ExitCode() int }); err != nil && !exited {
		t.Fatal(err)
	}
	if strings.Contains(stderr.String(), "panic") {
		t.Fatal(stderr.String())
	}
	return string(out), err == nil
}

func TestCheck_AcceptsSettingsThatWork(t *testing.T) {
	t.Parallel()
	for name, dsn := range map[string]string{"MariaDB": mysqltest.DSN(t), "SQLite": "sqlite:" + filepath.Join(t.TempDir(), "codes.db")} {
		fake := dysmsapitest.New(t)
		ca := catest.New(t)
		crt, key := ca.Issue("sms.example.org")
		_, hash := newToken(t)
		dir := t.TempDir()
		env := append(servicetest.Environment(fake, dsn),
			"PHONENUMBER_TLS_CERT="+testutil.WriteFile(t, dir, "tls.crt", crt), "PHONENUMBER_TLS_KEY="+testutil.WriteFile(t, dir, "tls.key", key),
			"PHONENUMBER_CALLERS="+testutil.WriteFile(t, dir, "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+hash+"\n"))
		const missing = "warning  database     the database can be reached; the table phone_numbers is not there yet"
		for range 2 { // check itself creates no table
			if out, ok := check(t, env); !ok || !strings.Contains(out, missing) {
				t.Errorf("%s, no table: got ok %t and\n%s\nwant ok and %q", name, ok, out, missing)
			}
		}
		if out, err := command(env[:1], "migrate").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		out, ok := check(t, env)
		want := regexp.MustCompile(`^ok       settings     all are valid
ok       database     the table can be read and written, and stores what the service needs
(?:warning  database     innodb_flush_log_at_trx_commit is .*
)?ok       Aliyun SMS   can be reached without a proxy, and accepts the credentials; no SMS was asked for
ok       Aliyun PNVS  can be reached without a proxy, and accepts the credentials; no SMS was asked for
warning  certificate  .*/tls.crt ends 20.*
ok       callers      .*/callers.yaml names 1 callers
$`)
		if !ok || !want.MatchString(out) {
			t.Errorf("%s: got ok %t and\n%s\nwant ok and\n%s", name, ok, out, want)
		}
		if n := len(fake.Accepted()); n != 0 {
			t.Errorf("%s: got %d SMS; want none", name, n)
		}
	}
}

func TestCheck_SaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	dsn := mysqltest.DSN(t)
	const closed = testutil.RefusingAddress
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	const noDatabase = "failed   database     DATA_SOURCE_NAME: "
	dir := t.TempDir()
	callers := testutil.WriteFile(t, dir, "callers.yaml", "callers: x\n")
	for _, c := range []struct {
		name  string
		env   []string
		setUp func(*dysmsapitest.Server)
		ok    bool
		want  string
	}{
		{"nothing set", []string{"DATA_SOURCE_NAME="}, nil, false, "failed   settings     DATA_SOURCE_NAME is missing"},
		{"an unknown setting", []string{"PHONENUMBER_CODE_TLL=1m"}, nil, false, "failed   settings     PHONENUMBER_CODE_TLL is no setting of this service"},
		{"a database that is down", []string{"DATA_SOURCE_NAME=root@tcp(" + closed + ")/x"}, nil, false, noDatabase},
		{
			"a database that does not answer",
			[]string{"DATA_SOURCE_NAME=root@tcp(" + silent.Addr().String() + ")/x"},
			nil, false,
			noDatabase + "no answer within 8s; check the host",
		},
		{"a file without a directory", []string{"DATA_SOURCE_NAME=sqlite:/nowhere/codes.db"}, nil, false, noDatabase + "this user must be able to read and write /nowhere/codes.db and its directory"},
		{"a wrong password", []string{"DATA_SOURCE_NAME=" + mysqltest.As(dsn, "root:wrong")}, nil, false, noDatabase},
		{
			"an endpoint that is down",
			[]string{"ALIYUN_ENDPOINT=http://" + closed, "ALIYUN_PNVS_ENDPOINT=http://" + closed},
			nil, false,
			"failed   Aliyun SMS   no reply from " + closed + ": connection refused, without a proxy",
		},
		{"one endpoint that is down", []string{"ALIYUN_PNVS_ENDPOINT=http://" + closed}, nil, true, "warning  Aliyun PNVS  no reply from " + closed + ": connection refused, without a proxy\nwarning  Aliyun PNVS  each send with a template code such as 100001 fails; no other send needs this product\n"},
		{"a wrong secret", []string{"ALIYUN_ACCESS_KEY_SECRET=wrong"}, nil, false, "failed   Aliyun SMS   the access key secret is wrong (SignatureDoesNotMatch), RequestId "},
		{"a wrong ID", []string{"ALIYUN_ACCESS_KEY_ID=wrong"}, nil, false, "failed   Aliyun SMS   the access key ID does not exist, or is disabled (InvalidAccessKeyId.NotFound)"},
		{"no right to send", nil, func(f *dysmsapitest.Server) { f.Always(dysmsapitest.Reply(403, "Forbidden.RAM", "")) }, false, "failed   Aliyun SMS   the RAM user or role may not call it: allow the action dysms:SendSms (Forbidden.RAM)"},
		{"PNVS not opened", nil, func(f *dysmsapitest.Server) {
			f.Next(dysmsapitest.Reply(400, "MissingPhoneNumbers", ""), dysmsapitest.Reply(400, "FUNCTION_NOT_OPENED", ""))
		}, true, "warning  Aliyun PNVS  the product is not opened for this account: open it in the console (FUNCTION_NOT_OPENED)"},
		{"no right to ask for deliveries", []string{"PHONENUMBER_DELIVERY_SAMPLE=0.1"}, func(f *dysmsapitest.Server) { f.FailQueries(dysmsapitest.Reply(403, "NoPermission", "")) }, true, "warning  Aliyun SMS   does not say if an SMS arrived (PHONENUMBER_DELIVERY_SAMPLE): rejected by Aliyun, code NoPermission, RequestId "},
		{"codes that live under a minute", []string{"PHONENUMBER_CODE_TTL=59s"}, nil, true, "ok       Aliyun PNVS  can be reached without a proxy, and accepts the credentials; no SMS was asked for\nwarning  Aliyun PNVS  PHONENUMBER_CODE_TTL is 59s, so each send with a template code such as 100001 fails; set it to 1m or more\n"},
		{"no gateway", nil, func(f *dysmsapitest.Server) { f.Always(dysmsapitest.BadGateway()) }, false, "failed   Aliyun SMS   the reply of "},
		{"half a key pair", []string{"PHONENUMBER_TLS_CERT=tls.crt"}, nil, false, "failed   settings     --tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY) must be set both"},
		{"a broken callers file", []string{"PHONENUMBER_CALLERS=" + callers}, nil, false, "failed   access       " + callers},
		{"a proxy", []string{"HTTPS_PROXY=http://hunter2@" + closed, "ALIYUN_ENDPOINT=https://aliyun.invalid", "ALIYUN_PNVS_ENDPOINT=https://aliyun.invalid"}, nil, false, "failed   Aliyun SMS   no reply from aliyun.invalid: proxy: connection refused, through the proxy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fake := dysmsapitest.New(t)
			if c.setUp != nil {
				c.setUp(fake)
			}
			env := append(servicetest.Environment(fake, dsn), c.env...)
			out, ok := check(t, env)
			if ok != c.ok || !strings.Contains(out, c.want) {
				t.Errorf("got ok %t and\n%s\nwant ok %t and %q", ok, out, c.ok, c.want)
			}
			jsonText, jsonOK := check(t, env, "--json")
			var result struct {
				OK     bool
				Checks []struct{ Name, Result, Detail string }
			}
			if err := json.Unmarshal([]byte(jsonText), &result); err != nil {
				t.Fatalf("%v: %s", err, jsonText)
			}
			failed := strings.Contains(jsonText, `"result": "failed"`)
			if jsonOK != result.OK || result.OK == failed || len(result.Checks) == 0 {
				t.Errorf("got exit code 0 %t, ok %t and\n%s\nwant them equal, and ok unless a check failed", jsonOK, result.OK, jsonText)
			}
			for _, secret := range []string{fake.AccessKeySecret, "hunter2", "root:wrong"} {
				if strings.Contains(out+jsonText, secret) {
					t.Errorf("got the secret %s in\n%s", secret, out)
				}
			}
			if n := len(fake.Accepted()); n != 0 {
				t.Errorf("got %d SMS; want none", n)
			}
		})
	}
}

// Aliyun rejects requests if the clocks differ by more than 15 minutes.
func TestCheck_SaysWhichClockDiffers(t *testing.T) {
	t.Parallel()
	dsn := mysqltest.DSN(t)
	const differs = "its clock differs from this machine's by "
	later := fmt.Sprintf("DATA_SOURCE_NAME=%s?timestamp=%d", dsn, time.Now().Unix()+5400)
	// The skews are not whole minutes, since a date has whole seconds.
	for _, c := range []struct {
		name         string
		env          []string
		skew         time.Duration // of Aliyun's clock
		ok           bool
		result, line string
	}{
		{"Aliyun, under a minute", nil, 50 * time.Second, true, "", ""},
		{"Aliyun, over a minute", nil, 70 * time.Second, true, "warning  Aliyun SMS   ", `1m\d+s; this machine needs NTP`},
		{"PNVS, under 15 minutes", nil, -870 * time.Second, true, "warning  Aliyun PNVS  ", `-14m\d+s; this machine needs NTP`},
		{"Aliyun, over 15 minutes", nil, 930 * time.Second, false, "failed   Aliyun SMS   ", `15m\d+s; this machine needs NTP`},
		{"the database", []string{later}, 0, true, "warning  database     ", `1h\d+m\d+s; both need NTP`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fake := dysmsapitest.New(t)
			fake.SetSkew(c.skew)
			out, ok := check(t, append(servicetest.Environment(fake, dsn), c.env...))
			want := "(?m)^" + c.result + differs + c.line + "$"
			if c.line == "" {
				if !ok || strings.Contains(out, differs) {
					t.Errorf("got ok %t and\n%s\nwant ok and no line about a clock", ok, out)
				}
			} else if ok != c.ok || !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("got ok %t and\n%s\nwant ok %t and %s", ok, out, c.ok, want)
			}
		})
	}
}

func TestCheck_DescribesThePort(t *testing.T) {
	t.Parallel()
	ca, dir := catest.New(t), t.TempDir()
	// tls returns the variables of a certificate that ends after left.
	tls := func(name string, left time.Duration) []string {
		crt, key := ca.IssueUntil(time.Now().Add(left), "sms.example.org")
		return []string{
			"PHONENUMBER_TLS_CERT=" + testutil.WriteFile(t, dir, name+".crt", crt),
			"PHONENUMBER_TLS_KEY=" + testutil.WriteFile(t, dir, name+".key", key),
		}
	}
	clients := "PHONENUMBER_TLS_CLIENT_CA=" + testutil.WriteFile(t, dir, "clients.crt", ca.PEM)
	const day = 24 * time.Hour
	const open = "warning  access       callers are not authenticated: anyone who reaches the port can send at your cost and use up attempts; set PHONENUMBER_CALLERS\n"
	for _, c := range []struct {
		name string
		env  []string
		ok   bool
		want string // the last lines
	}{
		{"no certificate", nil, true, "warning  access       TLS is off: codes and tokens can be read on the network; set PHONENUMBER_TLS_CERT\n" + open},
		{"a certificate that has ended", tls("ended", -time.Minute), false, "failed   certificate  .*/ended.crt ends 20.*\n" + open},
		{"a certificate that ends soon", tls("soon", 13*day), true, "warning  certificate  .*/soon.crt ends 20.*\n" + open},
		{"client certificates", append(tls("good", 15*day), clients), true, "ok       certificate  .*/good.crt ends 20.*\nok       callers      clients need a certificate of .*/clients.crt\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			out, ok := check(t, append(servicetest.Environment(dysmsapitest.New(t), "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), c.env...))
			want := regexp.MustCompile(`(?m)^ok       Aliyun PNVS .*\n` + c.want + `\z`)
			if ok != c.ok || !want.MatchString(out) {
				t.Errorf("got ok %t and\n%s\nwant ok %t and %s", ok, out, c.ok, want)
			}
		})
	}
}

// The user of the service needs each of four rights, and CREATE if the table is missing.
func TestCheck_NamesAMissingRight(t *testing.T) {
	t.Parallel()
	server := mysqltest.Start(t)
	admin := server.Open(t)
	fake := dysmsapitest.New(t)
	const failed, missing = "failed   database     DATA_SOURCE_NAME: ", "the table phone_numbers is not there"
	grant := "run: GRANT SELECT, INSERT, UPDATE, DELETE ON `" + mysqltest.Database + "`.* TO '%s'@'%%'; and if the table is missing, run phonenumberservice.sql"
	for _, c := range []struct {
		user, rights string
		table        bool
		want         string
	}{
		{"writer", "SELECT, INSERT, UPDATE, DELETE", false, failed + missing + ": the user needs SELECT, INSERT, UPDATE and DELETE on the table phone_numbers; as a user with the right to grant them, " + fmt.Sprintf(grant, "writer")},
		{"creator", "SELECT, CREATE", false, failed + missing + ": "},
		{"owner", "SELECT, INSERT, UPDATE, DELETE, CREATE", false, "warning  database     the database can be reached; " + missing + " yet"},
		{"reader", "SELECT", true, failed},
		{"keeper", "SELECT, INSERT, UPDATE", true, "warning  database     old numbers cannot be purged: "},
		{"full", "SELECT, INSERT, UPDATE, DELETE", true, "ok       database     the table can be read and written"},
	} {
		if c.table {
			if out, err := command([]string{"DATA_SOURCE_NAME=" + server.DSN(mysqltest.Database)}, "migrate").CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
		mysqltest.Exec(t, admin,
			"CREATE USER "+c.user+"@'%' IDENTIFIED BY 'pw'", "GRANT "+c.rights+" ON "+mysqltest.Database+".* TO "+c.user+"@'%'",
		)
		out, ok := check(t, servicetest.Environment(fake, mysqltest.As(server.DSN(mysqltest.Database), c.user+":pw")))
		if want := !strings.HasPrefix(c.want, "failed"); ok != want || !strings.Contains(out, c.want) {
			t.Errorf("%s, table %t: got ok %t and\n%s\nwant ok %t and %q", c.rights, c.table, ok, out, want, c.want)
		}
		if tables, err := mysqltest.Tables(admin); err != nil || len(tables) > 0 != c.table {
			t.Errorf("%s: got the tables %v, %v after check; want one: %t", c.rights, tables, err, c.table)
		}
	}
}
