package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "github.com/go-sql-driver/mysql"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestMain(m *testing.M) {
	code := mysqltest.Run(m)
	if built != "" {
		os.RemoveAll(filepath.Dir(built))
	}
	os.Exit(code)
}

var built string // path of the program; empty until a test needs it

// buildOnce builds the program at the first call and returns its path.
var buildOnce = sync.OnceValue(func() string {
	var err error
	if built, err = servicetest.Build("."); err != nil {
		panic(err)
	}
	return built
})

// command returns a command of the program. Its environment is env only.
func command(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command(buildOnce(), args...)
	cmd.Env = env
	return cmd
}

type process struct{ *servicetest.Process }

// run starts the program on a free port, without waiting for it.
func run(t *testing.T, env []string, args ...string) process {
	t.Helper()
	return process{servicetest.Start(t, buildOnce(), servicetest.FreeAddress(t), env, args...)}
}

func (p process) serving(t *testing.T) process {
	t.Helper()
	p.Serving(t)
	return p
}

func (p process) send(t *testing.T, number string) {
	t.Helper()
	if _, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
		t.Fatalf("SendSMS: %v", err)
	}
}

func (p process) valid(t *testing.T, number, code string) bool {
	t.Helper()
	res, err := p.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
	if err != nil {
		t.Fatalf("Valid: %v", err)
	}
	return res.Valid
}

