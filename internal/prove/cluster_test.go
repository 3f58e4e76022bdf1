package prove

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

	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// How long callers of the other replicas may wait when a node goes away, at the
// timeouts that Galera comes with: five seconds until a silent node is suspect, and
// what it takes to agree on that.
const longestStall = 8 * time.Second

// Three replicas, each on a Galera node of its own.
func TestCluster_KeepsTheGuarantees(t *testing.T) {
	c := startCluster(t)
	t.Run("calls are linearizable", func(t *testing.T) {
		r := c.replicas(t, program())
		h := r.load().run(t)
		report(t, h)
		r.sameOnAllNodes(t)
	})
	t.Run("calls are linearizable while a node is killed and comes back", func(t *testing.T) {
		r := c.replicas(t, program())
		victim := c.nodes[0] // the one that began the cluster is like the others
		r.outlives(t, victim, func() {
			victim.server.kill()
			c.nodes[1].sees(2)
			victim.restart()
		})
	})
	t.Run("calls are linearizable while a node stands still", func(t *testing.T) {
		r := c.replicas(t, program())
		victim := c.nodes[1]
		r.outlives(t, victim, func() {
			victim.server.Signal(syscall.SIGSTOP)
			c.nodes[2].sees(2)
			victim.server.Signal(syscall.SIGCONT)
		})
	})
	t.Run("calls are linearizable while a node is cut off, which refuses them", func(t *testing.T) {
		r := c.replicas(t, program())
		victim := c.nodes[2]
		var alone, together time.Time
		h := r.outlives(t, victim, func() {
			victim.cut()
			c.nodes[0].sees(2)
			waitFor(t, "the node knows that it is alone", func() bool { return victim.status("wsrep_cluster_status") == "non-Primary" })
			alone = time.Now()
			number := fmt.Sprintf("186%08d", 99_999_999)
			_, err := r.processes[2].Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: "000000"})
			if status.Code(err) != codes.Unavailable {
				t.Errorf("Valid at the node that is alone: got %v; want UNAVAILABLE", err)
			}
			before := len(r.fake.Accepted())
			_, err = r.processes[2].SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "alone", TemplateCode: "SMS_1"})
			if status.Code(err) != codes.Unavailable {
				t.Errorf("SendSMS at the node that is alone: got %v; want UNAVAILABLE", err)
			}
			for _, m := range r.fake.Accepted()[before:] {
				if m.SignName == "alone" {
					t.Error("the node that is alone sent an SMS")
				}
			}
			together = time.Now()
			victim.mend()
		})
		for _, a := range h.answers {
			if at := h.began.Add(a.at); a.replica == 2 && at.After(alone) && at.Before(together) {
				t.Fatal("the node that was alone answered a call")
			}
		}
	})
	t.Run("nothing acknowledged is lost with a node that is killed, nor with one that is cut off", func(t *testing.T) {
		r := c.replicas(t, program())
		l := newLedger(r.fake)
		l.write(t, r.load().replicas, func() {
			l.grow(t, 100)
			c.nodes[1].server.kill()
			c.nodes[0].sees(2)
			l.grow(t, 100)
			c.nodes[1].restart()
			c.whole()
			l.grow(t, 100)
			c.nodes[2].cut()
			c.nodes[0].sees(2)
			l.grow(t, 100)
			c.nodes[2].mend()
			c.whole()
		})
		fail(t, l.lost(t, r.processes[2].Addr))
	})
	t.Run("a planted bug is caught here too", func(t *testing.T) {
		t.Setenv(failuresIn, t.TempDir()) // what is found was expected
		violations := c.replicas(t, withBug(t, "swap without version")).load().run(t).violations(t)
		if !slices.ContainsFunc(violations, func(v string) bool { return strings.Contains(v, "is Illegal") }) {
			t.Fatal("a history without version is linearizable")
		}
		t.Logf("%d violations, the first: %s", len(violations), violations[0])
	})
	t.Run("a stale node refuses a right code without wsrep_sync_wait, and not with it", c.staleReads)
}

// Replicas of the program, one a node, on a database of their own.
type replicas struct {
	*cluster
	fake      *dysmsapitest.Server
	database  string
	processes []*servicetest.Process
}

func (c *cluster) replicas(t *testing.T, binary string) *replicas {
	t.Helper()
	r := &replicas{cluster: c, fake: dysmsapitest.New(t), database: "test_" + strings.ToLower(rand.Text())}
	_, err := c.nodes[0].db.Exec("CREATE DATABASE " + r.database + " DEFAULT CHARACTER SET ascii COLLATE ascii_bin")
	c.must(err)
	for _, n := range c.nodes {
		r.processes = append(r.processes, r.start(t, binary, n, "15", "PHONENUMBER_LOG_LEVEL=error", shortSMSTimeout))
	}
	return r
}

