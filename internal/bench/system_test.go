package bench

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/go-sql-driver/mysql"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// callersPerConnection callers share one connection: fewer than a server allows, about as many as
// the requests of one backend process.
const callersPerConnection = 64

// A system is the built program on a database, with its load and its counters.
type system struct {
	b        testing.TB
	sink     *sink
	numbers  int
	dsn      string
	next     atomic.Int64
	database *sql.DB // for the raw statement and the server's counters
	pid      int     // of the server
	replicas []*replica
}

type replica struct {
	*servicetest.Process
	log     string
	mu      sync.Mutex
	conns   []*grpc.ClientConn
	clients []pb.PhoneNumberServiceClient
}

// onNewServer starts a number of replicas on a new server whose table has a number of rows.
func onNewServer(b testing.TB, numbers, replicas int) *system {
	b.Helper()
	return onServer(b, startServer(b, mysqltest.DefaultEngine(b), numbers), mysqltest.Database, numbers, replicas)
}

// startServer starts a server whose buffer pool has room for a number of rows, with further arguments.
func startServer(b testing.TB, engine *mysqltest.Engine, numbers int, args ...string) *mysqltest.Server {
	b.Helper()
	return mysqltest.StartWith(b, mysqltest.Options{Engine: engine, Args: append([]string{
		fmt.Sprintf("--innodb-buffer-pool-size=%dM", 512+numbers/2000), engine.RedoLog("512M"),
	}, args...)})
}

// onServer creates database on server, starts replicas on it and fills the table.
func onServer(b testing.TB, server *mysqltest.Server, database string, numbers, replicas int) *system {
	b.Helper()
	create, err := sql.Open("mysql", server.DSN(""))
	if err != nil {
		b.Fatal(err)
	}
	defer create.Close()
	if _, err := create.Exec("CREATE DATABASE IF NOT EXISTS " + database); err != nil {
		b.Fatal(err)
	}
	db, err := sql.Open("mysql", server.DSN(database))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	db.SetMaxOpenConns(64) // as the service has
	db.SetMaxIdleConns(64)
	s := &system{b: b, sink: newSink(b, numbers), numbers: numbers, database: db, pid: server.PID()}
	s.dsn = server.DSN(database)
	for range replicas {
		s.replicas = append(s.replicas, s.startOne(s.dsn)) // the first creates the table
	}
	// State after a send of yesterday: format, last send ID, number of codes, one code.
	const row = `CONCAT('+', 8600000000000 + %d + seq), UNHEX(LEFT(SHA2(seq, 256), 32)), 1700000000000000 + seq,
		CONCAT(x'01', UNHEX(LPAD(HEX(1700000000000000 + seq), 16, '0')), x'01',
			UNHEX(LPAD(HEX(1700000000000000 + seq), 16, '0')), UNHEX(SHA2(seq, 256)), UNHEX(LPAD(HEX(1700000000000000 + seq), 16, '0')), x'81')`
	s.exec("CREATE TABLE ceiling (id BIGINT NOT NULL PRIMARY KEY, n BIGINT NOT NULL) ENGINE=InnoDB")
	s.insert("INSERT INTO phone_numbers (phone_number, version, begun_at, state) SELECT "+fmt.Sprintf(row, firstNumber), numbers)
	s.insert("INSERT INTO ceiling SELECT seq, 0", numbers)
	return s
}

// insert runs statement for seq from 0 to rows-1, ten thousand at a time. Only MariaDB has sequences.
func (s *system) insert(statement string, rows int) {
	s.b.Helper()
	const digit = "(SELECT 0 d UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4 UNION ALL SELECT 5" +
		" UNION ALL SELECT 6 UNION ALL SELECT 7 UNION ALL SELECT 8 UNION ALL SELECT 9)"
	for first := 0; first < rows; first += 10_000 {
		s.exec(fmt.Sprintf("%s FROM (SELECT %d + 1000 * a.d + 100 * b.d + 10 * c.d + e.d AS seq FROM %s a, %[3]s b, %[3]s c, %[3]s e) s WHERE seq < %[4]d",
			statement, first, digit, rows))
	}
}

// onSQLite starts one replica on a file.
func onSQLite(b testing.TB, numbers int) *system {
	b.Helper()
	s := &system{b: b, sink: newSink(b, numbers), numbers: numbers, dsn: "sqlite:" + filepath.Join(b.TempDir(), "codes.db")}
	s.replicas = []*replica{s.startOne(s.dsn)}
	return s
}