func TestServe_TwoReplicasSendAndVerify(t *testing.T) {
	dsn, fake := mysqltest.DSN(t), dysmsapitest.New(t)
	one := run(t, servicetest.Environment(fake, dsn)).serving(t)
	two := run(t, servicetest.Environment(fake, dsn), "serve").serving(t)
	for range 3 {
		one.send(t, "+86 186 1234 5678")
		code := fake.LastCode(t, "18612345678")
		if got := fake.Accepted()[0].PhoneNumber; got != "18612345678" {
			t.Errorf("phone number at Aliyun: got %s; want 18612345678", got)
		}
		if two.valid(t, "18612345678", "x") {
			t.Error("a wrong code: got valid; want invalid")
		}
		if !two.valid(t, "008618612345678", code) {
			t.Error("the sent code, at the other replica: got invalid; want valid")
		}
		if one.valid(t, "18612345678", code) {
			t.Error("the used code: got valid; want invalid")
		}
		if out := one.Output.String() + two.Output.String(); strings.Contains(out, code) || strings.Contains(out, "18612345678") {
			t.Errorf("the log contains the code or the number:\n%s", out)
		}
	}

	db, err := sql.Open("mysql", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	one.send(t, "18612345678")
	var number string
	var state []byte
	if err := db.QueryRow("SELECT phone_number, state FROM phone_numbers").Scan(&number, &state); err != nil {
		t.Fatal(err)
	}
	if number != "+8618612345678" || len(state) == 0 || bytes.Contains(state, []byte(fake.LastCode(t, "18612345678"))) {
		t.Errorf("row: got number %s and %d bytes of state; want +8618612345678 and a state without the code", number, len(state))
	}
}

func TestDev_NeedsOnlyTheProgram(t *testing.T) {
	buildOnce() // so that the build is not measured
	began := time.Now()
	p := run(t, nil, "dev").serving(t)
	t.Logf("start to first response: %v", time.Since(began))
	call := func(method, body string) string {
		res, err := http.Post("http://"+p.Addr+"/phonenumberservice.PhoneNumberService/"+method, "application/x-www-form-urlencoded",
			strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return string(b)
	}
	if got := call("SendSMS", `{"phone_number":"18600000000"}`); got != "{}" {
		t.Fatalf("SendSMS: got %s; want {}", got)
	}
	var messages []struct{ Code string }
	if err := json.Unmarshal([]byte(get(t, p.Addr, "/inbox.json?phone_number=+8618600000000", 200)), &messages); err != nil ||
		len(messages) != 1 {
		t.Fatalf("inbox: got %v, %v; want one message", messages, err)
	}
	code := messages[0].Code
	if got := call("Valid", `{"phone_number":"18600000000","code":"`+code+`"}`); got != `{"valid":true}` {
		t.Errorf("Valid: got %s; want true", got)
	}
	banner := p.Output.String()
	for _, want := range []string{p.Addr, "curl -d", "grpcurl -plaintext", code} {
		if !strings.Contains(banner, want) {
			t.Errorf("the terminal output lacks %q:\n%s", want, banner)
		}
	}
	if command(nil, "healthcheck", "--address", p.Addr).Run() != nil {
		t.Error("healthcheck while dev runs: got a failure; want exit code 0")
	}
	p.Kill()
	if command(nil, "healthcheck", "--address", p.Addr).Run() == nil {
		t.Error("healthcheck after kill -9: got exit code 0; want a failure")
	}
}

func TestServe_SQLiteFileSurvivesKill9(t *testing.T) {
	fake := dysmsapitest.New(t)
	env := servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))
	p := run(t, env).serving(t)
	for range 5 {
		p.send(t, "18612345678")
		code := fake.LastCode(t, "18612345678")
		p.Kill()
		began := time.Now()
		p = run(t, env).serving(t)
		t.Logf("start to first response: %v", time.Since(began))
		if !p.valid(t, "18612345678", code) {
			t.Error("a code sent before kill -9: got invalid; want valid")
		}
		p.Kill()
		p = run(t, env).serving(t)
		if p.valid(t, "18612345678", code) {
			t.Error("a code used before kill -9: got valid; want invalid")
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	size, _ := os.Stat(buildOnce())
	if err == nil {
		t.Logf("idle: %s; binary: %d KB", regexp.MustCompile(`VmRSS:.*`).Find(status), size.Size()>>10)
	}
}

// TestServe_RejectsATableThatLosesCodes starts the program with tables made by hand,
// and runs the ALTER TABLE that its error message contains.
func TestServe_RejectsATableThatLosesCodes(t *testing.T) {
	const create = "CREATE TABLE phone_numbers (phone_number VARCHAR(16) NOT NULL, version BINARY(16) NOT NULL, begun_at BIGINT NOT NULL, state VARBINARY(1024) NOT NULL)"
	file := filepath.Join(t.TempDir(), "codes.db")
	fake := dysmsapitest.New(t)
	for driver, source := range map[string][2]string{"mysql": {mysqltest.DSN(t)}, "sqlite": {file, "sqlite:"}} {
		t.Run(driver, func(t *testing.T) {
			db, err := sql.Open(driver, source[0])
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if _, err := db.Exec(create); err != nil {
				t.Fatal(err)
			}
			env := servicetest.Environment(fake, source[1]+source[0])
			p := run(t, env)
			defer time.AfterFunc(30*time.Second, p.Kill).Stop() // in case it starts
			var exit *exec.ExitError
			if err := p.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Fatalf("serve: got %v; want exit code 1", err)
			}
			alter := regexp.MustCompile(`ALTER TABLE [^;]+`).FindString(p.Output.String())
			if alter == "" {
				t.Fatal("the error message contains no ALTER TABLE")
			}
			if _, err := db.Exec(alter); err != nil {
				t.Fatalf("%s: %v", alter, err)
			}
			p = run(t, env).serving(t)
			p.send(t, "18612345678")
			if !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
				t.Error("the sent code after ALTER TABLE: got invalid; want valid")
			}
		})
	}
}

// TestServe_RemovedSQLiteFileIsLogged removes the file while the program runs.
func TestServe_RemovedSQLiteFileIsLogged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(dysmsapitest.New(t), "sqlite:"+file)).serving(t)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		res, err := p.Health.Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err == nil && res.Status == healthpb.HealthCheckResponse_NOT_SERVING {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("health: got %v, %v; want NOT_SERVING", res, err)
		}
	}
	p.Signal(syscall.SIGTERM)
	p.Wait()
	if got := strings.Count(p.Output.String(), "codes.db was removed or replaced"); got != 1 {
		t.Errorf("log lines about the removed file: got %d; want 1\n%s", got, &p.Output)
	}
}

