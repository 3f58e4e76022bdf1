package consistency

import (
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const (
	galeraProvider = "/usr/lib/galera/libgalera_smm.so"
	galeraPackages = root + "/.bin/galera" // scripts of mariadb-server; its installation would start a server
	howToGetGalera = "no Galera cluster: it needs root, and the packages that make test-cluster installs"
	nobody         = 65534 // rsync, which fills a new node, does not run as root
)

// maxGaleraStall is how long callers of the other replicas may wait if a node fails, with Galera's
// default timeouts: a silent node is suspected after five seconds, and then the others agree on
// that.
const maxGaleraStall = 8 * time.Second

// The test has three replicas, each on its own Galera node.
func TestGalera_KeepsTheGuarantees(t *testing.T) {
	g := startGalera(t)
	t.Run("calls are linearizable", func(t *testing.T) {
		r := g.replicas(t, buildOnce())
		report(t, r.load().run(t))
		r.sameOnAllHosts(t)
	})
	t.Run("64 calls with one key on three replicas are one SMS", func(t *testing.T) {
		r := g.replicas(t, buildOnce())
		for _, v := range sendWithOneKey(t, r.fake, r.load().dial(t)) {
			t.Error(v)
		}
	})
	t.Run("calls are linearizable while a node is killed and comes back", func(t *testing.T) {
		victim := g.nodes[0] // the node that began the cluster
		g.survives(t, g.replicas(t, buildOnce()), victim, func() {
			victim.server.kill()
			g.nodes[1].waitForSize(2)
			victim.restart()
		})
	})
	t.Run("calls are linearizable while a node is frozen", func(t *testing.T) {
		victim := g.nodes[1]
		g.survives(t, g.replicas(t, buildOnce()), victim, func() {
			victim.server.Signal(syscall.SIGSTOP)
			g.nodes[2].waitForSize(2)
			victim.server.Signal(syscall.SIGCONT)
		})
	})
	t.Run("calls are linearizable while a node is disconnected, which rejects calls", func(t *testing.T) {
		r := g.replicas(t, buildOnce())
		victim := g.nodes[2]
		var from, to time.Time
		h := g.survives(t, r, victim, func() {
			victim.disconnect()
			g.nodes[0].waitForSize(2)
			testutil.Eventually(t, "the disconnected node is not primary", func() bool {
				return victim.status("wsrep_cluster_status") == "non-Primary"
			})
			from = time.Now()
			number := fmt.Sprintf("186%08d", 99_999_999)
			_, err := r.processes[2].Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: "000000"})
			if status.Code(err) != codes.Unavailable {
				t.Errorf("Valid at the disconnected node: got %v; want UNAVAILABLE", err)
			}
			before := len(r.fake.Accepted())
			_, err = r.processes[2].SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "alone", TemplateCode: "SMS_1"})
			if status.Code(err) != codes.Unavailable {
				t.Errorf("SendSMS at the disconnected node: got %v; want UNAVAILABLE", err)
			}
			for _, m := range r.fake.Accepted()[before:] {
				if m.SignName == "alone" {
					t.Error("the replica of the disconnected node: got an SMS sent; want none")
				}
			}
			to = time.Now()
			victim.reconnect()
		})
		for _, a := range h.completed {
			if at := h.began.Add(a.at); a.replica == 2 && at.After(from) && at.Before(to) {
				t.Fatal("the replica of the disconnected node: got a completed call; want none")
			}
		}
	})
	t.Run("nothing acknowledged is lost while a node is killed and another one disconnected", func(t *testing.T) {
		r := g.replicas(t, buildOnce())
		l := newLedger(r.fake)
		l.write(t, r.load().replicas, func() {
			l.grow(t, 100)
			g.nodes[1].server.kill()
			g.nodes[0].waitForSize(2)
			l.grow(t, 100)
			g.nodes[1].restart()
			g.waitUntilWhole()
			l.grow(t, 100)
			g.nodes[2].disconnect()
			g.nodes[0].waitForSize(2)
			l.grow(t, 100)
			g.nodes[2].reconnect()
			g.waitUntilWhole()
		})
		reportFirst(t, l.lost(t, r.processes[2].Addr))
	})
	t.Run("a planted bug is found", func(t *testing.T) {
		t.Setenv(failuresIn, t.TempDir()) // these failures are expected
		requireIllegal(t, g.replicas(t, withBug(t, "swap without version")).load().run(t))
	})
	t.Run("a stale node rejects a right code without wsrep_sync_wait, and accepts it with it", g.staleReads)
}

