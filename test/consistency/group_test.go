package consistency

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const howToGetGroup = "no MySQL group: it needs root, ip and nsenter, and make deps-mysql"

// maxGroupStall is how long callers may wait if a member fails: five seconds until the others
// suspect a silent member, the time until they agree on that, and the election of a primary.
const maxGroupStall = 15 * time.Second

// maxMultiPrimaryStall is that in multi-primary mode. In some runs the others see at once that a killed
// member is unreachable, and MySQL removes it 64 seconds later. No write succeeds before.
const maxMultiPrimaryStall = 90 * time.Second

// The test has two replicas behind a router, which follows the primary.
func TestGroupReplication_SinglePrimaryKeepsTheGuarantees(t *testing.T) {
	g := startGroup(t, "ON")
	survives := func(t *testing.T, inject func(victim *member)) {
		victim := g.primary()
		g.onPrimary(t, "BEFORE_ON_PRIMARY_FAILOVER").survives(t, maxGroupStall, []int{0, 1}, func() { inject(victim) })
		if g.primary() == victim {
			t.Error("the primary after the fault: got the same member; want another one")
		}
	}
	t.Run("calls are linearizable while the primary is killed and comes back", func(t *testing.T) {
		survives(t, func(victim *member) {
			victim.server.kill()
			victim.next().waitForSize(2)
			victim.start()
		})
	})
	t.Run("calls are linearizable while the primary is frozen", func(t *testing.T) {
		survives(t, func(victim *member) {
			victim.server.Signal(syscall.SIGSTOP)
			victim.next().waitForSize(2)
			victim.server.Signal(syscall.SIGCONT)
			victim.waitForSuccessor()
		})
	})
	t.Run("calls are linearizable while the primary is disconnected", func(t *testing.T) {
		survives(t, func(victim *member) {
			victim.disconnect()
			victim.next().waitForSize(2)
			victim.reconnect()
			victim.waitForSuccessor()
		})
	})
	t.Run("nothing acknowledged is lost while a primary is killed and the next one disconnected", func(t *testing.T) {
		r := g.onPrimary(t, "BEFORE_ON_PRIMARY_FAILOVER")
		l := newLedger(r.fake)
		for _, fault := range []struct{ begin, end func(*member) }{
			{func(m *member) { m.server.kill() }, func(m *member) { m.start() }},
			{func(m *member) { m.disconnect() }, func(m *member) { m.reconnect() }},
		} {
			l.write(t, r.load().replicas, func() {
				l.grow(t, 100)
				victim := g.primary()
				fault.begin(victim)
				victim.next().waitForSize(2)
				l.grow(t, 100)
				fault.end(victim)
				l.grow(t, 100)
			})
			g.waitUntilWhole()
		}
		reportFirst(t, l.lost(t, r.processes[0].Addr))
	})
	t.Run("a new primary with a backlog rejects a right code with EVENTUAL, and accepts it later with BEFORE_ON_PRIMARY_FAILOVER", g.backlog)
	t.Run("a disconnected primary rejects a right code with BEFORE_ON_PRIMARY_FAILOVER, and none with BEFORE", g.oldPrimary)
}

// The test has three replicas, one for each member.
func TestGroupReplication_MultiPrimaryKeepsTheGuarantees(t *testing.T) {
	g := startGroup(t, "OFF")
	t.Run("calls are linearizable", func(t *testing.T) {
		r := g.onMembers(t, "BEFORE")
		report(t, r.load().run(t))
		r.sameOnAllHosts(t)
	})
	t.Run("calls are linearizable while a member is killed and comes back", func(t *testing.T) {
		victim := g.members[0] // the member that began the group
		g.onMembers(t, "BEFORE").survives(t, maxMultiPrimaryStall, []int{1, 2}, func() {
			victim.server.kill()
			victim.next().waitForSize(2)
			victim.start()
		})
	})
	t.Run("a member that has not joined rejects a right code even with BEFORE", g.notJoined)
	t.Run("calls are not linearizable with EVENTUAL", func(t *testing.T) {
		t.Setenv(failuresIn, t.TempDir()) // these failures are expected
		requireIllegal(t, g.onMembers(t, "EVENTUAL").load().run(t))
	})
}

// A group is three members of MySQL Group Replication.
type group struct {
	*cluster
	mysqld        string
	singlePrimary string // ON or OFF
	members       [3]*member
}

type member struct {
	*host
	group *group
}

