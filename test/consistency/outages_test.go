package consistency

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
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

func TestDatabaseDown_FailsCallsAndSendsNothing(t *testing.T) {
	const (
		outage   = 10 * time.Second
		deadline = 5 * time.Second // of each call
		recovery = 2 * time.Second
	)
	for _, c := range []struct {
		name     string
		valid    []codes.Code // allowed results of Valid
		down, up func(*mysqltest.Server)
	}{
		{"killed", []codes.Code{codes.Unavailable}, (*mysqltest.Server).Kill, (*mysqltest.Server).Restart},
		{
			// A swap that was sent before the server froze may be applied when the
			// server continues.
			"frozen",
			[]codes.Code{codes.Unavailable, codes.Unknown},
			func(s *mysqltest.Server) { syscall.Kill(s.PID(), syscall.SIGSTOP) },
			func(s *mysqltest.Server) { syscall.Kill(s.PID(), syscall.SIGCONT) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // mostly waits
			database := mysqltest.Start(t)
			fake := dysmsapitest.New(t)
			p := servicetest.Start(t, buildOnce(), servicetest.FreeAddress(t),
				servicetest.Environment(fake, database.DSN(mysqltest.Database))).Serving(t)
			send := func(number int) error {
				ctx, cancel := context.WithTimeout(t.Context(), deadline)
				defer cancel()
				_, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("187%08d", number), Signature: "阿里云", TemplateCode: "SMS_1"})
				return err
			}
			check := func(m dysmsapitest.Accepted) (*pb.ValidResponse, error) {
				ctx, cancel := context.WithTimeout(t.Context(), deadline)
				defer cancel()
				return p.Valid(ctx, &pb.ValidRequest{PhoneNumber: m.PhoneNumber, Code: m.Code})
			}
			if err := send(0); err != nil {
				t.Fatal(err)
			}
			sent := fake.Accepted()[0]

			c.down(database)
			began := time.Now()
			longest, calls, state := time.Duration(0), 0, healthpb.HealthCheckResponse_UNKNOWN
			for i := 1; time.Since(began) < outage; i++ {
				begun := time.Now()
				err := send(i)
				longest, calls = max(longest, time.Since(begun)), calls+2
				if status.Code(err) != codes.Unavailable {
					t.Errorf("SendSMS %v into the outage: got %v; want UNAVAILABLE", time.Since(began), err)
				}
				if _, err := check(sent); !slices.Contains(c.valid, status.Code(err)) {
					t.Errorf("Valid %v into the outage: got %v; want one of %v", time.Since(began), err, c.valid)
				}
				health, err := p.Health.Check(t.Context(), &healthpb.HealthCheckRequest{})
				if err != nil {
					t.Errorf("health: got %v; want nil", err)
				}
				state = health.GetStatus()
				time.Sleep(10 * time.Millisecond)
			}
			if state != healthpb.HealthCheckResponse_NOT_SERVING {
				t.Errorf("health at the end of the outage: got %v; want NOT_SERVING", state)
			}
			if n := fake.Requests(); n != 1 {
				t.Errorf("got %d requests to Aliyun while the database was down; want none", n-1)
			}

			c.up(database)
			began = time.Now()
			testutil.Eventually(t, "a first success", func() bool { return send(0) == nil })
			back := time.Since(began)
			if back > recovery {
				t.Errorf("got the first success %v after the database was back; want %v at most", back, recovery)
			}
			t.Logf("%d calls in the outage, %v at most; the first success came %v after it", calls, longest, back)
			p.Serving(t)
			all := fake.Accepted()
			if res, err := check(all[len(all)-1]); err != nil || !res.Valid {
				t.Errorf("the code that was sent after the outage: got %v, %v; want true", res, err)
			}
		})
	}
}

func TestFullDisk_FailsCallsUntilThereIsRoom(t *testing.T) {
	t.Run("server", func(t *testing.T) {
		requireRoot(t)
		disk := mounted(t, "-t", "tmpfs", "-o", "size=320M", "tmpfs")
		database := mysqltest.StartWith(t, mysqltest.Options{Dir: disk})
		message := "MySQL error 1114 (HY000): the table or its disk is full"
		if database.Engine == mysqltest.MySQL {
			message = context.DeadlineExceeded.Error() // its binary log waits for room, and so does the commit
		}
		fullDisk(t, disk, database.DSN(mysqltest.Database), message)
	})
	t.Run("SQLite", func(t *testing.T) {
		requireRoot(t)
		disk := mounted(t, "-t", "tmpfs", "-o", "size=4M", "tmpfs")
		fullDisk(t, disk, "sqlite:"+filepath.Join(disk, "codes.db"), "database or disk is full")
	})
}