// A galera is a cluster of three Galera nodes.
type galera struct {
	*cluster
	mariadbd string
	nodes    [3]*node
}

type node struct {
	*host
	galera *galera
}

func startGalera(t *testing.T) *galera {
	t.Helper()
	packages, _ := filepath.Glob(galeraPackages + "/*.deb")
	_, err := os.Stat(galeraProvider)
	if os.Geteuid() != 0 || err != nil || len(packages) == 0 {
		if os.Getenv("CI") != "" {
			t.Fatal(howToGetGalera)
		}
		t.Skip(howToGetGalera)
	}
	seed := mysqltest.StartWith(t, mysqltest.Options{Engine: mysqltest.MariaDB}) // the first node begins with its data
	g := &galera{}
	g.mariadbd, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", seed.PID()))
	if err != nil {
		t.Fatal(err)
	}
	seed.Stop()
	g.cluster = &cluster{newNetwork(t, "galera", accessTo(t, seed)), func() *sql.DB { return g.nodes[0].db }, g.waitUntilWhole}
	for _, p := range packages {
		run(t, "dpkg", "-x", p, g.dir)
	}
	for i, h := range g.hosts {
		g.nodes[i] = &node{h, g}
		if i == 0 {
			run(t, "cp", "-r", filepath.Join(seed.Dir, "data"), h.path())
		} else {
			g.must(os.Mkdir(filepath.Join(h.path(), "data"), 0o755))
		}
		run(t, "chown", "-R", fmt.Sprintf("%d:%[1]d", nobody), h.path())
	}
	g.nodes[0].start("--wsrep-new-cluster")
	g.nodes[0].waitForSize(1)
	g.nodes[1].start()
	g.nodes[2].start()
	g.waitUntilWhole()
	return g
}

// replicas starts a replica on each node.
func (g *galera) replicas(t *testing.T, program string) *replicas {
	t.Helper()
	return g.cluster.replicas(t, program, g.addresses(), syncWait("15"))
}

func syncWait(value string) map[string]string { return map[string]string{"wsrep_sync_wait": value} }

// survives also checks that the victim catches up under load.
func (g *galera) survives(t *testing.T, r *replicas, victim *node, inject func()) *history {
	t.Helper()
	return r.survives(t, maxGaleraStall, []int{(victim.index + 1) % 3, (victim.index + 2) % 3}, func() {
		inject()
		g.waitUntilWhole()
	})
}

