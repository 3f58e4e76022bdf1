package mysqltest

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// An Engine is a kind of server. Its servers run with its own defaults: MySQL has a binary log, and
// MariaDB has none.
type Engine struct {
	Name     string
	howToGet string
	args     []string // of every run
	redoLog  string   // argument for the size of the redo log
	// processlist is the table of connections. MySQL's information_schema.processlist fails (3854)
	// while a statement has binary parameters.
	processlist string
	find        func() string
	setUp       func(e *Engine, dir string) error

	once     sync.Once
	program  string
	template string // path of a data directory with the user test and Database
	err      error  // of making it
}

// MariaDB and MySQL are the engines that tests can start.
var (
	MariaDB = &Engine{
		Name:        "MariaDB",
		howToGet:    "no MariaDB server: apt-get install mariadb-server-core, or make test, or a data source name in " + Existing,
		redoLog:     "--innodb-log-file-size",
		find:        findMariaDB,
		setUp:       setUpMariaDB,
		processlist: "information_schema.processlist",
	}
	MySQL = &Engine{
		Name:        "MySQL",
		howToGet:    "no MySQL server: make deps-mysql, or a data source name in " + Existing,
		args:        []string{"--secure-file-priv=NULL", "--mysqlx=OFF"},
		redoLog:     "--innodb-redo-log-capacity",
		find:        findMySQL,
		setUp:       setUpMySQL,
		processlist: "performance_schema.processlist",
	}
	engines = []*Engine{MariaDB, MySQL}
)

// DefaultEngine returns the engine that TEST_ENGINE names, MariaDB without it.
func DefaultEngine(t testing.TB) *Engine {
	t.Helper()
	name := os.Getenv(engineVariable)
	for _, e := range engines {
		if name == "" || strings.EqualFold(name, e.Name) {
			return e
		}
	}
	t.Fatalf("got %s=%s; want MariaDB or MySQL", engineVariable, name)
	return nil
}

// RedoLog returns the argument of the program for the size of the redo log.
func (e *Engine) RedoLog(size string) string { return e.redoLog + "=" + size }

// Program returns the name or path of the server program. A server must have been started.
func (e *Engine) Program() string { return e.program }

func findMariaDB() string {
	for _, name := range []string{"mariadbd", "/usr/sbin/mariadbd", "mysqld", "/usr/sbin/mysqld"} {
		if bytes.Contains(version(name), []byte("MariaDB")) {
			return name
		}
	}
	return ""
}

// findMySQL returns the program that make deps-mysql installed, or an installed one.
func findMySQL() string {
	names := []string{"mysqld", "/usr/sbin/mysqld"}
	for dir, _ := os.Getwd(); dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		names = append(names, filepath.Join(dir, ".bin/mysql/mysqld"))
	}
	for _, name := range names {
		if v := version(name); len(v) > 0 && !bytes.Contains(v, []byte("MariaDB")) {
			return name
		}
	}
	return ""
}

func version(program string) []byte {
	out, _ := exec.Command(program, "--no-defaults", "--version").Output()
	return out
}

// password is the password of the user test. It is random, since a program of somebody else can get
// the port of a server that ended.
var password = rand.Text()

// dataDirectory returns the path of a data directory, from which servers begin. It is made once,
// since MySQL takes seconds for it. Without a server program the test is skipped; under CI it fails.
func (e *Engine) dataDirectory(t testing.TB) string {
	t.Helper()
	e.once.Do(func() {
		if e.program = e.find(); e.program == "" {
			return
		}
		if e.template, e.err = os.MkdirTemp("", "database"); e.err == nil {
			e.err = e.setUp(e, e.template)
		}
	})
	switch {
	case e.program == "" && os.Getenv("CI") != "":
		t.Fatal(e.howToGet)
	case e.program == "":
		fmt.Fprintln(os.Stderr, "skipped", t.Name()+":", e.howToGet) // go test shows it without -v
		t.Skip(e.howToGet)
	case e.err != nil:
		t.Fatalf("failed to set up %s: %v", e.Name, e.err)
	}
	return filepath.Join(e.template, "data")
}

// setUpMariaDB creates the system tables, the user and Database. It needs no client programs, as
// mariadb-install-db does. The server reads one statement per line.
func setUpMariaDB(e *Engine, dir string) error {
	script := bytes.NewBufferString("USE mysql;\n")
	for _, name := range []string{"mysql_system_tables.sql", "mysql_system_tables_data.sql"} {
		found, _ := filepath.Glob("/usr/share/m*/" + name) // mysql or mariadb
		if len(found) == 0 {
			return fmt.Errorf("/usr/share/mysql/%s is missing: apt-get install mariadb-server-core", name)
		}
		text, _ := os.ReadFile(found[0])
		script.Write(append(text, '\n'))
	}
	fmt.Fprintf(script, "FLUSH PRIVILEGES;\n%s", createAll())
	if err := os.MkdirAll(filepath.Join(dir, "data", "mysql"), 0o700); err != nil {
		return err
	}
	cmd := e.command(dir, "--bootstrap")
	cmd.Stdin = script
	return output(cmd)
}

// setUpMySQL is the same for MySQL.
func setUpMySQL(e *Engine, dir string) error {
	script := filepath.Join(dir, "set-up.sql")
	if err := os.WriteFile(script, []byte(createAll()), 0o600); err != nil {
		return err
	}
	err := output(e.command(dir, "--initialize-insecure", "--skip-log-bin", "--init-file="+script))
	if err != nil {
		return err
	}
	return os.Remove(filepath.Join(dir, "data", "auto.cnf")) // the ID of a server, which is unique
}

// createAll returns the statements that create the user and Database.
func createAll() string {
	return fmt.Sprintf("CREATE USER test@'%%' IDENTIFIED BY '%s';\nGRANT ALL ON *.* TO test@'%%' WITH GRANT OPTION;\n"+createDatabase,
		password, Database)
}

func output(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// command returns a command that runs the program on the data directory in dir.
func (e *Engine) command(dir string, args ...string) *exec.Cmd {
	args = append(append([]string{
		"--no-defaults", "--datadir=" + filepath.Join(dir, "data"), "--innodb-buffer-pool-size=32M", e.RedoLog("8M"),
		// A starting server removes temporary tables in tmpdir, even those of another server.
		"--tmpdir=" + dir,
	}, e.args...), args...)
	if os.Geteuid() == 0 {
		args = append(args, "--user=root")
	}
	cmd := exec.Command(e.program, args...)
	cmd.SysProcAttr = dieWithParent()
	return cmd
}
