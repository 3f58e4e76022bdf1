package e2e

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestServe_WaitsForTheDatabaseAndSurvivesItsKill(t *testing.T) {
	database, fake := mysqltest.Start(t), dysmsapitest.New(t)
	database.Stop()
	p := run(t, servicetest.Environment(fake, database.DSN(mysqltest.Database)))
	stopped := run(t, servicetest.Environment(fake, database.DSN(mysqltest.Database)))
	for _, waiting := range []process{p, stopped} {
		testutil.Eventually(t, "the program waits for the database", func() bool { return waiting.Output.Contains("waiting for the database") })
	}
	stopped.Signal(syscall.SIGTERM)
	if err := stopped.Wait(); err != nil {
		t.Errorf("SIGTERM while the program waits: got %v; want exit code 0", err)
	}
	if want := "stopped while waiting"; !stopped.Output.Contains(want) {
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
	testutil.Eventually(t, "health is NOT_SERVING", func() bool { return p.health(t) == healthpb.HealthCheckResponse_NOT_SERVING })
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
			return p.Output.Contains(fmt.Sprintf("Error %d: refused by the router", number))
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
	mysqltest.Exec(t, admin, "CREATE USER few@'%' IDENTIFIED BY 'p' WITH MAX_USER_CONNECTIONS 5", "GRANT ALL ON "+mysqltest.Database+".* TO few@'%'")
	env := servicetest.Environment(fake, mysqltest.As(server.DSN(mysqltest.Database), "few:p"))
	number := 18612340000
	for _, setting := range []string{"", "PHONENUMBER_DATABASE_CONNECTIONS=2"} {
		one, two := run(t, append(env, setting)).serving(t), run(t, append(env, setting)).serving(t)
		if got := one.Output.Contains("max_user_connections is 5"); got != (setting == "") {
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
		if n := len(server.Connections(t, "few")); setting != "" && n > 4 {
			t.Errorf("%s: connections of two replicas: got %d; want at most 4", setting, n)
		}
		one.Kill()
		two.Kill()
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
	size, _ := os.Stat(servicetest.Program())
	if err == nil {
		t.Logf("idle: %s; binary: %d KB", regexp.MustCompile(`VmRSS:.*`).Find(status), size.Size()>>10)
	}
}

// TestServe_RemovedSQLiteFileIsLogged removes the file while the program runs.
func TestServe_RemovedSQLiteFileIsLogged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(dysmsapitest.New(t), "sqlite:"+file)).serving(t)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "health is NOT_SERVING", func() bool { return p.health(t) == healthpb.HealthCheckResponse_NOT_SERVING })
	p.Signal(syscall.SIGTERM)
	p.Wait()
	if got := p.Output.Count("codes.db was removed or replaced"); got != 1 {
		t.Errorf("log lines about the removed file: got %d; want 1\n%s", got, &p.Output)
	}
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