func (s *system) exec(statement string) {
	s.b.Helper()
	if _, err := s.database.Exec(statement); err != nil {
		s.b.Fatal(err)
	}
}

// startOne starts the program with its access log in a file, and with more settings.
func (s *system) startOne(dsn string, settings ...string) *replica {
	s.b.Helper()
	env := servicetest.Environment(&dysmsapitest.Server{URL: s.sink.url, AccessKeyID: "bench", AccessKeySecret: "bench"}, dsn)
	log := filepath.Join(s.b.TempDir(), "log")
	p := servicetest.Start(s.b, "/bin/sh", servicetest.FreeAddress(s.b), append(append(env, settings...), os.Environ()...), "-c", fmt.Sprintf("exec %s 2>>%s", buildOnce(s.b), log))
	return &replica{Process: p.Serving(s.b), log: log}
}

// client returns the client of a caller. callersOnIt callers share its connection.
func (r *replica) client(b testing.TB, caller, callersOnIt int) pb.PhoneNumberServiceClient {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.clients) <= caller/callersOnIt {
		conn, err := grpc.NewClient(r.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		r.conns = append(r.conns, conn)
		r.clients = append(r.clients, pb.NewPhoneNumberServiceClient(conn))
	}
	return r.clients[caller/callersOnIt]
}

func (r *replica) closeConns() {
	for _, conn := range r.conns {
		conn.Close()
	}
}

// goroutines ends the program with SIGQUIT and counts the goroutines in its stack dump.
func (r *replica) goroutines(b testing.TB) int {
	b.Helper()
	r.Signal(syscall.SIGQUIT)
	r.Wait()
	log, err := os.ReadFile(r.log)
	if err != nil {
		b.Fatal(err)
	}
	return bytes.Count(log, []byte("\ngoroutine "))
}

// openFiles returns the number of open files of r, most of which are connections.
func (s *system) openFiles(r *replica) int {
	s.b.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", r.PID))
	if err != nil {
		s.b.Fatal(err)
	}
	return len(files)
}

// draw returns the index of a row, spread over the table. It repeats no row before all were drawn.
func (s *system) draw() int {
	const stride = 611_953 // a prime
	return int(s.next.Add(1) * stride % int64(s.numbers))
}

func phoneNumber(i int) string { return strconv.Itoa(firstNumber + i) }

func (s *system) send(ctx context.Context, to pb.PhoneNumberServiceClient) (number int, err error) {
	i := s.draw()
	_, err = to.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: phoneNumber(i), Signature: "阿里云", TemplateCode: "SMS_123456789"})
	return i, err
}

func (s *system) valid(ctx context.Context, to pb.PhoneNumberServiceClient, i int) error {
	res, err := to.Valid(ctx, &pb.ValidRequest{PhoneNumber: phoneNumber(i), Code: s.sink.code(i)})
	if err == nil && !res.Valid {
		err = errors.New("a right code: got invalid; want valid")
	}
	return err
}

// raw measures the ceiling: a trivial UPDATE by primary key, with the same driver, protocol and
// pool size as the service.
func (s *system) raw(callers int, span time.Duration) measurement {
	s.b.Helper()
	update, err := s.database.Prepare("UPDATE ceiling SET n = n + 1 WHERE id = ?")
	if err != nil {
		s.b.Fatal(err)
	}
	defer update.Close()
	return closedLoop(s.b, callers, unbounded, span, func(ctx context.Context, _ int) error {
		_, err := update.ExecContext(ctx, s.draw())
		return err
	})
}

// flushes writes pages to a file and flushes each.
func (s *system) flushes(span time.Duration) measurement {
	s.b.Helper()
	file, err := os.Create(filepath.Join(s.b.TempDir(), "page"))
	if err != nil {
		s.b.Fatal(err)
	}
	defer file.Close()
	page, at := make([]byte, 4096), int64(0)
	const size = 4 << 20 // like SQLite's log, which is overwritten from time to time
	file.Write(make([]byte, size))
	return closedLoop(s.b, 1, unbounded, span, func(context.Context, int) error {
		_, err := file.WriteAt(page, at)
		at = (at + int64(len(page))) % size
		return cmp.Or(err, syscall.Fdatasync(int(file.Fd())))
	})
}

const unbounded = 1 << 60

// sent sends count codes through from and returns the indexes of their numbers.
func (s *system) sent(count int, from *replica) []int {
	s.b.Helper()
	numbers, _ := s.sends(64, count, from)
	return numbers
}

