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

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// callersOnAConnection is how many callers share one: fewer than a server allows,
// as many as the processes of a backend may be.
const callersOnAConnection = 64

// A system is the built program on a database, with all that it is measured by.
type system struct {
	b        testing.TB
	sink     *sink
	numbers  int
	dsn      string
	next     atomic.Int64
	database *sql.DB // MariaDB's, for the raw statement and its counters
	pid      int     // MariaDB's
	replicas []*replica
}

type replica struct {
	*servicetest.Process
	log     string
	mu      sync.Mutex
	conns   []*grpc.ClientConn
	clients []pb.PhoneNumberServiceClient
}

// onMariaDB starts so many replicas on a server of their own that has seen so many
// numbers before.
func onMariaDB(b testing.TB, numbers, replicas int) *system {
	b.Helper()
	return onServer(b, startMariaDB(b, numbers), mariadbtest.Database, numbers, replicas)
}

// startMariaDB starts a server whose memory holds so many numbers.
func startMariaDB(b testing.TB, numbers int) *mariadbtest.Server {
	b.Helper()
	return mariadbtest.StartWith(b, mariadbtest.Options{Args: []string{
		fmt.Sprintf("--innodb-buffer-pool-size=%dM", 512+numbers/2000), "--innodb-log-file-size=512M",
	}})
}

func onServer(b testing.TB, server *mariadbtest.Server, database string, numbers, replicas int) *system {
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
	// What a send of yesterday left: format, last ticket, number of codes, one code.
	const row = `CONCAT('+', 8600000000000 + %[3]d + seq), UNHEX(MD5(seq)), 1700000000000000 + seq,
		CONCAT(x'01', UNHEX(LPAD(HEX(1700000000000000 + seq), 16, '0')), x'01',
			UNHEX(LPAD(HEX(1700000000000000 + seq), 16, '0')), UNHEX(SHA2(seq, 256)), UNHEX(LPAD(HEX(1700000000000000 + seq), 16, '0')), x'81')
		FROM seq_%[1]d_to_%[2]d`
	s.exec("CREATE TABLE ceiling (id BIGINT NOT NULL PRIMARY KEY, n BIGINT NOT NULL) ENGINE=InnoDB")
	for first := 0; first < numbers; first += 100_000 {
		last := min(first+100_000, numbers) - 1
		s.exec(fmt.Sprintf("INSERT INTO phone_numbers (phone_number, version, begun_at, state) SELECT "+row, first, last, firstNumber))
		s.exec(fmt.Sprintf("INSERT INTO ceiling SELECT seq, 0 FROM seq_%d_to_%d", first, last))
	}
	return s
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

// startOne starts the program with its access log in a file.
func (s *system) startOne(dsn string) *replica {
	s.b.Helper()
	env := servicetest.Environment(&dysmsapitest.Server{URL: s.sink.url, AccessKeyID: "bench", AccessKeySecret: "bench"}, dsn)
	log := filepath.Join(s.b.TempDir(), "log")
	p := servicetest.Start(s.b, "/bin/sh", servicetest.FreeAddress(s.b), append(env, os.Environ()...), "-c", fmt.Sprintf("exec %s 2>>%s", program(s.b), log))
	return &replica{Process: p.Serving(s.b), log: log}
}

// client returns the client of a caller, who shares its connection with others.
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

func (r *replica) hangUp() {
	for _, conn := range r.conns {
		conn.Close()
	}
}

// goroutines ends the program with the stacks of all of them, and counts.
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

// openFiles are connections, for the most part.
func (s *system) openFiles(r *replica) int {
	s.b.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", r.PID))
	if err != nil {
		s.b.Fatal(err)
	}
	return len(files)
}

// A number's index among the table's, all over it, and none twice until all were.
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
		err = errors.New("a right code was refused")
	}
	return err
}

// raw is the ceiling: a trivial UPDATE by primary key, over the same driver, a
// pool of the same size and the same protocol.
func (s *system) raw(callers int, span time.Duration) stretch {
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

// flushes writes a page to a file and has it flushed, again and again.
func (s *system) flushes(span time.Duration) stretch {
	s.b.Helper()
	file, err := os.Create(filepath.Join(s.b.TempDir(), "page"))
	if err != nil {
		s.b.Fatal(err)
	}
	defer file.Close()
	page, at := make([]byte, 4096), int64(0)
	const size = 4 << 20 // as SQLite's log, which is written anew from time to time
	file.Write(make([]byte, size))
	return closedLoop(s.b, 1, unbounded, span, func(context.Context, int) error {
		_, err := file.WriteAt(page, at)
		at = (at + int64(len(page))) % size
		return cmp.Or(err, syscall.Fdatasync(int(file.Fd())))
	})
}

const unbounded = 1 << 60

// sent has so many codes sent by from and returns their numbers.
func (s *system) sent(count int, from *replica) []int {
	s.b.Helper()
	const callers = 64
	numbers := make([]int, count)
	var n atomic.Int64
	closedLoop(s.b, callers, count, time.Hour, func(ctx context.Context, caller int) error {
		i, err := s.send(ctx, from.client(s.b, caller, callersOnAConnection))
		numbers[n.Add(1)-1] = i
		return err
	})
	return numbers
}

// valids has the codes of these numbers checked, each once.
func (s *system) valids(callers int, numbers []int, by *replica, perConnection int) stretch {
	s.b.Helper()
	var n atomic.Int64
	return closedLoop(s.b, callers, len(numbers), time.Hour, func(ctx context.Context, caller int) error {
		return s.valid(ctx, by.client(s.b, caller, perConnection), numbers[n.Add(1)-1])
	})
}

// flows is SendSMS, then Valid.
func (s *system) flows(callers int, span time.Duration, r *replica, perConnection int) stretch {
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

// A cost is what the processes took so far.
type cost struct {
	service, database, load    time.Duration // of CPU
	flushes, statements, swaps float64       // MariaDB's
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
	for name, value := range map[string]*float64{"Innodb_data_fsyncs": &c.flushes, "Com_stmt_execute": &c.statements, "Handler_update": &c.swaps} {
		if err := s.database.QueryRow("SHOW GLOBAL STATUS LIKE '"+name+"'").Scan(&name, value); err != nil {
			s.b.Fatal(err)
		}
	}
	return c
}

func (c cost) since(d cost) cost {
	return cost{c.service - d.service, c.database - d.database, c.load - d.load, c.flushes - d.flushes, c.statements - d.statements, c.swaps - d.swaps}
}

// cpu is what a process has used, by all its threads, in user and kernel.
func cpu(b testing.TB, pid int) time.Duration {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Skip("this benchmark reads /proc, as Linux has it: ", err)
	}
	_, fields, _ := strings.Cut(string(text), ") ") // after the name
	ticks := 0
	for _, field := range strings.Fields(fields)[11:13] {
		n, _ := strconv.Atoi(field)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 everywhere
}

// status is a number of /proc/PID/status, such as VmRSS in KiB or Threads.
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

func memory(b testing.TB, pid int) float64 { return float64(status(b, pid, "VmRSS")) / 1024 } // MiB

var build = sync.OnceValues(func() (string, error) {
	if *profile == "" {
		return servicetest.Build("../..")
	}
	// The program has no profiler, and gets one for this run.
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

// program is the built one.
func program(b testing.TB) string {
	b.Helper()
	path, err := build()
	if err != nil {
		b.Fatal(err)
	}
	return path
}

// profiled writes a CPU profile of r during load to the file of -profile.
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