func TestServe_CodeSentBeforeKill9IsAccepted(t *testing.T) {
	dsn, fake := mysqltest.DSN(t), dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	fake.Next(dysmsapitest.Hang().ButAccepted())
	failed := make(chan error, 1)
	go func() {
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
		failed <- err
	}()
	for len(fake.Accepted()) == 0 {
		time.Sleep(time.Millisecond)
	}
	p.Kill()
	if err := <-failed; err == nil {
		t.Error("the call whose replica was killed: got OK; want an error")
	}
	if p := run(t, servicetest.Environment(fake, dsn)).serving(t); !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
		t.Error("the code that reached the phone: got invalid; want valid")
	}
}

func TestSIGTERM_FinishesTheCallInFlight(t *testing.T) {
	fake := dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
	fake.Next(dysmsapitest.Delay(time.Second))
	done := make(chan error, 1)
	go func() {
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
		done <- err
	}()
	for len(fake.Accepted()) == 0 {
		time.Sleep(time.Millisecond)
	}
	p.Signal(syscall.SIGTERM)
	if err := <-done; err != nil {
		t.Errorf("the call in flight: got %v; want OK", err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("exit: got %v; want code 0", err)
	}
}

func TestServe_WaitsForTheDatabaseAndSurvivesItsKill(t *testing.T) {
	database, fake := mysqltest.Start(t), dysmsapitest.New(t)
	database.Stop()
	p := run(t, servicetest.Environment(fake, database.DSN(mysqltest.Database)))
	stopped := run(t, servicetest.Environment(fake, database.DSN(mysqltest.Database)))
	for _, waiting := range []process{p, stopped} {
		for !strings.Contains(waiting.Output.String(), "waiting for the database") {
			time.Sleep(time.Millisecond)
		}
	}
	stopped.Signal(syscall.SIGTERM)
	if err := stopped.Wait(); err != nil {
		t.Errorf("SIGTERM while the program waits: got %v; want exit code 0", err)
	}
	if want := "stopped while waiting"; !strings.Contains(stopped.Output.String(), want) {
		t.Errorf("SIGTERM while the program waits: the log lacks %q", want)
	}
	database.Restart()
	p.serving(t).send(t, "18612345678")
	code := fake.LastCode(t, "18612345678")

	database.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18612345678", Code: code}); status.Code(err) != codes.Unavailable {
		t.Errorf("Valid without a database: got %v; want Unavailable", err)
	}
	for {
		res, err := p.Health.Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if res.Status == healthpb.HealthCheckResponse_NOT_SERVING {
			break
		}
	}
	database.Restart()
	if !p.serving(t).valid(t, "18612345678", code) {
		t.Error("the sent code after kill -9 of the database: got invalid; want valid")
	}
	if n := len(fake.Accepted()); n != 1 {
		t.Errorf("SMS sent: got %d; want 1", n)
	}
}

// TestServe_WaitsForARouterWithoutServer starts the program while the router rejects
// clients, at each stage of a connection and with each error number of such routers.
func TestServe_WaitsForARouterWithoutServer(t *testing.T) {
	t.Parallel()
	fake, router := dysmsapitest.New(t), mysqltest.NewRouter(t, mysqltest.DSN(t))
	router.RefuseGreetings(2003)
	p := run(t, servicetest.Environment(fake, router.DSN))
	rejected := func(stage string, number int) {
		testutil.Eventually(t, fmt.Sprintf("the router rejects %s with error %d", stage, number), func() bool {
			return strings.Contains(p.Output.String(), fmt.Sprintf("Error %d: refused by the router", number))
		})
	}
	rejected("the connection", 2003)
	for _, number := range []int{1105, 1129, 4031} {
		router.RefuseGreetings(uint16(number))
		rejected("the connection", number)
	}
	for _, number := range []int{9001, 3032, 2013} {
		router.RefuseStatements(uint16(number))
		rejected("the first statement", number)
	}
	router.Pass()
	p.serving(t).send(t, "18612345678")
	if !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
		t.Error("the sent code: got invalid; want valid")
	}
}