// fullDisk fills the disk, checks that calls fail with message in the log, and that they succeed
// after room is made.
func fullDisk(t *testing.T, disk, dsn, message string) {
	fake := dysmsapitest.New(t)
	p := servicetest.Start(t, buildOnce(), servicetest.FreeAddress(t), servicetest.Environment(fake, dsn)).Serving(t)
	l := newLedger(fake)
	var numbers atomic.Int64
	send := func() error {
		number := fmt.Sprintf("187%08d", numbers.Add(1))
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"})
		return err
	}
	l.write(t, []string{p.Addr}, func() { l.grow(t, 20) })

	filler := filepath.Join(disk, "filler")
	fill(t, filler)
	// The database's files still have some free room inside.
	var err error
	for err == nil {
		err = send()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("SendSMS on a full disk: got %v; want UNAVAILABLE", err)
	}
	t.Logf("the disk was full after %d numbers", numbers.Load())
	testutil.Eventually(t, "the log has "+message, func() bool { return p.Output.Contains(message) })
	before := fake.Requests()
	var sending sync.WaitGroup
	for range 20 {
		sending.Go(func() {
			if err := send(); status.Code(err) != codes.Unavailable {
				t.Errorf("SendSMS on a full disk: got %v; want UNAVAILABLE", err)
			}
		})
	}
	sending.Wait()
	if n := fake.Requests() - before; n > 0 {
		t.Errorf("got %d requests to Aliyun on a full disk; want none", n)
	}

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	testutil.Eventually(t, "a send succeeds after room is made", func() bool { return send() == nil })
	t.Logf("the first send succeeded %.1f s after room was made", time.Since(began).Seconds())
	reportFirst(t, l.lost(t, p.Addr))
}

// fill writes a file at path until the disk is full.
func fill(t *testing.T, path string) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
}

func TestFailover_DropsConnectionsToAReadOnlyServer(t *testing.T) { testGuarantee(t, failover) }

// A replication has an engine's statements and arguments for a replica that follows by GTIDs.
type replication struct {
	args                         []string
	follow, position, wait, stop string // follow has the port and the password, wait the position
}

var replications = map[*mysqltest.Engine]replication{
	mysqltest.MariaDB: {
		args: []string{"--log-bin=binlog", "--sync-binlog=1"},
		follow: "CHANGE MASTER TO master_host = '127.0.0.1', master_port = %s, master_user = 'test', master_password = '%s'," +
			" master_use_gtid = slave_pos; START SLAVE",
		position: "SELECT @@gtid_binlog_pos", wait: "DO MASTER_GTID_WAIT('%s', 30)", stop: "STOP SLAVE",
	},
	mysqltest.MySQL: {
		args: []string{"--gtid-mode=ON", "--enforce-gtid-consistency=ON"},
		follow: "CHANGE REPLICATION SOURCE TO SOURCE_HOST = '127.0.0.1', SOURCE_PORT = %s, SOURCE_USER = 'test', SOURCE_PASSWORD = '%s'," +
			" SOURCE_AUTO_POSITION = 1, GET_SOURCE_PUBLIC_KEY = 1; START REPLICA",
		position: "SELECT @@gtid_executed", wait: "DO WAIT_FOR_EXECUTED_GTID_SET('%s', 30)", stop: "STOP REPLICA",
	},
}

// failover makes a replica the new primary, as an operator's tools do. Connections to the old
// primary stay open, but that server is read-only now.
func failover(t *testing.T, program string) (violations []string) {
	engine := replications[mysqltest.DefaultEngine(t)]
	start := func(id string) (*mysqltest.Server, *sql.DB) {
		s := mysqltest.StartWith(t, mysqltest.Options{Args: append([]string{"--server-id=" + id}, engine.args...)})
		db, err := sql.Open("mysql", s.DSN("")+"?multiStatements=true")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { db.Close() })
		return s, db
	}
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	first, old := start("1")
	second, next := start("2")
	must(next.Exec("SET GLOBAL read_only = 1; " + fmt.Sprintf(engine.follow, first.Port(), first.Password())))
	// A user without the right to write to a read-only server, as the service should have.
	must(old.Exec("CREATE USER service@'%' IDENTIFIED BY 'service'; GRANT SELECT, INSERT, UPDATE, CREATE ON PhoneNumberService.* TO service@'%'"))

	// The path that leads to the primary.
	name := filepath.Join(t.TempDir(), "primary")
	point := func(s *mysqltest.Server) {
		must(nil, os.Symlink(filepath.Join(s.Dir, "data", "s"), name+".new"))
		must(nil, os.Rename(name+".new", name))
	}
	point(first)
	p := startPair(t, program, "service:service@unix("+name+")/"+mysqltest.Database)
	l := newLedger(p.fake)
	l.write(t, p.load().replicas, func() {
		l.grow(t, 200)
		must(old.Exec("SET GLOBAL read_only = 1"))
		var position string
		must(nil, old.QueryRow(engine.position).Scan(&position))
		must(next.Exec(fmt.Sprintf(engine.wait, position) + "; " + engine.stop + "; SET GLOBAL read_only = 0"))
		point(second)
		began, n := time.Now(), l.len()
		for time.Since(began) < 5*time.Second && l.len() < n+200 {
			time.Sleep(5 * time.Millisecond)
		}
		if l.len() < n+200 {
			violations = append(violations, fmt.Sprintf("got %d entries within 5 s of the failover; want 200", l.len()-n))
		}
		t.Logf("200 entries within %v of the failover", time.Since(began))
	})
	if left := len(first.Connections(t, "service")); left > 0 {
		violations = append(violations, fmt.Sprintf("%d connections to the read-only server were kept", left))
	}
	if len(violations) > 0 {
		return violations // lost needs a replica that works
	}
	return l.lost(t, p.replicas[0].Addr)
}