func startGroup(t *testing.T, singlePrimary string) *group {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal(howToGetGroup)
		}
		t.Skip(howToGetGroup)
	}
	// All members begin with the data of seed, which has the account for a member that catches up.
	seed := mysqltest.StartWith(t, mysqltest.Options{Engine: mysqltest.MySQL, Args: []string{
		"--skip-log-bin", "--plugin-load-add=group_replication.so", "--group-replication-start-on-boot=OFF",
	}})
	_, err := seed.Open(t).Exec("CHANGE REPLICATION SOURCE TO SOURCE_USER = 'test', SOURCE_PASSWORD = '" + seed.Password() + "' FOR CHANNEL 'group_replication_recovery'")
	if err != nil {
		t.Fatal(err)
	}
	seed.Stop()
	g := &group{mysqld: seed.Engine.Program(), singlePrimary: singlePrimary}
	g.cluster = &cluster{newNetwork(t, "group", accessTo(t, seed)), func() *sql.DB { return g.primary().db }, g.waitUntilWhole}
	for i, h := range g.hosts {
		g.members[i] = &member{h, g}
		run(t, "cp", "-r", filepath.Join(seed.Dir, "data"), h.path())
		g.must(os.Remove(filepath.Join(h.path(), "data", "auto.cnf"))) // the ID of a server, which is unique
	}
	g.members[0].start("--group-replication-bootstrap-group=ON")
	g.members[0].waitForSize(1)
	g.members[1].start()
	g.members[2].start()
	g.waitUntilWhole()
	return g
}

// start starts the server, which joins the group.
func (m *member) start(args ...string) {
	m.server = m.spawn(m.command(append([]string{
		m.group.mysqld, "--no-defaults", "--user=root", "--datadir=" + filepath.Join(m.path(), "data"), "--tmpdir=" + m.path(), "--socket=s",
		"--pid-file=" + filepath.Join(m.path(), "pid"), "--log-error=" + m.log(), "--skip-name-resolve", "--max-connections=500", "--mysqlx=OFF",
		"--innodb-buffer-pool-size=32M", "--innodb-redo-log-capacity=8M", "--secure-file-priv=NULL",
		fmt.Sprintf("--server-id=%d", m.index+1), "--log-bin=binlog", "--relay-log=relay", "--gtid-mode=ON", "--enforce-gtid-consistency=ON",
		"--report-host=" + m.address(),
		"--plugin-load-add=group_replication.so", "--group-replication-group-name=00000000-0000-0000-0000-000000000001",
		"--group-replication-local-address=" + m.address() + ":33061", "--group-replication-ip-allowlist=198.18.0.0/24",
		"--group-replication-group-seeds=198.18.0.1:33061,198.18.0.2:33061,198.18.0.3:33061",
		"--group-replication-recovery-get-public-key=ON", "--group-replication-start-on-boot=ON",
		"--group-replication-single-primary-mode=" + m.group.singlePrimary,
		"--group-replication-member-expel-timeout=0", // MySQL waits five seconds more
	}, args...)...))
}

// next returns another member.
func (m *member) next() *member { return m.group.members[(m.index+1)%3] }

// view returns the members that this member counts to the group, those that are online, and the ID
// of its view.
func (m *member) view() (size, online int, id string) {
	m.db.QueryRow(`SELECT COUNT(*), SUM(member_state = 'ONLINE'), MAX(IF(member_id = @@server_uuid, view_id, NULL))
		FROM performance_schema.replication_group_members
		JOIN performance_schema.replication_group_member_stats USING (member_id)`).Scan(&size, &online, &id)
	return size, online, id
}

// waitForSize waits until the member is in a group of this size, whose members are online.
func (m *member) waitForSize(want int) {
	m.t.Helper()
	testutil.Eventually(m.t, fmt.Sprintf("%s is one of %d", m.port(), want), func() bool {
		size, online, _ := m.view()
		return size == want && online == want
	})
}

// waitForSuccessor waits until the member, which was the primary, knows another one.
func (m *member) waitForSuccessor() {
	m.t.Helper()
	testutil.Eventually(m.t, m.port()+" knows another primary", func() bool {
		primary := m.primaryOf(m.t.Context(), "%")
		return primary != "" && primary != m.address()
	})
}

// waitUntilWhole waits until all members are online in one group. A frozen member still reports its
// earlier view, which has another ID.
func (g *group) waitUntilWhole() {
	g.t.Helper()
	testutil.Eventually(g.t, "all members are in one group", func() bool {
		_, _, id := g.members[0].view()
		return !slices.ContainsFunc(g.members[:], func(m *member) bool {
			size, online, its := m.view()
			return size != 3 || online != 3 || its != id
		})
	})
}