// TestDatabaseConnections_FewFailNoCall runs two replicas that share five connections.
// Each replica tries to open 64, or is set to two.
func TestDatabaseConnections_FewFailNoCall(t *testing.T) {
	t.Parallel()
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	for _, statement := range []string{"CREATE USER few@'%' IDENTIFIED BY 'p' WITH MAX_USER_CONNECTIONS 5", "GRANT ALL ON " + mysqltest.Database + ".* TO few@'%'"} {
		if _, err := admin.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	env := servicetest.Environment(fake, mysqltest.As(server.DSN(mysqltest.Database), "few:p"))
	number := 18612340000
	for _, setting := range []string{"", "PHONENUMBER_DATABASE_CONNECTIONS=2"} {
		one, two := run(t, append(env, setting)).serving(t), run(t, append(env, setting)).serving(t)
		if got := strings.Contains(one.Output.String(), "max_user_connections is 5"); got != (setting == "") {
			t.Errorf("%q: warning about max_user_connections: got %v; want %v", setting, got, setting == "")
		}
		const callers, each = 60, 5
		var calls sync.WaitGroup
		for i := range callers {
			p, first := []process{one, two}[i%2], number+i*each
			calls.Go(func() {
				for n := first; n < first+each; n++ {
					if _, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{
						PhoneNumber: fmt.Sprint(n), Signature: "阿里云",
						TemplateCode: "SMS_1",
					}); err != nil {
						t.Errorf("SendSMS: %v", err)
					}
					if _, err := p.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: fmt.Sprint(n), Code: "x"}); err != nil {
						t.Errorf("Valid: %v", err)
					}
				}
			})
		}
		calls.Wait()
		number += callers * each
		if n := len(connections(t, admin, "few")); setting != "" && n > 4 {
			t.Errorf("%s: connections of two replicas: got %d; want at most 4", setting, n)
		}
		one.Kill()
		two.Kill()
	}
}

func TestKeys_RotationKeepsTheCodesOfListedKeys(t *testing.T) {
	fake := dysmsapitest.New(t)
	dir := t.TempDir()
	env := servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db"))
	key := func(b byte) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }
	file := filepath.Join(dir, "keys")
	for i, keys := range []string{key(1), key(2) + "," + key(1), key(2)} {
		if err := os.WriteFile(file, []byte(keys+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		p := run(t, append(env, "PHONENUMBER_CODE_KEY_FILE="+file)).serving(t)
		if i > 0 && !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
			t.Errorf("step %d: a code sent before it: got invalid; want valid", i)
		}
		p.send(t, "18612345678")
		p.Kill()
	}
	p := run(t, env).serving(t) // without PHONENUMBER_CODE_KEY: the derived key
	if p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
		t.Error("a code under another key: got valid; want invalid")
	}
}