// command returns a command that runs the server as nobody in the node's namespace.
func (n *node) command(args ...string) *exec.Cmd {
	cmd := n.host.command(append([]string{
		"setpriv", fmt.Sprintf("--reuid=%d", nobody), fmt.Sprintf("--regid=%d", nobody), "--clear-groups", "--pdeathsig=KILL",
		n.galera.mariadbd, "--no-defaults", "--datadir=" + filepath.Join(n.path(), "data"), "--tmpdir=" + n.path(),
		"--socket=s", "--pid-file=" + filepath.Join(n.path(), "pid"),
		"--skip-name-resolve", "--max-connections=500", "--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M",
		"--binlog-format=ROW", "--innodb-autoinc-lock-mode=2", "--wsrep-on=ON", "--wsrep-provider=" + galeraProvider, "--wsrep-sst-method=rsync",
		"--wsrep-cluster-address=gcomm://198.18.0.1,198.18.0.2,198.18.0.3", "--wsrep-node-address=" + n.address(), "--wsrep-node-name=" + n.port(),
		"--wsrep-provider-options=gcache.size=16M", // all timeouts are defaults
	}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(n.dir, "usr/bin")+":"+os.Getenv("PATH"))
	return cmd
}

func (n *node) start(args ...string) {
	n.server = n.spawn(n.command(append(args, "--log-error="+n.log())...))
}

// restart starts the server at the position of its data, as Debian's systemd unit does.
func (n *node) restart() {
	out, err := n.command("--wsrep-recover").CombinedOutput()
	found := regexp.MustCompile(`Recovered position: (\S+)`).FindSubmatch(out)
	if err != nil || found == nil {
		n.t.Fatalf("recover %s: %v\n%s", n.port(), err, out)
	}
	n.start("--wsrep-start-position=" + string(found[1]))
}

// status returns a status variable of the node, or "" if there is none.
func (n *node) status(name string) (value string) {
	n.db.QueryRow("SHOW GLOBAL STATUS LIKE '"+name+"'").Scan(&name, &value)
	return value
}

// committed returns the sequence number of the last transaction that the node committed.
func (n *node) committed() int {
	count, err := strconv.Atoi(n.status("wsrep_last_committed"))
	n.must(err)
	return count
}

// synced reports whether the node is up to date, in a primary cluster of this size.
func (n *node) synced(size int) bool {
	return n.status("wsrep_local_state_comment") == "Synced" && n.status("wsrep_cluster_status") == "Primary" &&
		n.status("wsrep_cluster_size") == strconv.Itoa(size)
}

// waitForSize waits until the node is up to date in a primary cluster of this size.
func (n *node) waitForSize(size int) {
	n.t.Helper()
	testutil.Eventually(n.t, fmt.Sprintf("%s is one of %d", n.port(), size), func() bool { return n.synced(size) })
}

// waitUntilWhole waits until all nodes are up to date in one cluster. A frozen node still reports
// its earlier cluster, which has another number.
func (g *galera) waitUntilWhole() {
	g.t.Helper()
	testutil.Eventually(g.t, "all nodes are in one cluster", func() bool {
		number := g.nodes[0].status("wsrep_cluster_conf_id")
		return !slices.ContainsFunc(g.nodes[:], func(n *node) bool {
			return n.status("wsrep_cluster_conf_id") != number || !n.synced(len(g.nodes))
		})
	})
}

// staleReads blocks one node from applying writes, as a backup does, and checks codes on its
// replicas that were sent over another node.
func (g *galera) staleReads(t *testing.T) {
	r := g.replicas(t, buildOnce())
	behind := g.nodes[2]
	const warning = "this is Galera without wsrep_sync_wait"
	stale, waiting := r.start(t, buildOnce(), behind.config.Addr, syncWait("0")), r.start(t, buildOnce(), behind.config.Addr, syncWait("15"))
	if out := stale.Output.String(); !strings.Contains(out, warning) {
		t.Errorf("without wsrep_sync_wait: want a warning at the start, got:\n%s", out)
	}
	if out := waiting.Output.String(); strings.Contains(out, warning) {
		t.Errorf("with wsrep_sync_wait=15: want no warning at the start, got:\n%s", out)
	}

	ctx := t.Context()
	backup, err := behind.db.Conn(ctx)
	g.must(err)
	defer backup.Close()
	_, err = backup.ExecContext(ctx, "FLUSH TABLES WITH READ LOCK")
	g.must(err)
	rights := r.sendCodes(t, r.processes[0])
	var calling sync.WaitGroup
	var completed atomic.Int32
	for _, right := range rights {
		if res, err := stale.Valid(ctx, right); err != nil || res.Valid {
			t.Errorf("the right code at a stale node, with wsrep_sync_wait=0: got %v, %v; want false, or the node is not stale", res, err)
		}
		calling.Go(func() {
			if res, err := waiting.Valid(ctx, right); err != nil || !res.Valid {
				t.Errorf("the right code at a stale node, with wsrep_sync_wait=15: got %v, %v; want true", res, err)
			}
			completed.Add(1)
		})
	}
	testutil.Eventually(t, "the calls with wsrep_sync_wait=15 wait at the node", func() bool {
		var reading int // two may be readiness probes; loads are batched
		err := behind.db.QueryRow("SELECT COUNT(*) FROM information_schema.processlist WHERE info LIKE 'SELECT version%' AND db = ?", r.database).Scan(&reading)
		g.must(err)
		return reading > 2
	})
	if has, others := behind.committed(), g.nodes[0].committed(); has >= others {
		t.Errorf("the stale node: got transaction %d, the others %d; want it behind", has, others)
	}
	if n := completed.Load(); n > 0 {
		t.Errorf("got %d completed calls with wsrep_sync_wait=15 at the stale node; want none", n)
	}
	_, err = backup.ExecContext(ctx, "UNLOCK TABLES")
	g.must(err)
	calling.Wait()
}

// accessTo returns the user and password of a server, with time-outs for servers that fail.
func accessTo(t *testing.T, server *mysqltest.Server) *mysql.Config {
	t.Helper()
	config, err := mysql.ParseDSN(server.DSN(""))
	if err != nil {
		t.Fatal(err)
	}
	config.Logger = &mysql.NopLogger{} // servers that are down are expected
	config.Timeout, config.ReadTimeout = 2*time.Second, 30*time.Second
	return config
}
