package consistency

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

func TestDurability_FiveKillsLoseNothing(t *testing.T) {
	const kills, between = 5, 100 // entries
	t.Run("of the database", func(t *testing.T) {
		database := mysqltest.Start(t)
		p := startPair(t, buildOnce(), database.DSN(mysqltest.Database))
		l := newLedger(p.fake)
		l.write(t, p.load().replicas, func() {
			for range kills {
				l.grow(t, between)
				database.Kill()
				database.Restart()
			}
			l.grow(t, between)
		})
		reportFirst(t, l.lost(t, p.replicas[0].Addr))
	})
	t.Run("of the replicas", func(t *testing.T) {
		p := startPair(t, buildOnce(), mysqltest.DSN(t))
		l := newLedger(p.fake)
		l.write(t, p.load().replicas, func() {
			for range kills {
				l.grow(t, between)
				for i, old := range p.replicas {
					old.Kill()
					p.replicas[i] = p.start(old.Addr).Serving(t)
				}
			}
			l.grow(t, between)
		})
		reportFirst(t, l.lost(t, p.replicas[0].Addr))
	})
	t.Run("of the service on its SQLite file", func(t *testing.T) {
		p := startSingle(t, buildOnce(), t.TempDir())
		l := newLedger(p.fake)
		l.write(t, []string{p.Addr}, func() {
			for range kills {
				l.grow(t, between)
				p.Kill()
				p.Process = p.start(p.Addr).Serving(t)
			}
			l.grow(t, between)
		})
		reportFirst(t, l.lost(t, p.Addr))
	})
}

// reportFirst fails t with the number of violations and the first one.
func reportFirst(t *testing.T, violations []string) {
	t.Helper()
	if n := len(violations); n > 0 {
		t.Errorf("got %d violations, the first: %s", n, violations[0])
	}
}

// A single is one replica on an SQLite file.
type single struct {
	*servicetest.Process
	fake  *dysmsapitest.Server
	start func(address string) *servicetest.Process
}

func startSingle(t *testing.T, program, dir string) *single {
	t.Helper()
	a := &single{fake: dysmsapitest.New(t)}
	env := append(servicetest.Environment(a.fake, "sqlite:"+filepath.Join(dir, "codes.db")), "PHONENUMBER_LOG_LEVEL=warn")
	a.start = func(address string) *servicetest.Process { return servicetest.Start(t, program, address, env) }
	a.Process = a.start(servicetest.FreeAddress(t)).Serving(t)
	return a
}

const entriesBeforePowerLoss = 1000

func TestDurability_PowerLossOfAServerLosesNothing(t *testing.T) {
	const warning = "innodb_flush_log_at_trx_commit is"
	lost, output := serverLosesPower(t, "1")
	reportFirst(t, lost)
	if strings.Contains(output, warning) {
		t.Errorf("a durable database: want no warning, got:\n%s", output)
	}
	t.Run("entries are lost if the log is not flushed", func(t *testing.T) {
		lost, output := serverLosesPower(t, "2")
		for tries := 1; len(lost) == 0 && tries < 3; tries++ { // MySQL may have flushed just before
			lost, output = serverLosesPower(t, "2")
		}
		if len(lost) == 0 {
			t.Error("got no lost entry; want some, or the power loss has no effect")
		}
		if strings.Count(output, warning) != 1 {
			t.Errorf("want one warning with %q, got:\n%s", warning, output)
		}
	})
}

func serverLosesPower(t *testing.T, flush string) (lost []string, output string) {
	d := newDisk(t)
	database := mysqltest.StartWith(t, mysqltest.Options{Dir: d.path, Args: []string{
		"--innodb-flush-log-at-trx-commit=" + flush,
		// No flush during the test. MySQL also flushes the log before it writes a page, and writes few so.
		"--innodb-flush-log-at-timeout=60", "--innodb-max-dirty-pages-pct-lwm=0", "--innodb-adaptive-flushing=OFF",
		mysqltest.DefaultEngine(t).RedoLog("64M"),
	}})
	syscall.Sync() // the data directory is a copy, which nothing else flushes
	fake := dysmsapitest.New(t)
	p := servicetest.Start(t, buildOnce(), servicetest.FreeAddress(t),
		append(servicetest.Environment(fake, database.DSN(mysqltest.Database)), "PHONENUMBER_LOG_LEVEL=warn")).Serving(t)
	output = p.Output.String()
	l := newLedger(fake)
	var after string
	l.write(t, []string{p.Addr}, func() {
		l.grow(t, entriesBeforePowerLoss)
		after = d.losePower(t, database.PID())
		database.Kill()
	})
	database.Move(after)
	return l.lost(t, p.Addr), output
}

func TestDurability_PowerLossOfSQLiteLosesNothing(t *testing.T) {
	testGuarantee(t, sqliteLosesPower)
}

func sqliteLosesPower(t *testing.T, program string) []string {
	d := newDisk(t)
	a := startSingle(t, program, d.path)
	l := newLedger(a.fake)
	var after string
	l.write(t, []string{a.Addr}, func() {
		l.grow(t, entriesBeforePowerLoss)
		after = d.losePower(t, a.PID)
		a.Kill()
	})
	env := servicetest.Environment(a.fake, "sqlite:"+filepath.Join(after, "codes.db"))
	return l.lost(t, servicetest.Start(t, program, a.Addr, env).Serving(t).Addr)
}

// A disk is a file system in a file. Data that a process wrote but did not flush is not in that
// file until the kernel writes it.
type disk struct{ image, path string }

func newDisk(t *testing.T) *disk {
	t.Helper()
	requireRoot(t)
	d := &disk{image: filepath.Join(t.TempDir(), "image")}
	run(t, "truncate", "-s", "512M", d.image)
	run(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", d.image)
	d.path = mounted(t, "-o", "loop", d.image)
	return d
}

// losePower simulates a power loss at this moment: it copies the image of the file system, mounts
// the copy and returns its path. The process that writes stays stopped.
func (d *disk) losePower(t *testing.T, pid int) (path string) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "all threads are stopped", func() bool {
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		for _, thread := range threads {
			stat, _ := os.ReadFile(thread)
			_, state, _ := strings.Cut(string(stat), ") ")
			if !strings.HasPrefix(state, "T") {
				return false
			}
		}
		return len(threads) > 0
	})
	copied := filepath.Join(t.TempDir(), "image")
	run(t, "cp", "--sparse=always", d.image, copied)
	return mounted(t, "-o", "loop", copied)
}

// requireRoot skips the test without root; in CI it fails.
func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	const reason = "only root can mount the disks of this test: run make test-consistency as root"
	if os.Getenv("CI") != "" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// mounted calls mount with args and returns the path. The end of the test unmounts it.
func mounted(t *testing.T, args ...string) (path string) {
	t.Helper()
	path, err := os.MkdirTemp("", "disk")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "mount", append(args, path)...)
	t.Cleanup(func() {
		run(t, "umount", "--lazy", path) // servers on it end later
		os.Remove(path)
	})
	return path
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}
