package consistency

import (
	"database/sql"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
)

const (
	galeraProvider = "/usr/lib/galera/libgalera_smm.so"
	galeraPackages = root + "/.bin/galera" // scripts of mariadb-server; its installation would start a server
	howToGetGalera = "no Galera cluster: it needs root, and the packages that make test-cluster installs"
	nobody         = 65534 // rsync, which fills a new node, does not run as root
)

// A cluster is three Galera nodes. Each has its own network namespace, with one link to a switch
// for the nodes only, and one to this process. The namespaces belong to processes that the kernel
// kills together with this one, so that a crash leaves no link.
type cluster struct {
	t        testing.TB
	dir      string
	mariadbd string
	access   *mysql.Config // user and password, the same on every node
	netns    *process      // namespace of the switch
	nodes    [3]*node
}

type node struct {
	*cluster
	index  int
	netns  *process
	server *process
	config *mysql.Config
	db     *sql.DB // over the link to this process, without faults
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	packages, _ := filepath.Glob(galeraPackages + "/*.deb")
	_, err := os.Stat(galeraProvider)
	if os.Geteuid() != 0 || err != nil || len(packages) == 0 {
		if os.Getenv("CI") != "" {
			t.Fatal(howToGetGalera)
		}
		t.Skip(howToGetGalera)
	}
	seed := mysqltest.Start(t) // the first node begins with its data
	c := &cluster{t: t}
	c.access, err = mysql.ParseDSN(seed.DSN(""))
	c.must(err)
	c.access.Logger = &mysql.NopLogger{} // nodes that are down are expected
	c.access.Timeout, c.access.ReadTimeout = 2*time.Second, 30*time.Second
	c.mariadbd, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", seed.PID()))
	c.must(err)
	seed.Stop()

	c.dir, err = os.MkdirTemp("", "galera")
	c.must(err)
	t.Cleanup(c.remove)
	c.must(os.Chmod(c.dir, 0o755))
	for _, p := range packages {
		run(c.t, "dpkg", "-x", p, c.dir)
	}
	c.connect()
	for _, n := range c.nodes {
		c.must(os.Mkdir(n.path(), 0o755))
		if n.index == 0 {
			run(c.t, "cp", "-r", filepath.Join(seed.Dir, "data"), n.path())
		} else {
			c.must(os.Mkdir(filepath.Join(n.path(), "data"), 0o755))
		}
		run(c.t, "chown", "-R", fmt.Sprintf("%d:%[1]d", nobody), n.path())
	}
	c.nodes[0].start("--wsrep-new-cluster")
	c.nodes[0].waitForSize(1)
	c.nodes[1].start()
	c.nodes[2].start()
	c.waitUntilWhole()
	return c
}

// connect makes the links. The nodes' addresses exist only on the switch. The links to this process
// use a free part of the address range for benchmarks.
func (c *cluster) connect() {
	inUse, err := net.InterfaceAddrs()
	c.must(err)
	var subnet int
	for free := false; !free; {
		subnet = rand.IntN(256)
		free = !slices.ContainsFunc(inUse, func(a net.Addr) bool { return strings.HasPrefix(a.String(), fmt.Sprintf("198.19.%d.", subnet)) })
	}
	c.netns = c.namespace()
	c.netns.within("ip", "link", "add", "switch", "up", "type", "bridge")
	for i := range c.nodes {
		n := &node{cluster: c, index: i, netns: c.namespace()}
		c.nodes[i] = n
		netns := strconv.Itoa(n.netns.Pid)
		c.netns.within("ip", "link", "add", n.port(), "up", "master", "switch", "type", "veth", "peer", "name", "cluster", "netns", netns)
		n.netns.within("ip", "address", "add", n.address()+"/24", "dev", "cluster")
		n.netns.within("ip", "link", "set", "cluster", "up")
		n.netns.within("ip", "link", "set", "lo", "up")

		here := fmt.Sprintf("galera%d-%d", os.Getpid(), i)
		run(c.t, "ip", "link", "add", here, "type", "veth", "peer", "name", "tests", "netns", netns)
		run(c.t, "ip", "address", "add", fmt.Sprintf("198.19.%d.%d/30", subnet, 4*i+1), "dev", here)
		run(c.t, "ip", "link", "set", here, "up")
		access := fmt.Sprintf("198.19.%d.%d", subnet, 4*i+2)
		n.netns.within("ip", "address", "add", access+"/30", "dev", "tests")
		n.netns.within("ip", "link", "set", "tests", "up")

		n.config = c.access.Clone()
		n.config.Addr = access + ":3306"
		connector, err := mysql.NewConnector(n.config)
		c.must(err)
		n.db = sql.OpenDB(connector)
	}
}

