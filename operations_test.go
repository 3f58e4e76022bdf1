package main

import (
	"bytes"
	"database/sql"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// inspect runs the command inspect and returns its output.
func inspect(t *testing.T, dsn, number string) string {
	t.Helper()
	out, err := command([]string{"DATA_SOURCE_NAME=" + dsn, "TZ=UTC"}, "inspect", number).CombinedOutput()
	if err != nil {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	return string(out)
}

func TestInspect_PrintsTheHistoryOfANumber(t *testing.T) {
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	fake.Limits(true)
	dsn := server.DSN(mysqltest.Database)
	admin := server.Open(t)
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	for _, statement := range []string{
		"CREATE USER reader@'%' IDENTIFIED BY 'r'",
		"GRANT SELECT ON " + mysqltest.Database + ".phone_numbers TO reader@'%'",
	} {
		if _, err := admin.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	reader := mysqltest.As(dsn, "reader:r") // may only read
	mustPrint := func(step string, wants ...string) {
		t.Helper()
		out := inspect(t, reader, "186 1234 5678")
		for _, want := range wants {
			if !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("%s: got no %q in\n%s", step, want, out)
			}
		}
		for _, m := range fake.Accepted() {
			if strings.Contains(out, m.Code) || strings.Contains(out, "12345678") {
				t.Errorf("%s: the output contains the code or the number:\n%s", step, out)
			}
		}
	}
	const ago, soon = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \(\d+s ago\)`, `\(in (10m0s|9m\d\ds)\)`
	mustPrint("never sent", `^number     \+86186\*\*\*\*5678\nlast send  none: nothing was sent`)

	p.send(t, "18612345678")
	sent := fake.Accepted()[0]
	accepted := "Aliyun     accepted " + ago + ", BizId " + regexp.QuoteMeta(sent.BizID)
	mustPrint("sent", "last send  "+ago+`, send ID \d+`, accepted+"\n", "code       live until .*"+soon+", 0 of 3 attempts used, accepted by Aliyun\n")
	p.valid(t, "18612345678", "x")
	mustPrint("a wrong code", "1 of 3 attempts used")
	p.valid(t, "18612345678", sent.Code)
	mustPrint("verified", accepted+"\n", "code       no live code", "verified   "+ago+" with attempt 2\n")

	p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	requestID := fake.RequestIDs()[1]
	mustPrint("limited", "Aliyun     not sent, limited "+ago+", code isv.BUSINESS_LIMIT_CONTROL, RequestId "+requestID+"\n",
		accepted+" \\(of an earlier send", "verified .* with attempt 2 \\(of an earlier send")

	fake.Next(dysmsapitest.CloseAfterReading().ButAccepted())
	fake.Limits(false)
	p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	mustPrint("a lost response", "no answer to the last send is known", "not sent, limited .*of an earlier send",
		"0 of 3 attempts used, not confirmed by Aliyun\n")
	for range 3 {
		p.valid(t, "18612345678", "x")
	}
	mustPrint("exhausted", "no live code", "exhausted  "+ago+" by 3 wrong attempts\n")

	file := filepath.Join(t.TempDir(), "none.db")
	out, err := command([]string{"DATA_SOURCE_NAME=sqlite:" + file}, "inspect", "18612345678").CombinedOutput()
	if _, missing := os.Stat(file); err == nil || missing == nil || !strings.Contains(string(out), "must be able to read and write "+file) {
		t.Errorf("a missing file: got %v, %s; want its name, and no new file", err, out)
	}
	out, err = command([]string{"DATA_SOURCE_NAME=" + reader}, "inspect", "10086").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "phone_number must be one mobile number") {
		t.Errorf("an invalid number: got %v, %s; want an error for phone_number", err, out)
	}
	out, err = command([]string{"DATA_SOURCE_NAME=" + dsn[:strings.LastIndex(dsn, "/")] + "/mysql"}, "inspect", "18612345678").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "the table phone_numbers is not there") {
		t.Errorf("a database without the table: got %v, %s; want an error for the table", err, out)
	}
}

func TestInspect_PrintsThatACodeExpired(t *testing.T) {
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	p.send(t, "18612345678")
	var out []byte
	testutil.Eventually(t, "inspect prints that the code expired", func() bool {
		out, _ = command([]string{"DATA_SOURCE_NAME=" + dsn, "PHONENUMBER_CODE_TTL=1s"}, "inspect", "18612345678").CombinedOutput()
		return regexp.MustCompile(`code       no live code\nexpired    .* ago\)\n`).Match(out)
	})
}

func TestInspect_ReadsASQLiteFileInUse(t *testing.T) {
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	p.send(t, "18612345678")
	if out := inspect(t, dsn, "+8618612345678"); !strings.Contains(out, "0 of 3 attempts used") {
		t.Errorf("inspect: want a live code:\n%s", out)
	}
	if !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
		t.Error("the code after inspect: got invalid; want valid")
	}
}

// write puts each secret into a file in dir and returns the _FILE variables.
func write(t *testing.T, dir string, secrets map[string]string) (env []string) {
	t.Helper()
	for name, value := range secrets {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		env = append(env, name+"_FILE="+path)
	}
	return env
}

func TestReload_SecretsNeedNoRestart(t *testing.T) {
	t.Parallel()
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	exec := func(statement string) {
		t.Helper()
		if _, err := admin.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	exec("CREATE USER phone@'%' IDENTIFIED BY 'old'")
	exec("GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON " + mysqltest.Database + ".* TO phone@'%'")
	as := func(password, database string) string {
		return mysqltest.As(server.DSN(database), "phone:"+password)
	}
	dir := t.TempDir()
	env := append(write(t, dir, map[string]string{
		"DATA_SOURCE_NAME": as("old", mysqltest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID,
		"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
	}), "ALIYUN_ENDPOINT="+fake.URL, "PHONENUMBER_DRAIN_DELAY=0s")
	p := run(t, env).serving(t)
	p.send(t, "18612345678")
	before := fake.LastCode(t, "18612345678")

	reloaded := p.logged(`reloaded secrets" names="ALIYUN_ACCESS_KEY_ID ALIYUN_ACCESS_KEY_SECRET DATA_SOURCE_NAME"`)
	exec("ALTER USER phone@'%' IDENTIFIED BY 'new'")
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tAnotherKey", "AnotherSecret0123456789"
	write(t, dir, map[string]string{
		"DATA_SOURCE_NAME": as("new", mysqltest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID,
		"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
	})
	testutil.Eventually(t, "the new secrets are in use", reloaded)
	for _, id := range connections(t, admin, "phone") { // new connections need the new password
		admin.Exec("KILL CONNECTION " + id)
	}
	testutil.Eventually(t, "a call succeeds with the new password", func() bool {
		_, err := p.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "x"})
		return err == nil
	})
	p.send(t, "18612345679")
	if !p.valid(t, "18612345679", fake.LastCode(t, "18612345679")) {
		t.Error("a code sent after the change: got invalid; want valid")
	}
	if !p.valid(t, "18612345678", before) { // its key was derived from the old secret
		t.Error("a code sent before the change: got invalid; want valid")
	}
	newReplica := run(t, env).serving(t)
	p.send(t, "18612345670")
	if !newReplica.valid(t, "18612345670", fake.LastCode(t, "18612345670")) {
		t.Error("the code at a replica started after the change: got invalid; want valid")
	}

	reloaded = p.logged("reloaded secrets")
	p.send(t, "18612345672")
	before = fake.LastCode(t, "18612345672")
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tThirdKey", "ThirdSecret0123456789"
	write(t, dir, map[string]string{"ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret})
	testutil.Eventually(t, "the third key is in use", reloaded)
	p.send(t, "18612345673")
	if !p.valid(t, "18612345672", before) {
		t.Error("a code sent between the two changes: got invalid; want valid")
	}
	if !p.valid(t, "18612345673", fake.LastCode(t, "18612345673")) {
		t.Error("a code sent after the second change: got invalid; want valid")
	}

	for reason, invalid := range map[string]map[string]string{
		"names another database; that takes a restart":       {"DATA_SOURCE_NAME": as("s3cret", "another")},
		"MySQL error 1045 (28000): the user or the password": {"DATA_SOURCE_NAME": as("s3cret", mysqltest.Database)},
		"the Aliyun access key secret must be printable ASCII": {
			"DATA_SOURCE_NAME":     as("new", mysqltest.Database),
			"ALIYUN_ACCESS_KEY_ID": "LTAI5tFourth", "ALIYUN_ACCESS_KEY_SECRET": "with a space s3cret",
		},
	} {
		rejected := p.logged(secretsRejected)
		write(t, dir, invalid)
		testutil.Eventually(t, "rejected: "+reason, rejected)
		p.send(t, "18612345671")
		if out := p.Output.String(); !strings.Contains(out, reason) {
			t.Errorf("the log lacks %q:\n%s", reason, out)
		}
		write(t, dir, map[string]string{
			"DATA_SOURCE_NAME": as("new", mysqltest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID,
			"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
		})
	}
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": as("later", mysqltest.Database)})
	testutil.Eventually(t, "a password that the database does not have yet is rejected", p.logged(secretsRejected))
	reloaded = p.logged("reloaded secrets")
	exec("ALTER USER phone@'%' IDENTIFIED BY 'later'")
	testutil.Eventually(t, "the password is in use when the database has it", reloaded)
	if out := p.Output.String(); strings.Contains(out, "s3cret") || strings.Contains(out, ":new@") || strings.Contains(out, "later@") {
		t.Errorf("the log contains a secret:\n%s", out)
	}
}

// connections returns the ids of the user's connections to the server.
func connections(t *testing.T, admin *sql.DB, user string) (ids []string) {
	t.Helper()
	rows, err := admin.Query("SELECT id FROM information_schema.processlist WHERE user = ?", user)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return ids
}

func TestCodeKey_RotationByReloadRejectsNoCode(t *testing.T) {
	t.Parallel()
	dsn, fake := mysqltest.DSN(t), dysmsapitest.New(t)
	old, fresh := "b2xkIG9sZCBvbGQgb2xkIG9sZCBvbGQgb2xkIG9sZCE=", "bmV3IG5ldyBuZXcgbmV3IG5ldyBuZXcgbmV3IG5ldyE="
	var dirs []string
	var replicas []process
	for range 2 {
		dir := t.TempDir()
		env := append(servicetest.Environment(fake, dsn), write(t, dir, map[string]string{"PHONENUMBER_CODE_KEY": old})...)
		dirs, replicas = append(dirs, dir), append(replicas, run(t, env).serving(t))
	}
	number := 18612340000
	mustVerify := func(step string) {
		t.Helper()
		for from := range replicas {
			for by := range replicas {
				number++
				replicas[from].send(t, fmt.Sprint(number))
				if !replicas[by].valid(t, fmt.Sprint(number), fake.LastCode(t, fmt.Sprint(number))) {
					t.Errorf("%s: a code sent by replica %d, at replica %d: got invalid; want valid", step, from, by)
				}
			}
		}
	}
	mustVerify("before")
	for _, keys := range []string{old + "," + fresh, fresh + "," + old, fresh} { // the steps of docs/install.md
		for i, p := range replicas { // in turn, with calls in between
			reloaded := p.logged("reloaded ")
			write(t, dirs[i], map[string]string{"PHONENUMBER_CODE_KEY": keys})
			testutil.Eventually(t, "the new keys are in use", reloaded)
			mustVerify(keys)
		}
	}
}

// If PHONENUMBER_METRICS_LISTEN is set and its address is taken, the program does not start.
// If it is unset and the default address is taken, the program runs without metrics.
func TestMetricsListen_SetAddressIsRequiredDefaultIsNot(t *testing.T) {
	fake := dysmsapitest.New(t)
	env := func(more ...string) []string {
		return append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), more...)
	}
	address := servicetest.FreeAddress(t)
	p := run(t, env("PHONENUMBER_METRICS_LISTEN="+address)).serving(t)
	p.send(t, "18612345678")
	for _, want := range []string{
		"phonenumber_build_info{", "phonenumber_outcomes_pending 0", "phonenumber_database_rows",
		`go_sql_max_open_connections{db_name="codes"} 1`, "process_cpu_seconds_total", "go_goroutines",
	} {
		if body := get(t, address, "/metrics", 200); !strings.Contains(body, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	if out, err := command(env("PHONENUMBER_METRICS_LISTEN="+address, "PHONENUMBER_LISTEN="+servicetest.FreeAddress(t))).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("--metrics-listen (PHONENUMBER_METRICS_LISTEN)")) {
		t.Errorf("a taken address: got %v, %s; want an error that names the setting", err, out)
	}
	if taken, err := net.Listen("tcp", "127.0.0.1:9090"); err == nil {
		defer taken.Close()
	}
	unset := run(t, env()).serving(t) // its default address is taken
	if out := unset.Output.String(); !strings.Contains(out, "metrics are not served; set PHONENUMBER_METRICS_LISTEN") {
		t.Errorf("the default address is taken: the log lacks a line about it:\n%s", out)
	}
}

func TestHealthcheck_LivenessIgnoresTheDatabase(t *testing.T) {
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, server.DSN(mysqltest.Database))).serving(t)
	succeeds := func(args ...string) bool {
		return command(nil, slices.Concat([]string{"healthcheck", "--address", p.Addr}, args)...).Run() == nil
	}
	server.Stop()
	testutil.Eventually(t, "not ready without the database", func() bool { return !succeeds() })
	if !succeeds("--liveness") {
		t.Error("liveness without the database: got a failure; want success, since a restart would not help")
	}
}