// primaryOf returns the address of the primary that the member sees online, "" if there is none. In
// multi-primary mode it returns the first one that matches pattern, of SQL's LIKE.
func (m *member) primaryOf(ctx context.Context, pattern string) (address string) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	m.db.QueryRowContext(ctx, `SELECT member_host FROM performance_schema.replication_group_members
		WHERE member_role = 'PRIMARY' AND member_state = 'ONLINE' AND member_host LIKE ? ORDER BY 1 LIMIT 1`, pattern).Scan(&address)
	return address
}

// primary returns the member that two members see as primary. In multi-primary mode it is the first.
func (g *group) primary() (primary *member) {
	g.t.Helper()
	testutil.Eventually(g.t, "the group has a primary", func() bool {
		var votes [3]string
		for i, m := range g.members {
			votes[i] = m.primaryOf(g.t.Context(), "%")
		}
		elected := majority(votes)
		i := slices.IndexFunc(g.members[:], func(m *member) bool { return m.address() == elected })
		if i >= 0 {
			primary = g.members[i]
		}
		return i >= 0
	})
	return primary
}

// majority returns the address that two votes have, "" if no two agree.
func majority(votes [3]string) string {
	if votes[0] == votes[1] || votes[0] == votes[2] {
		return votes[0]
	}
	if votes[1] == votes[2] {
		return votes[1]
	}
	return ""
}

func consistency(level string) map[string]string {
	return map[string]string{"group_replication_consistency": "'" + level + "'"}
}

// onMembers starts a replica for each member, behind its own router.
func (g *group) onMembers(t *testing.T, level string) *replicas {
	t.Helper()
	var addresses []string
	for _, m := range g.members {
		addresses = append(addresses, g.route(t, m.address()))
	}
	return g.replicas(t, buildOnce(), addresses, consistency(level))
}

// onPrimary starts two replicas behind one router.
func (g *group) onPrimary(t *testing.T, level string) *replicas {
	t.Helper()
	address := g.route(t, "%")
	return g.replicas(t, buildOnce(), []string{address, address}, consistency(level))
}

// A router forwards connections to a primary, as MySQL Router does. It asks every member, and
// forwards only while two members see this primary online. A disconnected member does not know that
// the others elected another one, and a restarted one has old data until it is online.
type router struct {
	*group
	mu          sync.Mutex
	votes       [3]string
	primary     string
	connections map[net.Conn]bool // of clients and to the primary
}

// route starts a router until the test ends, and returns its address. The primary's address matches
// pattern.
func (g *group) route(t *testing.T, pattern string) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	g.must(err)
	r := &router{group: g, connections: map[net.Conn]bool{}}
	var asking sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		listener.Close()
		cancel()
		asking.Wait()
		for i := range r.votes {
			r.count(i, "")
		}
	})
	for i, m := range g.members {
		asking.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
				r.count(i, m.primaryOf(ctx, pattern))
			}
		})
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go r.serve(client)
		}
	}()
	return listener.Addr().String()
}

// count counts the vote of a member. If the primary changes, it closes all connections to the old one.
func (r *router) count(member int, vote string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.votes[member] = vote
	elected := majority(r.votes)
	if r.primary == elected {
		return
	}
	r.primary = elected
	for c := range r.connections {
		c.Close()
	}
	clear(r.connections)
}

func (r *router) serve(client net.Conn) {
	defer client.Close()
	r.mu.Lock()
	primary := r.primary
	r.mu.Unlock()
	i := slices.IndexFunc(r.hosts[:], func(h *host) bool { return h.address() == primary })
	if i < 0 {
		return
	}
	server, err := net.DialTimeout("tcp", r.hosts[i].config.Addr, time.Second)
	if err != nil {
		return
	}
	defer server.Close()
	r.mu.Lock()
	same := r.primary == primary
	if same {
		r.connections[client], r.connections[server] = true, true
	}
	r.mu.Unlock()
	if !same {
		return
	}
	go func() {
		io.Copy(client, server)
		client.Close()
	}()
	io.Copy(server, client)
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.connections, client)
	delete(r.connections, server)
}

// checked repeats a check while it is UNAVAILABLE, and returns its result.
func checked(t *testing.T, p *servicetest.Process, right *pb.ValidRequest) (valid bool) {
	t.Helper()
	testutil.Eventually(t, "a check completes", func() bool {
		res, err := p.Valid(t.Context(), right)
		if code := status.Code(err); code != codes.OK && code != codes.Unavailable {
			t.Errorf("Valid: got %v; want OK or UNAVAILABLE", err)
		}
		valid = res.GetValid()
		return status.Code(err) != codes.Unavailable
	})
	return valid
}