func (n *node) port() string    { return fmt.Sprintf("node%d", n.index) }
func (n *node) address() string { return fmt.Sprintf("198.18.0.%d", n.index+1) }
func (n *node) path() string    { return filepath.Join(n.dir, n.port()) }
func (n *node) log() string     { return filepath.Join(n.path(), "log.err") } // the server adds a missing extension

// command returns a command that runs the server as nobody in the node's namespace.
func (n *node) command(args ...string) *exec.Cmd {
	command := append([]string{
		"-t", strconv.Itoa(n.netns.Pid), "-n", "setpriv", fmt.Sprintf("--reuid=%d", nobody), fmt.Sprintf("--regid=%d",
			nobody), "--clear-groups", "--pdeathsig=KILL",
		n.mariadbd, "--no-defaults", "--datadir=" + filepath.Join(n.path(),
			"data"), "--tmpdir=" + n.path(), "--socket=s", "--pid-file=" + filepath.Join(n.path(), "pid"),
		"--skip-name-resolve", "--max-connections=500", "--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M",
		"--binlog-format=ROW", "--innodb-autoinc-lock-mode=2", "--wsrep-on=ON", "--wsrep-provider=" + galeraProvider, "--wsrep-sst-method=rsync",
		"--wsrep-cluster-address=gcomm://198.18.0.1,198.18.0.2,198.18.0.3", "--wsrep-node-address=" + n.address(), "--wsrep-node-name=" + n.port(),
		"--wsrep-provider-options=gcache.size=16M", // all timeouts are defaults
	}, args...)
	cmd := exec.Command("nsenter", command...)
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
func (c *cluster) waitUntilWhole() {
	c.t.Helper()
	testutil.Eventually(c.t, "all nodes are in one cluster", func() bool {
		number := c.nodes[0].status("wsrep_cluster_conf_id")
		for _, n := range c.nodes {
			if n.status("wsrep_cluster_conf_id") != number || !n.synced(len(c.nodes)) {
				return false
			}
		}
		return true
	})
}

// disconnect takes the node's link to the other nodes down, and reconnect takes it up. The other
// nodes notice only that the node is silent.
func (n *node) disconnect() { n.cluster.netns.within("ip", "link", "set", n.port(), "down") }
func (n *node) reconnect()  { n.cluster.netns.within("ip", "link", "set", n.port(), "up") }

func (c *cluster) remove() {
	for _, n := range c.nodes {
		if n == nil {
			continue
		}
		if n.server != nil {
			n.server.kill()
		}
		n.netns.kill()
		if log, err := os.ReadFile(n.log()); err == nil && c.t.Failed() {
			c.t.Logf("the end of %s's log:\n%s", n.port(), log[max(0, len(log)-8000):])
		}
	}
	if c.netns != nil {
		c.netns.kill()
	}
	os.RemoveAll(c.dir)
}

// A process ends together with this one.
type process struct {
	*os.Process
	*cluster
	exited chan struct{}
}

func (c *cluster) spawn(cmd *exec.Cmd) *process {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started, exited := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig depends on the thread that starts the process
		started <- cmd.Start()
		cmd.Wait()
		close(exited)
	}()
	c.must(<-started)
	return &process{cmd.Process, c, exited}
}

func (c *cluster) namespace() *process {
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return c.spawn(cmd)
}

// within runs a command in the namespace that p holds.
func (p *process) within(command ...string) {
	run(p.t, "nsenter", append([]string{"-t", strconv.Itoa(p.Pid), "-n"}, command...)...)
}

func (p *process) kill() {
	p.Kill()
	<-p.exited
}

func (c *cluster) must(err error) {
	if err != nil {
		c.t.Fatal(err)
	}
}