func TestSettings_EveryErrorIsReportedAtOnce(t *testing.T) {
	for _, c := range []struct {
		name  string
		env   []string
		args  []string
		wants []string
	}{
		{"nothing set", nil, nil, []string{
			"DATA_SOURCE_NAME is missing", "ALIYUN_ACCESS_KEY_ID is missing",
			"ALIYUN_ACCESS_KEY_SECRET is missing",
		}},
		{"everything wrong", []string{
			"DATA_SOURCE_NAME=root:hunter2@nonsense", "ALIYUN_ACCESS_KEY_ID=id", "ALIYUN_ACCESS_KEY_SECRET=hunter3",
			"ALIYUN_ENDPOINT=http://sms.example",
			"PHONENUMBER_LISTEN=nowhere", "PHONENUMBER_ATTEMPT_LIMIT=101", "PHONENUMBER_CODE_TTL=11m", "PHONENUMBER_REGION=XX",
			"PHONENUMBER_CODE_KEY=aHVudGVyNA==", "PHONENUMBER_SMS_TIMEOUT=1h", "PHONENUMBER_DRAIN_DELAY=-1s", "PHONENUMBER_LOG_LEVEL=loud",
			"PHONENUMBER_LOG_FORMAT=xml", "PHONENUMBER_METRICS_LISTEN=x", "PHONENUMBER_RETENTION=23h", "PHONENUMBER_CODE_TLL=5m",
			"PHONENUMBER_DATABASE_CONNECTIONS=0",
			"OTEL_EXPORTER_OTLP_ENDPOINT=http://hunter5:hunter6@a collector",
		}, nil, []string{
			"DATA_SOURCE_NAME", "ALIYUN_ENDPOINT", "PHONENUMBER_LISTEN", "PHONENUMBER_ATTEMPT_LIMIT", "PHONENUMBER_CODE_TTL", "PHONENUMBER_REGION",
			"PHONENUMBER_CODE_KEY", "PHONENUMBER_SMS_TIMEOUT", "PHONENUMBER_DRAIN_DELAY", "PHONENUMBER_LOG_LEVEL", "PHONENUMBER_LOG_FORMAT",
			"PHONENUMBER_METRICS_LISTEN", `PHONENUMBER_RETENTION) is "23h"; it must be a duration from 24h`, "PHONENUMBER_CODE_TLL is no setting",
			"PHONENUMBER_DATABASE_CONNECTIONS) is \"0\"; it must be a whole number from 1 to 1000",
			"OTEL_EXPORTER_OTLP_ENDPOINT must be http://",
		}},
		{"a secret twice", []string{"ALIYUN_ACCESS_KEY_ID=a", "ALIYUN_ACCESS_KEY_ID_FILE=/dev/null"}, nil, []string{"ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_ID_FILE are both set"}},
		{
			"a secret in place of a file name",
			[]string{"DATA_SOURCE_NAME_FILE=root:hunter2@tcp(db:3306)/x"},
			nil,
			[]string{"the file that DATA_SOURCE_NAME_FILE names: no such file"},
		},
		{
			"an empty secret file",
			[]string{"PHONENUMBER_CODE_KEY_FILE=/dev/null", "ALIYUN_ACCESS_KEY_SECRET_FILE=/dev/null"},
			nil,
			[]string{"the file that PHONENUMBER_CODE_KEY_FILE names is empty", "the file that ALIYUN_ACCESS_KEY_SECRET_FILE names is empty"},
		},
		{"an in-memory database for serve", []string{"DATA_SOURCE_NAME=sqlite::memory:"}, nil, []string{"loses every code at a restart"}},
		{
			"keys with a space",
			[]string{"ALIYUN_ACCESS_KEY_ID=hunter 2", "ALIYUN_ACCESS_KEY_SECRET=hunter 3"},
			nil,
			[]string{"access key ID must be printable", "access key secret must be printable", "DATA_SOURCE_NAME is missing"},
		},
		{
			"an invalid proxy URL",
			[]string{"HTTPS_PROXY=http://user:hunter#2@10.0.0.1:3128"},
			nil,
			[]string{"HTTPS_PROXY must be http://HOST:PORT", "DATA_SOURCE_NAME is missing"},
		},
		{"a proxy in quotes", []string{`https_proxy="http://10.0.0.1:3128"`}, nil, []string{"https_proxy must be http://HOST:PORT", "ALIYUN_ACCESS_KEY_ID is missing"}},
		{
			"two data source names",
			[]string{"DATA_SOURCE_NAME=a", "Data_SOURCE_NAME=b"},
			nil,
			[]string{"DATA_SOURCE_NAME and Data_SOURCE_NAME are both set"},
		},
		{
			"credentials for dev",
			[]string{"ALIYUN_ACCESS_KEY_ID=a", "ALIYUN_ACCESS_KEY_SECRET_FILE=b"},
			[]string{"dev"},
			[]string{"ALIYUN_ACCESS_KEY_ID is set", "ALIYUN_ACCESS_KEY_SECRET is set", "--ignore-credentials"},
		},
		{
			"an unknown failure",
			[]string{"PHONENUMBER_FAIL_SENDS=limit:3", "PHONENUMBER_REGION=XX"},
			[]string{"dev"},
			[]string{"PHONENUMBER_FAIL_SENDS", "limit_minute, limit_hour", "PHONENUMBER_REGION"},
		},
		{
			"failures for serve",
			[]string{"PHONENUMBER_FAIL_SENDS=timeout"},
			nil,
			[]string{"PHONENUMBER_FAIL_SENDS is for dev alone", "DATA_SOURCE_NAME is missing"},
		},
		{"an unknown command", nil, []string{"serv"}, []string{"unexpected argument serv"}},
		{"an unknown flag", nil, []string{"--prot", "1"}, []string{"unknown flag --prot"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := command(c.env, c.args...).CombinedOutput()
			if err == nil {
				t.Fatal("the program started; want an error")
			}
			for _, want := range c.wants {
				if !strings.Contains(string(out), want) {
					t.Errorf("the message lacks %q:\n%s", want, out)
				}
			}
			if _, list, ok := strings.Cut(strings.TrimSpace(string(out)), "the configuration cannot be used:\n"); ok {
				for line := range strings.Lines(list) {
					if !strings.HasPrefix(line, "  - ") {
						t.Errorf("a config error without its list mark: %q", line)
					}
				}
			}
			if strings.Contains(string(out), "hunter") || strings.Contains(string(out), "aHVudGVyNA") {
				t.Errorf("the message contains a secret:\n%s", out)
			}
		})
	}
}

