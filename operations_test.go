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
	"time"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// inspect runs the command and returns what it says.
func inspect(t *testing.T, dsn, number string) string {
	t.Helper()
	out, err := program([]string{"DATA_SOURCE_NAME=" + dsn, "TZ=UTC"}, "inspect", number).CombinedOutput()
	if err != nil {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	return string(out)
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !condition(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func TestInspect_PrintsTheHistoryOfANumber(t *testing.T) {
	server, fake := mariadbtest.Start(t), dysmsapitest.New(t)
	fake.Limits(true)
	dsn := server.DSN(mariadbtest.Database)
	admin := server.Open(t)
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	for _, statement := range []string{"CREATE USER reader@'%' IDENTIFIED BY 'r'", "GRANT SELECT ON " + mariadbtest.Database + ".phone_numbers TO reader@'%'"} {
		if _, err := admin.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	reader := mariadbtest.As(dsn, "reader:r") // may read, and nothing else
	mustSay := func(step string, wants ...string) {
		t.Helper()
		out := inspect(t, reader, "186 1234 5678")
		for _, want := range wants {
			if !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("%s: want %q in\n%s", step, want, out)
			}
		}
		for _, m := range fake.Accepted() {
			if strings.Contains(out, m.Code) || strings.Contains(out, "12345678") {
				t.Errorf("%s: it tells the code or the number:\n%s", step, out)
			}
		}
	}
	const ago, soon = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \(\d+s ago\)`, `\(in (10m0s|9m\d\ds)\)`
	mustSay("never sent", `^number     \+86186\*\*\*\*5678\nlast send  none: nothing was sent`)

	p.send(t, "18612345678")
	sent := fake.Accepted()[0]
	accepted := "Aliyun     accepted " + ago + ", BizId " + regexp.QuoteMeta(sent.BizID)
	mustSay("sent", "last send  "+ago+`, send ID \d+`, accepted+"\n", "code       live until .*"+soon+", 0 of 3 attempts used, accepted by Aliyun\n")
	p.valid(t, "18612345678", "x")
	mustSay("a wrong code", "1 of 3 attempts used")
	p.valid(t, "18612345678", sent.Code)
	mustSay("verified", accepted+"\n", "code       no live code", "verified   "+ago+" with attempt 2\n")

	p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	requestID := fake.RequestIDs()[1]
	mustSay("limited", "Aliyun     not sent, limited "+ago+", code isv.BUSINESS_LIMIT_CONTROL, RequestId "+requestID+"\n", accepted+" \\(of an earlier send", "verified .* with attempt 2 \\(of an earlier send")

	fake.Next(dysmsapitest.CloseAfterReading().ButAccepted())
	fake.Limits(false)
	p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	mustSay("a lost answer", "no answer to the last send is known", "not sent, limited .*of an earlier send", "0 of 3 attempts used, not confirmed by Aliyun\n")
	for range 3 {
		p.valid(t, "18612345678", "x")
	}
	mustSay("exhausted", "no live code", "exhausted  "+ago+" by 3 wrong attempts\n")

	file := filepath.Join(t.TempDir(), "none.db")
	out, err := program([]string{"DATA_SOURCE_NAME=sqlite:" + file}, "inspect", "18612345678").CombinedOutput()
	if _, missing := os.Stat(file); err == nil || missing == nil || !strings.Contains(string(out), "must be able to read and write "+file) {
		t.Errorf("a file that is not there: got %v, %s; want it named, and not created", err, out)
	}
	out, err = program([]string{"DATA_SOURCE_NAME=" + reader}, "inspect", "10086").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "phone_number must be one mobile number") {
		t.Errorf("no number: got %v, %s", err, out)
	}
	out, err = program([]string{"DATA_SOURCE_NAME=" + dsn[:strings.LastIndex(dsn, "/")] + "/mysql"}, "inspect", "18612345678").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "the table phone_numbers is not there") {
		t.Errorf("another database: got %v, %s", err, out)
	}
}

func TestInspect_PrintsThatACodeExpired(t *testing.T) {
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	p.send(t, "18612345678")
	var out []byte
	eventually(t, "expired", func() bool {
		out, _ = program([]string{"DATA_SOURCE_NAME=" + dsn, "PHONENUMBER_CODE_TTL=1s"}, "inspect", "18612345678").CombinedOutput()
		return regexp.MustCompile(`code       no live code\nexpired    .* ago\)\n`).Match(out)
	})
}

func TestInspect_ReadsASQLiteFileInUse(t *testing.T) {
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	p.send(t, "18612345678")
	if out := inspect(t, dsn, "+8618612345678"); !strings.Contains(out, "0 of 3 attempts used") {
		t.Errorf("want the code alive:\n%s", out)
	}
	if !p.valid(t, "18612345678", lastCode(fake)) {
		t.Error("the code is refused after an inspection")
	}
}

// write puts secrets into files and returns their variables.
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
	server, fake := mariadbtest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	exec := func(statement string) {
		t.Helper()
		if _, err := admin.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	exec("CREATE USER phone@'%' IDENTIFIED BY 'old'")
	exec("GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON " + mariadbtest.Database + ".* TO phone@'%'")
	as := func(password, database string) string {
		return mariadbtest.As(server.DSN(database), "phone:"+password)
	}
	dir := t.TempDir()
	env := append(write(t, dir, map[string]string{
		"DATA_SOURCE_NAME": as("old", mariadbtest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
	}), "ALIYUN_ENDPOINT="+fake.URL, "PHONENUMBER_DRAIN_DELAY=0s")
	p := run(t, env).serving(t)
	told := func(what string) func() bool {
		before := strings.Count(p.Output.String(), what)
		return func() bool { return strings.Count(p.Output.String(), what) > before }
	}
	p.send(t, "18612345678")
	before := lastCode(fake)

	taken := told(`reloaded secrets" names="ALIYUN_ACCESS_KEY_ID ALIYUN_ACCESS_KEY_SECRET DATA_SOURCE_NAME"`)
	exec("ALTER USER phone@'%' IDENTIFIED BY 'new'")
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tAnotherKey", "AnotherSecret0123456789"
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": as("new", mariadbtest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret})
	eventually(t, "taken over", taken)
	for _, id := range connections(t, admin, "phone") { // new ones need the new password
		admin.Exec("KILL CONNECTION " + id)
	}
	eventually(t, "calls work with the new password", func() bool {
		_, err := p.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "x"})
		return err == nil
	})
	p.send(t, "18612345679")
	if !p.valid(t, "18612345679", lastCode(fake)) || !p.valid(t, "18612345678", before) {
		t.Error("a code is refused that went out after the change, or before it with a key that was derived from the old secret")
	}
	again := run(t, env).serving(t)
	p.send(t, "18612345670")
	if !again.valid(t, "18612345670", lastCode(fake)) {
		t.Error("a replica that was started after the change refuses a code")
	}

	taken = told("reloaded secrets")
	p.send(t, "18612345672")
	before = lastCode(fake)
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tThirdKey", "ThirdSecret0123456789"
	write(t, dir, map[string]string{"ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret})
	eventually(t, "taken over a second time", taken)
	p.send(t, "18612345673")
	if !p.valid(t, "18612345672", before) || !p.valid(t, "18612345673", lastCode(fake)) {
		t.Error("a code is refused that went out between two changes, or after the second")
	}

	const refusal = "failed to reload secrets; keeping the previous version"
	for why, wrong := range map[string]map[string]string{
		"names another database; that takes a restart":         {"DATA_SOURCE_NAME": as("s3cret", "another")},
		"MySQL error 1045 (28000): the user or the password":   {"DATA_SOURCE_NAME": as("s3cret", mariadbtest.Database)},
		"the Aliyun access key secret must be printable ASCII": {"DATA_SOURCE_NAME": as("new", mariadbtest.Database), "ALIYUN_ACCESS_KEY_ID": "LTAI5tFourth", "ALIYUN_ACCESS_KEY_SECRET": "with a space s3cret"},
	} {
		refused := told(refusal)
		write(t, dir, wrong)
		eventually(t, "refused: "+why, refused)
		p.send(t, "18612345671")
		if out := p.Output.String(); !strings.Contains(out, why) {
			t.Errorf("the log does not say %q:\n%s", why, out)
		}
		write(t, dir, map[string]string{"DATA_SOURCE_NAME": as("new", mariadbtest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret})
	}
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": as("later", mariadbtest.Database)})
	eventually(t, "a password that the database does not know yet", told(refusal))
	taken = told("reloaded secrets")
	exec("ALTER USER phone@'%' IDENTIFIED BY 'later'")
	eventually(t, "taken over once the database knows it", taken)
	if out := p.Output.String(); strings.Contains(out, "s3cret") || strings.Contains(out, ":new@") || strings.Contains(out, "later@") {
		t.Errorf("the log holds a secret:\n%s", out)
	}
}

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
	dsn, fake := mariadbtest.DSN(t), dysmsapitest.New(t)
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
				if !replicas[by].valid(t, fmt.Sprint(number), lastCode(fake)) {
					t.Errorf("%s: a code that replica %d sent is refused by replica %d", step, from, by)
				}
			}
		}
	}
	mustVerify("before")
	for _, keys := range []string{old + "," + fresh, fresh + "," + old, fresh} { // as docs/install.md says
		for i, p := range replicas { // one after the other, with calls in between
			before := strings.Count(p.Output.String(), "took over")
			write(t, dirs[i], map[string]string{"PHONENUMBER_CODE_KEY": keys})
			eventually(t, "taken over", func() bool { return strings.Count(p.Output.String(), "took over") > before })
			mustVerify(keys)
		}
	}
}

