package consistency

import (
	"database/sql"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/go-sql-driver/mysql"
)

// A network is three hosts. Each has its own network namespace, with one link to a switch for the
// hosts only, and one to this process. The namespaces belong to processes that the kernel kills
// together with this one, so that a crash leaves no link.
type network struct {
	t     testing.TB
	name  string // begins the names of the links to this process
	dir   string
	netns *process // namespace of the switch
	hosts [3]*host
}

// A host runs one database server.
type host struct {
	*network
	index  int
	netns  *process
	server *process
	config *mysql.Config
	db     *sql.DB // over the link to this process, without faults
}

// newNetwork makes the hosts, without servers. access has the user and the password of db.
func newNetwork(t testing.TB, name string, access *mysql.Config) *network {
	t.Helper()
	w := &network{t: t, name: name}
	var err error
	w.dir, err = os.MkdirTemp("", name)
	w.must(err)
	t.Cleanup(w.remove)
	w.must(os.Chmod(w.dir, 0o755))
	w.connect(access)
	return w
}

// connect makes the links. The hosts' addresses exist only on the switch. The links to this process
// use a free part of the address range for benchmarks.
func (w *network) connect(access *mysql.Config) {
	inUse, err := net.InterfaceAddrs()
	w.must(err)
	var subnet int
	for free := false; !free; {
		subnet = rand.IntN(256)
		free = !slices.ContainsFunc(inUse, func(a net.Addr) bool { return strings.HasPrefix(a.String(), fmt.Sprintf("198.19.%d.", subnet)) })
	}
	w.netns = w.namespace()
	w.netns.within("ip", "link", "add", "switch", "up", "type", "bridge")
	for i := range w.hosts {
		h := &host{network: w, index: i, netns: w.namespace()}
		w.hosts[i] = h
		w.must(os.Mkdir(h.path(), 0o755))
		netns := strconv.Itoa(h.netns.Pid)
		w.netns.within("ip", "link", "add", h.port(), "up", "master", "switch", "type", "veth", "peer", "name", "cluster", "netns", netns)
		h.netns.within("ip", "address", "add", h.address()+"/24", "dev", "cluster")
		h.netns.within("ip", "link", "set", "cluster", "up")
		h.netns.within("ip", "link", "set", "lo", "up")

		here := fmt.Sprintf("%s%d-%d", w.name, os.Getpid(), i)
		// The kernel removes the link some time after its namespace, and the next network needs its name.
		w.t.Cleanup(func() { exec.Command("ip", "link", "delete", here).Run() })
		run(w.t, "ip", "link", "add", here, "type", "veth", "peer", "name", "tests", "netns", netns)
		run(w.t, "ip", "address", "add", fmt.Sprintf("198.19.%d.%d/30", subnet, 4*i+1), "dev", here)
		run(w.t, "ip", "link", "set", here, "up")
		address := fmt.Sprintf("198.19.%d.%d", subnet, 4*i+2)
		h.netns.within("ip", "address", "add", address+"/30", "dev", "tests")
		h.netns.within("ip", "link", "set", "tests", "up")

		h.config = access.Clone()
		h.config.Addr = address + ":3306"
		connector, err := mysql.NewConnector(h.config)
		w.must(err)
		h.db = sql.OpenDB(connector)
	}
}

func (h *host) port() string    { return fmt.Sprintf("node%d", h.index) }
func (h *host) address() string { return fmt.Sprintf("198.18.0.%d", h.index+1) }
func (h *host) path() string    { return filepath.Join(h.dir, h.port()) }
func (h *host) log() string     { return filepath.Join(h.path(), "log.err") } // servers add a missing extension

// command returns a command that runs in the host's namespace.
func (h *host) command(command ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", strconv.Itoa(h.netns.Pid), "-n"}, command...)...)
}

// disconnect takes the host's link to the other hosts down, and reconnect takes it up. The other
// hosts notice only that the host is silent.
func (h *host) disconnect() { h.network.netns.within("ip", "link", "set", h.port(), "down") }
func (h *host) reconnect()  { h.network.netns.within("ip", "link", "set", h.port(), "up") }

// addresses returns the addresses of all servers, as this process reaches them.
func (w *network) addresses() (all []string) {
	for _, h := range w.hosts {
		all = append(all, h.config.Addr)
	}
	return all
}

func (w *network) remove() {
	for _, h := range w.hosts {
		if h == nil {
			continue
		}
		if h.db != nil {
			h.db.Close()
		}
		if h.server != nil {
			h.server.kill()
		}
		h.netns.kill()
		if log, err := os.ReadFile(h.log()); err == nil && w.t.Failed() {
			w.t.Logf("the end of %s's log:\n%s", h.port(), log[max(0, len(log)-8000):])
		}
	}
	if w.netns != nil {
		w.netns.kill()
	}
	os.RemoveAll(w.dir)
}

func (w *network) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// A process ends together with this one.
type process struct {
	*os.Process
	*network
	exited chan struct{}
}

func (w *network) spawn(cmd *exec.Cmd) *process {
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
	w.must(<-started)
	return &process{cmd.Process, w, exited}
}

func (w *network) namespace() *process {
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return w.spawn(cmd)
}

// within runs a command in the namespace that p holds.
func (p *process) within(command ...string) {
	run(p.t, "nsenter", append([]string{"-t", strconv.Itoa(p.Pid), "-n"}, command...)...)
}

func (p *process) kill() {
	p.Kill()
	<-p.exited
}
