package consistency

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// maxStall is how long callers of the other replicas may wait if a node fails, with Galera's
// default timeouts: a silent node is suspected after five seconds, and then the others agree on
// that.
const maxStall = 8 * time.Second

// The test has three replicas, each on its own Galera node.
func TestCluster_KeepsTheGuarantees(t *testing.T) {
	c := startCluster(t)
	t.Run("calls are linearizable", func(t *testing.T) {
		r := c.replicas(t, buildOnce())
		h := r.load().run(t)
		report(t, h)
		r.sameOnAllNodes(t)
	})
	t.Run("calls are linearizable while a node is killed and comes back", func(t *testing.T) {
		r := c.replicas(t, buildOnce())
		victim := c.nodes[0] // the node that began the cluster
		r.survives(t, victim, func() {
			victim.server.kill()
			c.nodes[1].waitForSize(2)
			victim.restart()
		})
	})
	t.Run("calls are linearizable while a node is frozen", func(t *testing.T) {
		r := c.replicas(t, buildOnce())
		victim := c.nodes[1]
		r.survives(t, victim, func() {
			victim.server.Signal(syscall.SIGSTOP)
			c.nodes[2].waitForSize(2)
			victim.server.Signal(syscall.SIGCONT)
		})
	})
	t.Run("calls are linearizable while a node is disconnected, which rejects calls", func(t *testing.T) {
		r := c.replicas(t, buildOnce())
		victim := c.nodes[2]
		var from, to time.Time
		h := r.survives(t, victim, func() {
			victim.disconnect()
			c.nodes[0].waitForSize(2)
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
		r := c.replicas(t, buildOnce())
		l := newLedger(r.fake)
		l.write(t, r.load().replicas, func() {
			l.grow(t, 100)
			c.nodes[1].server.kill()
			c.nodes[0].waitForSize(2)
			l.grow(t, 100)
			c.nodes[1].restart()
			c.waitUntilWhole()
			l.grow(t, 100)
			c.nodes[2].disconnect()
			c.nodes[0].waitForSize(2)
			l.grow(t, 100)
			c.nodes[2].reconnect()
			c.waitUntilWhole()
		})
		reportFirst(t, l.lost(t, r.processes[2].Addr))
	})
	t.Run("a planted bug is found", func(t *testing.T) {
		t.Setenv(failuresIn, t.TempDir()) // these failures are expected
		violations := c.replicas(t, withBug(t, "swap without version")).load().run(t).violations(t)
		if !slices.ContainsFunc(violations, func(v string) bool { return strings.Contains(v, "is Illegal") }) {
			t.Fatal("histories of swaps without version: got none that is not linearizable; want one")
		}
		t.Logf("%d violations, the first: %s", len(violations), violations[0])
	})
	t.Run("a stale node rejects a right code without wsrep_sync_wait, and accepts it with it", c.staleReads)
}

// replicas are replicas of the program, one on each node, with one new database.
type replicas struct {
	*cluster
	fake      *dysmsapitest.Server
	database  string
	processes []*servicetest.Process
}

func (c *cluster) replicas(t *testing.T, program string) *replicas {
	t.Helper()
	r := &replicas{cluster: c, fake: dysmsapitest.New(t), database: "test_" + strings.ToLower(rand.Text())}
	_, err := c.nodes[0].db.Exec("CREATE DATABASE " + r.database + " DEFAULT CHARACTER SET ascii COLLATE ascii_bin")
	c.must(err)
	for _, n := range c.nodes {
		r.processes = append(r.processes, r.start(t, program, n, "15", "PHONENUMBER_LOG_LEVEL=error", shortSMSTimeout))
	}
	return r
}

func (r *replicas) start(t *testing.T, program string, n *node, syncWait string, settings ...string) *servicetest.Process {
	t.Helper()
	dsn := n.config.Clone()
	dsn.DBName = r.database
	dsn.Params = map[string]string{"wsrep_sync_wait": syncWait}
	env := append(servicetest.Environment(r.fake, dsn.FormatDSN()), settings...)
	return servicetest.Start(t, program, servicetest.FreeAddress(t), env).Serving(t)
}

func (r *replicas) load() load {
	l := load{fake: r.fake, aliyun: faultyAliyun}
	for _, p := range r.processes {
		l.replicas = append(l.replicas, p.Addr)
	}
	return l
}

// survives runs a load while inject makes the victim fail and recover. It checks the history, that
// callers of the other replicas wait at most maxStall, and that the victim's replica works again.
func (r *replicas) survives(t *testing.T, victim *node, inject func()) *history {
	t.Helper()
	l := r.load()
	l.disturb = func() {
		l.waitForProgress(t)
		began := time.Now()
		inject()
		r.waitUntilWhole()
		t.Logf("%s was back %.1f s after the fault began", victim.port(), time.Since(began).Seconds())
		r.processes[victim.index].Serving(t)
		_, err := r.processes[victim.index].SendSMS(t.Context(),
			&pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("186%08d", 99_999_998), Signature: "back", TemplateCode: "SMS_1"})
		if err != nil {
			t.Errorf("SendSMS at the replica of the recovered node: got %v; want nil", err)
		}
	}
	h := l.run(t)
	report(t, h)
	r.sameOnAllNodes(t)
	others := []int{(victim.index + 1) % 3, (victim.index + 2) % 3}
	stall := h.longestStall(others...)
	t.Logf("the longest time without a completed call on the other replicas: %.1f s", stall.Seconds())
	if stall > maxStall {
		t.Errorf("the other replicas: got no completed call for %v; want %v at most", stall, maxStall)
	}
	return h
}

// sameOnAllNodes waits until all nodes have the same rows.
func (r *replicas) sameOnAllNodes(t *testing.T) {
	t.Helper()
	var rows, sum [3]int64
	testutil.Eventually(t, "all nodes have the same rows", func() bool {
		for i, n := range r.nodes {
			err := n.db.QueryRow("SELECT COUNT(*), BIT_XOR(CRC32(CONCAT(phone_number, HEX(version), HEX(state)))) FROM "+r.database+".phone_numbers").Scan(&rows[i], &sum[i])
			if err != nil {
				t.Fatal(err)
			}
		}
		return rows[0] == rows[1] && rows[1] == rows[2] && sum[0] == sum[1] && sum[1] == sum[2]
	})
}

// staleReads blocks one node from applying writes, as a backup does, and checks codes on its
// replicas that were sent over another node.
func (c *cluster) staleReads(t *testing.T) {
	r := c.replicas(t, buildOnce())
	behind := c.nodes[2]
	const warning = "this is Galera without wsrep_sync_wait"
	stale, waiting := r.start(t, buildOnce(), behind, "0"), r.start(t, buildOnce(), behind, "15")
	if out := stale.Output.String(); !strings.Contains(out, warning) {
		t.Errorf("without wsrep_sync_wait: want a warning at the start, got:\n%s", out)
	}
	if out := waiting.Output.String(); strings.Contains(out, warning) {
		t.Errorf("with wsrep_sync_wait=15: want no warning at the start, got:\n%s", out)
	}

	ctx := t.Context()
	backup, err := behind.db.Conn(ctx)
	c.must(err)
	defer backup.Close()
	_, err = backup.ExecContext(ctx, "FLUSH TABLES WITH READ LOCK")
	c.must(err)
	const users = 8
	for i := range users {
		_, err = r.processes[0].SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("186%08d", i), Signature: "Acme", TemplateCode: "SMS_1"})
		c.must(err)
	}
	var calling sync.WaitGroup
	var completed atomic.Int32
	for _, m := range r.fake.Accepted() {
		right := &pb.ValidRequest{PhoneNumber: m.PhoneNumber, Code: m.Code}
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
		c.must(err)
		return reading > 2
	})
	if has, others := behind.committed(), c.nodes[0].committed(); has >= others {
		t.Errorf("the stale node: got transaction %d, the others %d; want it behind", has, others)
	}
	if n := completed.Load(); n > 0 {
		t.Errorf("got %d completed calls with wsrep_sync_wait=15 at the stale node; want none", n)
	}
	_, err = backup.ExecContext(ctx, "UNLOCK TABLES")
	c.must(err)
	calling.Wait()
}