// sends measures SendSMS to count numbers, and returns their indexes.
func (s *system) sends(callers, count int, from *replica) ([]int, measurement) {
	s.b.Helper()
	numbers := make([]int, count)
	var n atomic.Int64
	result := closedLoop(s.b, callers, count, time.Hour, func(ctx context.Context, caller int) error {
		i, err := s.send(ctx, from.client(s.b, caller, callersPerConnection))
		numbers[n.Add(1)-1] = i
		return err
	})
	return numbers, result
}

// valids checks the code of each number once, at by.
func (s *system) valids(callers int, numbers []int, by *replica, perConnection int) measurement {
	s.b.Helper()
	var n atomic.Int64
	return closedLoop(s.b, callers, len(numbers), time.Hour, func(ctx context.Context, caller int) error {
		return s.valid(ctx, by.client(s.b, caller, perConnection), numbers[n.Add(1)-1])
	})
}

// flows measures flows: SendSMS, then Valid.
func (s *system) flows(callers int, span time.Duration, r *replica, perConnection int) measurement {
	s.b.Helper()
	return closedLoop(s.b, callers, unbounded, span, func(ctx context.Context, caller int) error {
		client := r.client(s.b, caller, perConnection)
		i, err := s.send(ctx, client)
		if err != nil {
			return err
		}
		return s.valid(ctx, client, i)
	})
}

// A cost is the resources that the processes have used.
type cost struct {
	service, database, load      time.Duration // of CPU
	flushes, statements, written float64       // of the server; rows written
}

func (s *system) cost() (c cost) {
	s.b.Helper()
	for _, r := range s.replicas {
		c.service += cpu(s.b, r.PID)
	}
	c.load = cpu(s.b, os.Getpid())
	if s.database == nil {
		return c
	}
	c.database = cpu(s.b, s.pid)
	var updated float64
	for name, value := range map[string]*float64{
		"Innodb_data_fsyncs": &c.flushes, "Com_stmt_execute": &c.statements,
		"Handler_update": &updated, "Handler_write": &c.written,
	} {
		if err := s.database.QueryRow("SHOW GLOBAL STATUS LIKE '"+name+"'").Scan(&name, value); err != nil {
			s.b.Fatal(err)
		}
	}
	c.written += updated
	return c
}

func (c cost) since(d cost) cost {
	return cost{
		c.service - d.service, c.database - d.database, c.load - d.load, c.flushes - d.flushes, c.statements - d.statements,
		c.written - d.written,
	}
}

// cpu returns the CPU time of all threads of a process, in user and kernel mode.
func cpu(b testing.TB, pid int) time.Duration {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Skip("this benchmark needs Linux's /proc: ", err)
	}
	_, fields, _ := strings.Cut(string(text), ") ") // after the name
	ticks := 0
	for _, field := range strings.Fields(fields)[11:13] {
		n, _ := strconv.Atoi(field)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 everywhere
}

// status returns a number from /proc/PID/status, such as VmRSS in KiB or Threads.
func status(b testing.TB, pid int, name string) int {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n"+name+":")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// memory returns the resident memory of a process in MiB.
func memory(b testing.TB, pid int) float64 { return float64(status(b, pid, "VmRSS")) / 1024 }

var build = sync.OnceValues(func() (string, error) {
	if *profile == "" {
		return servicetest.Build("../..")
	}
	// The program has no profiler. An overlay adds one for this run.
	source, err := filepath.Abs("testdata/profile.go.txt")
	if err != nil {
		return "", err
	}
	target, _ := filepath.Abs("../../profile.go")
	text, _ := json.Marshal(map[string]any{"Replace": map[string]string{target: source}})
	overlay, err := os.CreateTemp("", "overlay")
	if err != nil {
		return "", err
	}
	defer os.Remove(overlay.Name())
	overlay.Write(text)
	overlay.Close()
	return servicetest.Build("../..", "-overlay", overlay.Name())
})

// buildOnce builds the program at the first call and returns its path.
func buildOnce(b testing.TB) string {
	b.Helper()
	path, err := build()
	if err != nil {
		b.Fatal(err)
	}
	return path
}

// profiled runs load and writes a CPU profile of r to the file of -profile.
func profiled(r *replica, load func()) {
	if *profile == "" {
		load()
		return
	}
	path := os.Getenv("CPU_PROFILE")
	os.Remove(path)
	r.Signal(syscall.SIGUSR1)
	load()
	r.Signal(syscall.SIGUSR1)
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}