// backlog kills the primary while the next one has not applied the writes of eight codes, and checks
// these codes.
func (g *group) backlog(t *testing.T) {
	r := g.onPrimary(t, "BEFORE_ON_PRIMARY_FAILOVER")
	address := g.route(t, "%")
	stale := r.start(t, buildOnce(), address, consistency("EVENTUAL"))
	waiting := r.start(t, buildOnce(), address, consistency("BEFORE_ON_PRIMARY_FAILOVER"))
	r.sameOnAllHosts(t)

	first := g.primary()
	second := first.next()
	ctx := t.Context()
	_, err := second.db.ExecContext(ctx, "SET GLOBAL group_replication_member_weight = 100") // makes it the next primary
	g.must(err)
	lock, err := second.db.Conn(ctx)
	g.must(err)
	defer lock.Close()
	for _, statement := range []string{
		"SET group_replication_consistency = 'EVENTUAL'", // otherwise UNLOCK waits for the backlog
		"LOCK TABLES " + r.database + ".phone_numbers READ",
	} {
		_, err = lock.ExecContext(ctx, statement)
		g.must(err)
	}
	rights := r.sendCodes(t, r.processes[0])
	first.server.kill()
	testutil.Eventually(t, second.port()+" is the primary", func() bool { return g.primary() == second })

	var calling sync.WaitGroup
	for _, right := range rights {
		if checked(t, stale, right) {
			t.Error("a right code at a primary with a backlog, with EVENTUAL: got true; want false, or there is no backlog")
		}
		calling.Go(func() {
			if res, err := waiting.Valid(ctx, right); status.Code(err) != codes.Unavailable {
				t.Errorf("a right code at a primary with a backlog, with BEFORE_ON_PRIMARY_FAILOVER: got %v, %v; want UNAVAILABLE", res, err)
			}
		})
	}
	calling.Wait()
	_, err = lock.ExecContext(ctx, "UNLOCK TABLES")
	g.must(err)
	for _, right := range rights {
		if !checked(t, waiting, right) {
			t.Error("a right code after the backlog, with BEFORE_ON_PRIMARY_FAILOVER: got false; want true")
		}
	}
	first.start()
	g.waitUntilWhole()
	for p, want := range map[*servicetest.Process]bool{stale: true, waiting: false} {
		if got := strings.Contains(p.Output.String(), "this is Group Replication"); got != want {
			t.Errorf("a warning at the start: got %v; want %v", got, want)
		}
	}
}

// notJoined restarts a member outside the group, and checks codes at it that another member has.
func (g *group) notJoined(t *testing.T) {
	r := g.onMembers(t, "BEFORE")
	alone := g.members[2]
	direct := r.start(t, buildOnce(), alone.config.Addr, consistency("BEFORE"))
	alone.server.kill()
	alone.next().waitForSize(2)
	alone.start("--group-replication-start-on-boot=OFF")
	testutil.Eventually(t, alone.port()+" responds", func() bool { return alone.db.Ping() == nil })
	for _, right := range r.sendCodes(t, r.processes[0]) {
		if checked(t, direct, right) {
			t.Error("a right code at a member that has not joined: got true; want false, or it is not behind")
		}
		if res, err := r.processes[2].Valid(t.Context(), right); status.Code(err) != codes.Unavailable {
			t.Errorf("a right code behind the router of a member that has not joined: got %v, %v; want UNAVAILABLE", res, err)
		}
	}
	_, err := alone.db.Exec("START GROUP_REPLICATION")
	g.must(err)
	g.waitUntilWhole()
}

// oldPrimary disconnects the primary, and checks codes at it that the next primary has.
func (g *group) oldPrimary(t *testing.T) {
	r := g.onPrimary(t, "BEFORE_ON_PRIMARY_FAILOVER")
	old := g.primary()
	stale := r.start(t, buildOnce(), old.config.Addr, consistency("BEFORE_ON_PRIMARY_FAILOVER"))
	waiting := r.start(t, buildOnce(), old.config.Addr, consistency("BEFORE"))
	old.disconnect()
	testutil.Eventually(t, "another member is the primary", func() bool { return g.primary() != old })
	var calling sync.WaitGroup
	for _, right := range r.sendCodes(t, r.processes[0]) {
		if res, err := stale.Valid(t.Context(), right); err != nil || res.Valid {
			t.Errorf("a right code at a disconnected primary, with BEFORE_ON_PRIMARY_FAILOVER: got %v, %v; want false", res, err)
		}
		calling.Go(func() {
			if res, err := waiting.Valid(t.Context(), right); status.Code(err) != codes.Unavailable {
				t.Errorf("a right code at a disconnected primary, with BEFORE: got %v, %v; want UNAVAILABLE", res, err)
			}
		})
	}
	calling.Wait()
	old.reconnect()
	g.waitUntilWhole()
}
