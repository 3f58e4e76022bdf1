package consistency

import (
	"crypto/rand"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A cluster is three database servers that replicate the same data.
type cluster struct {
	*network
	writer         func() *sql.DB // returns a server that accepts writes
	waitUntilWhole func()         // waits until all servers are up to date
}

// replicas are replicas of the program, with one new database of a cluster.
type replicas struct {
	*cluster
	fake      *dysmsapitest.Server
	database  string
	processes []*servicetest.Process
}

// replicas starts a replica for each address of a server or a router, with parameters of the data
// source name.
func (c *cluster) replicas(t *testing.T, program string, addresses []string, parameters map[string]string) *replicas {
	t.Helper()
	r := &replicas{cluster: c, fake: dysmsapitest.New(t), database: "test_" + strings.ToLower(rand.Text())}
	for _, statement := range []string{
		"CREATE DATABASE %[1]s DEFAULT CHARACTER SET ascii COLLATE ascii_bin",
		"CREATE USER %[1]s@'%%' IDENTIFIED BY '%[1]s'", // who cannot write to a read-only server
		"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON %[1]s.* TO %[1]s@'%%'",
	} {
		_, err := c.writer().Exec(fmt.Sprintf(statement, r.database))
		c.must(err)
	}
	for _, address := range addresses {
		r.processes = append(r.processes, r.start(t, program, address, parameters, "PHONENUMBER_LOG_LEVEL=error", shortSMSTimeout))
	}
	return r
}

// start starts a replica.
func (r *replicas) start(t *testing.T, program, address string, parameters map[string]string, settings ...string) *servicetest.Process {
	t.Helper()
	dsn := r.hosts[0].config.Clone()
	dsn.User, dsn.Passwd, dsn.Addr, dsn.DBName, dsn.Params = r.database, r.database, address, r.database, parameters
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

// sendCodes sends codes to eight numbers over a replica, and returns the calls with these codes.
func (r *replicas) sendCodes(t *testing.T, p *servicetest.Process) (right []*pb.ValidRequest) {
	t.Helper()
	for i := range 8 {
		request := &pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("186%08d", i), Signature: "Acme", TemplateCode: "SMS_1"}
		testutil.Eventually(t, "a send succeeds", func() bool { _, err := p.SendSMS(t.Context(), request); return err == nil })
		all := r.fake.Accepted()
		right = append(right, &pb.ValidRequest{PhoneNumber: request.PhoneNumber, Code: all[len(all)-1].Code})
	}
	return right
}

// survives runs a load while inject makes a server fail and recover. It checks the history, that
// callers of the other replicas wait at most maxStall, and that all replicas work afterwards.
func (r *replicas) survives(t *testing.T, maxStall time.Duration, others []int, inject func()) *history {
	t.Helper()
	l := r.load()
	var began time.Time
	l.disturb = func() {
		l.waitForProgress(t)
		began = time.Now()
		inject()
		l.waitForProgress(t)
	}
	h := l.run(t)
	r.waitUntilWhole()
	t.Logf("all servers were up to date %.1f s after the fault began", time.Since(began).Seconds())
	for _, p := range r.processes {
		p.Serving(t)
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18699999998", Signature: "back", TemplateCode: "SMS_1"})
		if err != nil {
			t.Errorf("SendSMS after the fault: got %v; want nil", err)
		}
	}
	report(t, h)
	r.sameOnAllHosts(t)
	stall := h.longestStall(others...)
	t.Logf("the longest time without a completed call on the other replicas: %.1f s", stall.Seconds())
	if stall > maxStall {
		t.Errorf("the other replicas: got no completed call for %v; want %v at most", stall, maxStall)
	}
	return h
}

// sameOnAllHosts waits until all servers have the same rows.
func (r *replicas) sameOnAllHosts(t *testing.T) {
	t.Helper()
	var rows, sum [3]int64
	testutil.Eventually(t, "all servers have the same rows", func() bool {
		for i, h := range r.hosts {
			err := h.db.QueryRow("SELECT COUNT(*), BIT_XOR(CRC32(CONCAT(phone_number, HEX(version), HEX(state)))) FROM "+r.database+".phone_numbers").Scan(&rows[i], &sum[i])
			if err != nil {
				t.Fatal(err)
			}
		}
		return rows[0] == rows[1] && rows[1] == rows[2] && sum[0] == sum[1] && sum[1] == sum[2]
	})
}

// requireIllegal fails unless a history is not linearizable.
func requireIllegal(t *testing.T, h *history) {
	t.Helper()
	violations := h.violations(t)
	if !slices.ContainsFunc(violations, func(v string) bool { return strings.Contains(v, "is Illegal") }) {
		t.Fatal("the histories: got none that is not linearizable; want one")
	}
	t.Logf("%d violations, the first: %s", len(violations), violations[0])
}