func TestMetricsListen_SetAddressIsRequiredDefaultIsNot(t *testing.T) {
	fake := dysmsapitest.New(t)
	env := func(also ...string) []string {
		return append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), also...)
	}
	address := servicetest.FreeAddress(t)
	p := run(t, env("PHONENUMBER_METRICS_LISTEN="+address)).serving(t)
	p.send(t, "18612345678")
	for _, want := range []string{"phonenumber_build_info{", "phonenumber_outcomes_pending 0", "phonenumber_database_rows", `go_sql_max_open_connections{db_name="codes"} 1`, "process_cpu_seconds_total", "go_goroutines"} {
		if body := get(t, address, "/metrics", 200); !strings.Contains(body, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	if out, err := program(env("PHONENUMBER_METRICS_LISTEN="+address, "PHONENUMBER_LISTEN="+servicetest.FreeAddress(t))).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("--metrics-listen (PHONENUMBER_METRICS_LISTEN)")) {
		t.Errorf("an address that is taken: got %v, %s; want a refusal that names the setting", err, out)
	}
	if taken, err := net.Listen("tcp", metricsListen); err == nil {
		defer taken.Close()
	}
	unset := run(t, env()).serving(t) // beside who listens there, perhaps we
	if out := unset.Output.String(); !strings.Contains(out, "metrics are not served; set PHONENUMBER_METRICS_LISTEN") {
		t.Errorf("the usual address is taken: want that said\n%s", out)
	}
}

func TestHealthcheck_LivenessIgnoresTheDatabase(t *testing.T) {
	server, fake := mariadbtest.Start(t), dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, server.DSN(mariadbtest.Database))).serving(t)
	ask := func(args ...string) bool {
		return program(nil, slices.Concat([]string{"healthcheck", "--address", p.Addr}, args)...).Run() == nil
	}
	server.Stop()
	eventually(t, "not ready without the database", func() bool { return !ask() })
	if !ask("--liveness") {
		t.Error("not live without the database: a restart would not bring it back")
	}
}