// The peer in Aliyun's place switches protocols. It then sends nothing, and does not close
// the connection.
func TestServe_SwitchedProtocolHoldsNoCall(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Always(dysmsapitest.Raw("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "", func() {}))
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")),
		"PHONENUMBER_SMS_TIMEOUT=1s", "PHONENUMBER_MAX_CALLS=1")).serving(t)
	for _, number := range []string{"18612345678", "18612345679"} { // the second needs the slot of the first
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"})
		if status.Code(err) != codes.Unknown {
			t.Errorf("%s: got %v; want Unknown", number, err)
		}
	}
	p.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGTERM: got %v; want exit code 0", err)
	}
}

func TestServe_UnreachableProxyIsNamedInTheLog(t *testing.T) {
	fake := dysmsapitest.New(t)
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")),
		"ALIYUN_ENDPOINT=https://aliyun.invalid", "HTTPS_PROXY=http://user:hunter2@"+servicetest.FreeAddress(t))).serving(t)
	_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v; want Unavailable", err)
	}
	const want = `proxy: connection refused`
	testutil.Eventually(t, "the log names the proxy", func() bool { return strings.Contains(p.Output.String(), want) })
	if strings.Contains(p.Output.String(), "hunter2") {
		t.Error("the log contains the proxy's password")
	}
}

// TestServe_HasNoInboxNoFailuresAndNoPage requests every path of dev's openapi.json from
// serve. Only the two calls exist there.
func TestServe_HasNoInboxNoFailuresAndNoPage(t *testing.T) {
	fake := dysmsapitest.New(t)
	production := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
	dev := run(t, nil, "dev").serving(t)
	var described struct{ Paths map[string]map[string]any }
	if err := json.Unmarshal([]byte(get(t, dev.Addr, "/openapi.json", 200)), &described); err != nil {
		t.Fatal(err)
	}
	paths := []string{"/page.js", "/page.css", "/words.js", "/openapi.json", "/index.html", "/page/index.html"}
	for path := range described.Paths {
		if !strings.HasPrefix(path, "/phonenumberservice.") {
			paths = append(paths, path)
		}
	}
	if len(paths) < 10 {
		t.Fatalf("paths in openapi.json: got %v; want at least 10", paths)
	}
	for _, path := range paths {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE"} {
			q, _ := http.NewRequest(method, "http://"+production.Addr+path, strings.NewReader(`{"kind":"timeout"}`))
			res, err := http.DefaultClient.Do(q)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != 404 {
				t.Errorf("%s %s: got %d; want 404", method, path, res.StatusCode)
			}
		}
	}
	production.send(t, "18612345678")
	plain := get(t, production.Addr, "/", 200)
	version, err := command(nil, "version").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"phone-number-service " + strings.TrimSpace(string(version)),
		"/phonenumberservice.PhoneNumberService/SendSMS", "https://github.com/liulinhuai/phone-number-service",
	} {
		if !strings.Contains(plain, want) {
			t.Errorf("/ lacks %q:\n%s", want, plain)
		}
	}
	if strings.Contains(plain, "<") || len(plain) > 500 {
		t.Errorf("/: got %d bytes; want at most 500 of plain text, without HTML:\n%s", len(plain), plain)
	}
}