func (r *replicas) start(t *testing.T, binary string, n *node, syncWait string, settings ...string) *servicetest.Process {
	t.Helper()
	dsn := n.config.Clone()
	dsn.DBName = r.database
	dsn.Params = map[string]string{"wsrep_sync_wait": syncWait}
	env := append(servicetest.Environment(r.fake, dsn.FormatDSN()), settings...)
	return servicetest.Start(t, binary, servicetest.FreeAddress(t), env).Serving(t)
}

func (r *replicas) load() load {
	l := load{fake: r.fake, aliyun: troubled}
	for _, p := range r.processes {
		l.replicas = append(l.replicas, p.Addr)
	}
	return l
}

// outlives loads the replicas while the victim goes away and comes back in strikes,
// and sees that the other ones' callers wait little, and that the victim's replica
// serves again.
func (r *replicas) outlives(t *testing.T, victim *node, strikes func()) *history {
	t.Helper()
	l := r.load()
	l.disturb = func() {
		l.goOn(t)
		struck := time.Now()
		strikes()
		r.whole()
		t.Logf("%s was back %.1f s after it was struck", victim.port(), time.Since(struck).Seconds())
		r.processes[victim.index].Serving(t)
		_, err := r.processes[victim.index].SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("186%08d", 99_999_998), Signature: "back", TemplateCode: "SMS_1"})
		if err != nil {
			t.Errorf("SendSMS at the replica of the node that came back: %v", err)
		}
	}
	h := l.run(t)
	report(t, h)
	r.sameOnAllNodes(t)
	others := []int{(victim.index + 1) % 3, (victim.index + 2) % 3}
	stall := h.longestStall(others...)
	t.Logf("the longest time without an answer of the other replicas: %.1f s", stall.Seconds())
	if stall > longestStall {
		t.Errorf("the other replicas answered nobody for %v; want %v at most", stall, longestStall)
	}
	return h
}

// sameOnAllNodes sees that all nodes hold the same rows.
func (r *replicas) sameOnAllNodes(t *testing.T) {
	t.Helper()
	var rows, sum [3]int64
	waitFor(t, "all nodes hold the same rows", func() bool {
		for i, n := range r.nodes {
			err := n.db.QueryRow("SELECT COUNT(*), BIT_XOR(CRC32(CONCAT(phone_number, HEX(version), HEX(state)))) FROM "+r.database+".phone_numbers").Scan(&rows[i], &sum[i])
			if err != nil {
				t.Fatal(err)
			}
		}
		return rows[0] == rows[1] && rows[1] == rows[2] && sum[0] == sum[1] && sum[1] == sum[2]
	})
}

// staleReads holds up what one node applies, as a backup does, and asks replicas
// there for codes that were sent by way of another node.
func (c *cluster) staleReads(t *testing.T) {
	r := c.replicas(t, program())
	behind := c.nodes[2]
	const warning = "this is Galera without wsrep_sync_wait"
	stale, waiting := r.start(t, program(), behind, "0"), r.start(t, program(), behind, "15")
	if out := stale.Output.String(); !strings.Contains(out, warning) {
		t.Errorf("started without wsrep_sync_wait, the service does not warn:\n%s", out)
	}
	if out := waiting.Output.String(); strings.Contains(out, warning) {
		t.Errorf("started with wsrep_sync_wait=15, the service warns:\n%s", out)
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
	var answering sync.WaitGroup
	var answered atomic.Int32
	for _, m := range r.fake.Accepted() {
		right := &pb.ValidRequest{PhoneNumber: m.PhoneNumber, Code: m.Code}
		if res, err := stale.Valid(ctx, right); err != nil || res.Valid {
			t.Errorf("the right code where the node is behind, with wsrep_sync_wait=0: got %v, %v; want false, or this proves nothing", res, err)
		}
		answering.Go(func() {
			if res, err := waiting.Valid(ctx, right); err != nil || !res.Valid {
				t.Errorf("the right code where the node was behind, with wsrep_sync_wait=15: got %v, %v; want true", res, err)
			}
			answered.Add(1)
		})
	}
	waitFor(t, "the calls with wsrep_sync_wait=15 wait at the node", func() bool {
		var reading int // two can be probes of readiness; of the calls a few read for all
		err := behind.db.QueryRow("SELECT COUNT(*) FROM information_schema.processlist WHERE info LIKE 'SELECT version%' AND db = ?", r.database).Scan(&reading)
		c.must(err)
		return reading > 2
	})
	if has, others := behind.committed(), c.nodes[0].committed(); has >= others {
		t.Errorf("the node is not behind: it has %d and the others have %d", has, others)
	}
	if n := answered.Load(); n > 0 {
		t.Errorf("%d calls with wsrep_sync_wait=15 were answered where the node was behind; want none", n)
	}
	_, err = backup.ExecContext(ctx, "UNLOCK TABLES")
	c.must(err)
	answering.Wait()
}
