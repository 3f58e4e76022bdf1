// Package mariadbtest gives tests real databases: empty ones on a server that
// the test process shares, and servers of a test's own to break.
package mariadbtest

import (
	"bytes"
	"crypto/rand"
	"database/sql"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
)

const (
	// Database is there on every server of Start.
	Database = "PhoneNumberService"

	// existing names a server to use instead of a private one, as a user who may
	// create and drop databases.
	existing = "TEST_DATA_SOURCE_NAME"
	howToGet = "no MariaDB server: apt-get install mariadb-server-core, or make test, or a data source name in " + existing

	createDatabase = "CREATE DATABASE %s DEFAULT CHARACTER SET ascii COLLATE ascii_bin;\n"
	patience       = 60 * time.Second // for a start on a busy machine
)

var shared struct {
	sync.Mutex
	server *Server
}

// Run runs a package's tests, removes the server that DSN left, and returns the
// exit code: a package that uses DSN calls it from TestMain.
func Run(m *testing.M) int {
	defer func() {
		if shared.server != nil {
			shared.server.remove()
		}
	}()
	return m.Run()
}

// DSN returns the data source name of an empty database that lives as long as
// the test. Without a server the test is skipped; under CI it fails.
func DSN(t testing.TB) string {
	t.Helper()
	config, err := mysql.ParseDSN(serverDSN(t))
	if err != nil {
		t.Fatalf("%s cannot be read", existing)
	}
	config.DBName = ""
	admin, err := sql.Open("mysql", config.FormatDSN())
	if err != nil {
		t.Fatal(err)
	}
	config.DBName = "test_" + strings.ToLower(rand.Text())
	if _, err := admin.Exec(fmt.Sprintf(createDatabase, config.DBName)); err != nil {
		t.Fatalf("creating a database: %v", err)
	}
	t.Cleanup(func() {
		if _, err := admin.Exec("DROP DATABASE " + config.DBName); err != nil {
			t.Errorf("dropping the test's database: %v", err)
		}
		admin.Close()
	})
	return config.FormatDSN()
}

func serverDSN(t testing.TB) string {
	t.Helper()
	if dsn := os.Getenv(existing); dsn != "" {
		return dsn
	}
	shared.Lock()
	defer shared.Unlock()
	if shared.server == nil {
		shared.server = start(t, Options{})
	}
	return shared.server.DSN("")
}

// A Server is a private mariadbd that may be killed.
type Server struct {
	Options
	t        testing.TB
	binary   string
	port     int
	password string // random: another test's server can have the port
	process  *os.Process
	exited   chan struct{}
}

// Options are what sets a server apart from the usual one.
type Options struct {
	Dir  string   // an empty directory for its data; removed with the server
	Args []string // further arguments of mariadbd; they win
}

// Start returns a running server of the test's own.
func Start(t testing.TB) *Server {
	t.Helper()
	return StartWith(t, Options{})
}

// StartWith is Start with options.
func StartWith(t testing.TB, options Options) *Server {
	t.Helper()
	s := start(t, options)
	t.Cleanup(s.remove)
	return s
}

// DSN names database for a user who may do anything.
func (s *Server) DSN(database string) string {
	return fmt.Sprintf("test:%s@tcp(127.0.0.1:%d)/%s", s.password, s.port, database)
}

// As returns dsn with the account "user:password" in place of its own.
func As(dsn, account string) string { return account + dsn[strings.LastIndex(dsn, "@"):] }