func get(t *testing.T, addr, path string, want int) string {
	t.Helper()
	res, err := http.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != want {
		t.Fatalf("GET %s: got %d, %v; want %d", path, res.StatusCode, err, want)
	}
	return string(body)
}

// Kubernetes injects variables for each Service, such as PHONENUMBER_PORT if the Service is
// named phonenumber. They are no error. A setting whose value is empty counts as unset.
func TestSettings_KubernetesVariablesAreNoError(t *testing.T) {
	p := run(t, []string{
		"PHONENUMBER_SERVICE_HOST=10.0.0.1", "PHONENUMBER_SERVICE_PORT=50511", "PHONENUMBER_SERVICE_PORT_GRPC=50511",
		"PHONENUMBER_PORT=tcp://10.0.0.1:50511", "PHONENUMBER_PORT_50511_TCP=tcp://10.0.0.1:50511", "PHONENUMBER_PORT_50511_TCP_ADDR=10.0.0.1",
		"PHONENUMBER_GRPC_SERVICE_HOST=10.0.0.1", "PHONENUMBER_SERVICE_SERVICE_HOST=10.0.0.1",
		"PHONENUMBER_CODE_TTL=", "PHONENUMBER_REGION=", "ALIYUN_ACCESS_KEY_ID=",
	}, "dev")
	p.serving(t)
}

// It also accepts the other spelling of DATA_SOURCE_NAME.
func TestMigrate_CreatesTheSQLiteFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "codes.db")
	out, err := command([]string{"Data_SOURCE_NAME=sqlite:" + file}, "migrate").CombinedOutput()
	if err != nil {
		t.Fatalf("migrate: %v\n%s", err, out)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("file: got %v, %v; want mode 0600", info, err)
	}
}

func TestDev_IgnoreCredentialsUsesNone(t *testing.T) {
	run(t, []string{"ALIYUN_ACCESS_KEY_ID=a", "ALIYUN_ACCESS_KEY_SECRET=b", "DATA_SOURCE_NAME=ignored"}, "dev",
		"--ignore-credentials").serving(t)
}

// TestServe_SendsARealSMS sends one real SMS to TEST_REAL_SMS_NUMBER, with
// TEST_REAL_SMS_SIGN_NAME, TEST_REAL_SMS_TEMPLATE_CODE and the usual credentials.
// It checks only that Aliyun accepts the SMS. Check by eye that the phone receives it.
func TestServe_SendsARealSMS(t *testing.T) {
	number := os.Getenv("TEST_REAL_SMS_NUMBER")
	if number == "" {
		t.Skip("costs money: set TEST_REAL_SMS_NUMBER, TEST_REAL_SMS_SIGN_NAME, TEST_REAL_SMS_TEMPLATE_CODE, ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_SECRET")
	}
	p := run(t, []string{
		"DATA_SOURCE_NAME=sqlite:" + filepath.Join(t.TempDir(), "codes.db"),
		"ALIYUN_ACCESS_KEY_ID=" + os.Getenv("ALIYUN_ACCESS_KEY_ID"), "ALIYUN_ACCESS_KEY_SECRET=" + os.Getenv("ALIYUN_ACCESS_KEY_SECRET"),
	}).serving(t)
	_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{
		PhoneNumber: number, Signature: os.Getenv("TEST_REAL_SMS_SIGN_NAME"), TemplateCode: os.Getenv("TEST_REAL_SMS_TEMPLATE_CODE"),
	})
	if err != nil {
		t.Fatalf("SendSMS: %v", status.Convert(err).Proto())
	}
}
