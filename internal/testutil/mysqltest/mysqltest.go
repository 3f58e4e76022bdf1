// Package mysqltest starts MariaDB and MySQL for tests: empty databases on a server that all tests of
// the process share, and private servers that a test may kill.
package mysqltest

import (
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
	// Database exists on every server that Start returns.
	Database = "PhoneNumberService"

	// engineVariable is the variable with the name of the engine, MariaDB or MySQL.
	engineVariable = "TEST_ENGINE"

	createDatabase = "CREATE DATABASE %s DEFAULT CHARACTER SET ascii COLLATE ascii_bin;\n"
	startTimeout   = 60 * time.Second // a busy machine is slow
)

var shared struct {
	sync.Mutex
	server *Server
}

// Run runs a package's tests, removes the shared server, and returns the exit code. A package that
// uses this package calls it from TestMain.
func Run(m *testing.M) int {
	defer func() {
		if shared.server != nil {
			shared.server.remove()
		}
		for _, e := range engines {
			os.RemoveAll(e.template)
		}
	}()
	return m.Run()
}

// DSN returns the data source name of an empty database: that of Existing, or a new one on the shared
// server, which is dropped when the test ends. Without a server program the test is skipped; under CI it
// fails.
func DSN(t testing.TB) string {
	t.Helper()
	if dsn := os.Getenv(Existing); dsn != "" {
		return existingDSN(t, dsn)
	}
	server := sharedServer(t)
	admin, err := sql.Open("mysql", server.DSN(""))
	if err != nil {
		t.Fatal(err)
	}
	name := "test_" + strings.ToLower(rand.Text())
	if _, err := admin.Exec(fmt.Sprintf(createDatabase, name)); err != nil {
		t.Fatalf("failed to create a database: %v", err)
	}
	t.Cleanup(func() {
		if _, err := admin.Exec("DROP DATABASE " + name); err != nil {
			t.Errorf("failed to drop the test's database: %v", err)
		}
		admin.Close()
	})
	return server.DSN(name)
}

func sharedServer(t testing.TB) *Server {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.server == nil {
		shared.server = start(t, Options{})
	}
	return shared.server
}

// A Server is a private server, which a test may kill.
type Server struct {
	Options
	t       testing.TB
	port    int
	process *os.Process
	exited  chan struct{}
}

// Options change the defaults of a server.
type Options struct {
	Engine *Engine  // nil for that of TEST_ENGINE
	Dir    string   // empty directory for its data, removed at the end
	Args   []string // further arguments of the program, after the default ones
}

// Start returns a new running server, which is removed when the test ends.
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

// DSN returns the data source name of database for a user with all privileges.
func (s *Server) DSN(database string) string {
	return fmt.Sprintf("test:%s@tcp(127.0.0.1:%d)/%s", password, s.port, database)
}

// As returns dsn with another account, "user:password".
func As(dsn, account string) string { return account + dsn[strings.LastIndex(dsn, "@"):] }

// Open connects to Database as the user of DSN, until the test ends.
func (s *Server) Open(t testing.TB) *sql.DB {
	t.Helper()
	db, err := sql.Open("mysql", s.DSN(Database))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// Exec runs statements.
func Exec(t testing.TB, db *sql.DB, statements ...string) {
	t.Helper()
	for _, statement := range statements {
		if _, err := db.Exec(statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

// Connections returns the IDs of the user's connections to the server.
func (s *Server) Connections(t testing.TB, user string) (ids []string) {
	t.Helper()
	db, err := sql.Open("mysql", s.DSN(""))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.Query("SELECT id FROM "+s.Engine.processlist+" WHERE user = ?", user)
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

// Port returns the server's TCP port on 127.0.0.1, in digits.
func (s *Server) Port() string { return strconv.Itoa(s.port) }

// Password returns the password of the user test.
func (s *Server) Password() string { return password }

// PID returns the ID of the server's process.
func (s *Server) PID() int { return s.process.Pid }

// Kill ends the server as kill -9 does.
func (s *Server) Kill() { s.signal(syscall.SIGKILL) }

// Stop shuts the server down with SIGTERM.
func (s *Server) Stop() { s.signal(syscall.SIGTERM) }

// Restart starts the server with the same directory and port. It returns when the server responds.
func (s *Server) Restart() {
	s.t.Helper()
	if !s.run() {
		s.fatal("failed to restart " + s.Engine.Name)
	}
}

// Move starts the server on dir, a copy of its directory. The server must have ended.
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
	SkipOnExisting(t, "a server of its own")
	s := &Server{Options: options, t: t}
	if s.Engine == nil {
		s.Engine = DefaultEngine(t)
	}
	template := s.Engine.dataDirectory(t)
	if s.Dir == "" {
		var err error
		if s.Dir, err = os.MkdirTemp("", "database"); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(s.data(), os.DirFS(template)); err != nil {
		s.fatal(err.Error())
	}
	for range 5 {
		// Ports below the kernel's range for outgoing connections. No such connection can block a
		// restart.
		s.port = 20_000 + mathrand.N(12_000)
		if s.run() {
			return s
		}
	}
	s.fatal("failed to start " + s.Engine.Name)
	return nil
}

func (s *Server) data() string { return filepath.Join(s.Dir, "data") }

func (s *Server) command(args ...string) *exec.Cmd {
	return s.Engine.command(s.Dir, append(args, s.Args...)...)
}

// run starts the server and reports whether it responded.
func (s *Server) run() bool {
	cmd := s.command("--bind-address=127.0.0.1", fmt.Sprintf("--port=%d", s.port), "--skip-name-resolve", "--max-connections=500",
		"--socket=s", // in the data directory, since socket paths are short
		"--pid-file="+filepath.Join(s.Dir, "pid"), "--log-error="+filepath.Join(s.Dir, "log.err"))
	started := make(chan error)
	exited := make(chan struct{})
	go func() {
		runtime.LockOSThread() // dieWithParent depends on this thread
		started <- cmd.Start()
		cmd.Wait()
		close(exited)
	}()
	if err := <-started; err != nil {
		s.fatal(err.Error())
	}
	s.process, s.exited = cmd.Process, exited

	config, _ := mysql.ParseDSN(s.DSN(""))
	config.Logger = &mysql.NopLogger{} // connection errors are expected
	connector, _ := mysql.NewConnector(config)
	db := sql.OpenDB(connector)
	defer db.Close()
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		select {
		case <-exited: // for example, the port was taken
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

// fatal fails the test with a reason and the server's log, and removes the directory.
func (s *Server) fatal(reason string) {
	s.t.Helper()
	log, _ := os.ReadFile(filepath.Join(s.Dir, "log.err"))
	os.RemoveAll(s.Dir)
	s.t.Fatalf("%s\n%s", reason, log)
}