// Open returns connections to Database as the user of DSN, until the test ends.
func (s *Server) Open(t testing.TB) *sql.DB {
	t.Helper()
	db, err := sql.Open("mysql", s.DSN(Database))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// Port is the server's TCP port on 127.0.0.1, in digits.
func (s *Server) Port() string { return strconv.Itoa(s.port) }

// Password is that of the user test.
func (s *Server) Password() string { return s.password }

// PID is the server's process.
func (s *Server) PID() int { return s.process.Pid }

// Kill ends the server as kill -9 does.
func (s *Server) Kill() { s.signal(syscall.SIGKILL) }

// Stop ends the server in good order.
func (s *Server) Stop() { s.signal(syscall.SIGTERM) }

// Restart starts the server where it was and returns when it answers.
func (s *Server) Restart() {
	s.t.Helper()
	if !s.run() {
		s.fatal("MariaDB did not start again")
	}
}

// Move starts the server, which must have ended, on a copy of its directory.
func (s *Server) Move(dir string) {
	s.t.Helper()
	s.Dir = dir
	s.Restart()
}

func (s *Server) signal(signal os.Signal) {
	s.process.Signal(signal)
	<-s.exited
}

func (s *Server) remove() {
	s.Kill()
	os.RemoveAll(s.Dir)
}

func start(t testing.TB, options Options) *Server {
	t.Helper()
	s := &Server{Options: options, t: t, binary: find(), password: rand.Text()}
	if s.binary == "" && os.Getenv("CI") != "" {
		t.Fatal(howToGet)
	}
	if s.binary == "" {
		fmt.Fprintln(os.Stderr, "skipped", t.Name()+":", howToGet) // go test shows it without -v in the package's folder
		t.Skip(howToGet)
	}
	if s.Dir == "" {
		var err error
		if s.Dir, err = os.MkdirTemp("", "mariadb"); err != nil {
			t.Fatal(err)
		}
	}
	s.setUp()
	for range 5 {
		// Below the ports that the kernel gives to outgoing connections, so that
		// none of those is in the way of a restart.
		s.port = 20_000 + mathrand.N(12_000)
		if s.run() {
			return s
		}
	}
	s.fatal("MariaDB did not start")
	return nil
}

// find returns a MariaDB server program, "" where there is none. A mysqld can be
// Oracle's, which is set up in another way.
func find() string {
	for _, name := range []string{"mariadbd", "/usr/sbin/mariadbd", "mysqld", "/usr/sbin/mysqld"} {
		if out, _ := exec.Command(name, "--no-defaults", "--version").Output(); bytes.Contains(out, []byte("MariaDB")) {
			return name
		}
	}
	return ""
}

// setUp makes the system tables, the user and Database, without the client
// programs that mariadb-install-db wants. The server reads a statement a line.
func (s *Server) setUp() {
	script := bytes.NewBufferString("USE mysql;\n")
	for _, name := range []string{"mysql_system_tables.sql", "mysql_system_tables_data.sql"} {
		found, _ := filepath.Glob("/usr/share/m*/" + name) // mysql or mariadb
		if len(found) == 0 {
			s.fatal("/usr/share/mysql/" + name + " is missing: apt-get install mariadb-server-core")
		}
		text, _ := os.ReadFile(found[0])
		script.Write(append(text, '\n'))
	}
	fmt.Fprintf(script, "FLUSH PRIVILEGES;\nCREATE USER test@'%%' IDENTIFIED BY '%s';\nGRANT ALL ON *.* TO test@'%%' WITH GRANT OPTION;\n", s.password)
	fmt.Fprintf(script, createDatabase, Database)
	if err := os.MkdirAll(filepath.Join(s.Dir, "data", "mysql"), 0o700); err != nil {
		s.fatal(err.Error())
	}
	cmd := s.command("--bootstrap")
	cmd.Stdin = script
	if out, err := cmd.CombinedOutput(); err != nil {
		s.fatal(fmt.Sprintf("setting up MariaDB: %v\n%s", err, out))
	}
}

func (s *Server) command(args ...string) *exec.Cmd {
	args = append([]string{
		"--no-defaults", "--datadir=" + filepath.Join(s.Dir, "data"), "--skip-log-bin",
		"--tmpdir=" + s.Dir, // a server that starts removes what looks like its temporary tables, another one's too
		"--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M",
	}, args...)
	args = append(args, s.Args...)
	if os.Geteuid() == 0 {
		args = append(args, "--user=root")
	}
	cmd := exec.Command(s.binary, args...)
	cmd.SysProcAttr = dieWithParent()
	return cmd
}

// run starts the server and reports whether it answered.
func (s *Server) run() bool {
	cmd := s.command("--bind-address=127.0.0.1", fmt.Sprintf("--port=%d", s.port), "--skip-name-resolve", "--max-connections=500",
		"--socket=s", // in the data directory; a longer path can be too long for a socket
		"--pid-file="+filepath.Join(s.Dir, "pid"), "--log-error="+filepath.Join(s.Dir, "log"))
	started := make(chan error)
	exited := make(chan struct{})
	go func() {
		runtime.LockOSThread() // dieWithParent means the thread that starts the server
		started <- cmd.Start()
		cmd.Wait()
		close(exited)
	}()
	if err := <-started; err != nil {
		s.fatal(err.Error())
	}
	s.process, s.exited = cmd.Process, exited

	config, _ := mysql.ParseDSN(s.DSN(""))
	config.Logger = &mysql.NopLogger{} // a server that is not up yet is no news
	connector, _ := mysql.NewConnector(config)
	db := sql.OpenDB(connector)
	defer db.Close()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		select {
		case <-exited: // the port was taken, for one
			return false
		default:
		}
		if db.Ping() == nil {
			return true
		}
	}
	s.Kill()
	return false
}

func (s *Server) fatal(why string) {
	s.t.Helper()
	log, _ := os.ReadFile(filepath.Join(s.Dir, "log"))
	os.RemoveAll(s.Dir)
	s.t.Fatalf("%s\n%s", why, log)
}
