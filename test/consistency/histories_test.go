package consistency

import (
	"database/sql"
	"errors"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/go-sql-driver/mysql"
	"github.com/rs/zerolog"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

// A pair is two replicas on one database, and a fake gateway that records the codes.
type pair struct {
	fake     *dysmsapitest.Server
	replicas [2]*servicetest.Process
	start    func(address string) *servicetest.Process
}

func startPair(t *testing.T, program, dsn string, settings ...string) *pair {
	t.Helper()
	p := &pair{fake: dysmsapitest.New(t)}
	env := append(servicetest.Environment(p.fake, dsn), "PHONENUMBER_LOG_LEVEL=error")
	env = append(env, settings...)
	p.start = func(address string) *servicetest.Process { return servicetest.Start(t, program, address, env) }
	for i := range p.replicas {
		p.replicas[i] = p.start(servicetest.FreeAddress(t)).Serving(t)
	}
	return p
}

func (p *pair) load() load {
	return load{fake: p.fake, replicas: []string{p.replicas[0].Addr, p.replicas[1].Addr}}
}

func TestLinearizable_Undisturbed(t *testing.T) { testGuarantee(t, undisturbed) }

func undisturbed(t *testing.T, program string) []string {
	h := startPair(t, program, mysqltest.DSN(t)).load().run(t)
	if n := h.failures.Load(); n > 0 {
		h.violated("%d calls failed without a fault", n)
	}
	return h.violations(t)
}

// faultyAliyun returns one of Aliyun's faults, active in one of three calls.
func faultyAliyun(r *rand.Rand) aliyunFault {
	faults := []dysmsapitest.Fault{
		dysmsapitest.Hang(), dysmsapitest.Hang().ButAccepted(),
		dysmsapitest.CloseAfterReading(), dysmsapitest.CloseAfterReading().ButAccepted(),
		dysmsapitest.Truncated().ButAccepted(), dysmsapitest.BadGateway(), dysmsapitest.BadGateway().ButAccepted(),
		dysmsapitest.Reply(500, "isp.SYSTEM_ERROR", "").ButAccepted(),
		dysmsapitest.OKWithoutBizID().ButAccepted(),
		dysmsapitest.Redirect(307, "/").ButAccepted(),
		dysmsapitest.Reply(200, "isv.BUSINESS_LIMIT_CONTROL", "触发小时级流控Permits:5"),
		dysmsapitest.Reply(200, "isv.AMOUNT_NOT_ENOUGH", ""),
		dysmsapitest.Reply(400, "Throttling.User", ""),
	}
	return aliyunFault{r.IntN(3) == 0, faults[r.IntN(len(faults))]}
}

const shortSMSTimeout = "PHONENUMBER_SMS_TIMEOUT=200ms" // keeps hanging calls short

func TestLinearizable_WhileAliyunFails(t *testing.T) { testGuarantee(t, aliyunFails) }

func aliyunFails(t *testing.T, program string) []string {
	l := startPair(t, program, mysqltest.DSN(t), shortSMSTimeout).load()
	l.aliyun = faultyAliyun
	return l.run(t).violations(t)
}

func TestLinearizable_WhileReplicasAreKilled(t *testing.T) {
	p := startPair(t, buildOnce(), mysqltest.DSN(t), shortSMSTimeout)
	l := p.load()
	l.aliyun = faultyAliyun
	l.disturb = func() {
		for i := range 8 {
			l.waitForProgress(t)
			p.replicas[i%2].Kill()
			p.replicas[i%2] = p.start(p.replicas[i%2].Addr).Serving(t)
		}
	}
	report(t, l.run(t))
}

func TestLinearizable_WhileTheDatabaseIsKilled(t *testing.T) {
	database := mysqltest.Start(t)
	l := startPair(t, buildOnce(), database.DSN(mysqltest.Database), shortSMSTimeout).load()
	l.aliyun = faultyAliyun
	l.disturb = func() {
		for range 5 {
			l.waitForProgress(t)
			database.Kill()
			database.Restart()
		}
	}
	report(t, l.run(t))
}

func TestLinearizable_OverABadNetworkToTheDatabase(t *testing.T) {
	for _, fault := range []struct {
		name, toxic string
		cuts        bool
	}{
		{"latency", `{"type":"latency","attributes":{"latency":100,"jitter":80}}`, false},
		{"reset_peer", `{"type":"reset_peer","attributes":{"timeout":20}}`, true},
		{"timeout up", `{"type":"timeout","stream":"upstream","attributes":{"timeout":50}}`, true},
		{"timeout down", `{"type":"timeout","stream":"downstream","attributes":{"timeout":50}}`, true},
		{"limit_data", `{"type":"limit_data","attributes":{"bytes":1000}}`, true},
		{"slicer", `{"type":"slicer","attributes":{"average_size":16,"size_variation":8,"delay":200}}`, false},
		{"down and up", "", true},
	} {
		t.Run(fault.name, func(t *testing.T) {
			direct := mysqltest.DSN(t)
			proxy, dsn := startProxy(t, direct)
			l := startPair(t, buildOnce(), dsn, shortSMSTimeout).load()
			l.aliyun = faultyAliyun
			before, counted := connectionsCut(t, direct)
			l.disturb = func() {
				for range 5 {
					l.waitForProgress(t)
					if fault.toxic == "" {
						proxy.Stop()
					} else if _, err := proxy.Toxics.AddToxicJson(strings.NewReader(fault.toxic)); err != nil {
						t.Fatal(err)
					}
					time.Sleep(300 * time.Millisecond) // duration of the fault
					if fault.toxic != "" {
						proxy.Toxics.ResetToxics(t.Context())
					} else if err := proxy.Start(); err != nil {
						t.Fatal(err)
					}
				}
			}
			h := l.run(t)
			if counted {
				after, _ := connectionsCut(t, direct)
				cut := after - before
				t.Logf("%d connections were cut", cut)
				if cut < 10 && fault.cuts {
					t.Errorf("got %d cut connections; want 10 at least for a useful test", cut)
				}
			}
			report(t, h)
		})
	}
}

// connectionsCut returns the number of connections that the server lost. Not every engine counts them.
func connectionsCut(t *testing.T, dsn string) (n int, counted bool) {
	t.Helper()
	db, err := sql.Open("mysql", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	return serverStatus(t, db, "Aborted_clients")
}

// serverStatus returns a counter of the server. counted is false if the engine does not have it.
func serverStatus(t *testing.T, db *sql.DB, name string) (n int, counted bool) {
	t.Helper()
	err := db.QueryRow("SHOW GLOBAL STATUS LIKE '"+name+"'").Scan(&name, &n)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		t.Fatal(err)
	}
	return n, err == nil
}

// startProxy starts a proxy before the database, and returns it with the data source name that
// uses it.
func startProxy(t *testing.T, dsn string) (*toxiproxy.Proxy, string) {
	t.Helper()
	config, err := mysql.ParseDSN(dsn)
	if err != nil {
		t.Fatal(err)
	}
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	proxy := toxiproxy.NewProxy(server, "database", "127.0.0.1:0", config.Addr)
	if err := proxy.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Stop)
	config.Addr = proxy.Listen
	if config.TLSConfig == "true" {
		config.TLSConfig = "skip-verify" // the certificate has the name of the server
	}
	return proxy, config.FormatDSN()
}

func TestRollingRestart_FailsNoCall(t *testing.T) {
	p := startPair(t, buildOnce(), mysqltest.DSN(t), "PHONENUMBER_DRAIN_DELAY=2s", "PHONENUMBER_LOG_LEVEL=info")
	l := p.load()
	l.together, l.flawless = true, true
	l.disturb = func() {
		for i := range 4 {
			old := p.replicas[i%2]
			old.Signal(syscall.SIGTERM)
			if err := old.Wait(); err != nil {
				t.Errorf("exit after SIGTERM: got %v; want nil", err)
			}
			p.replicas[i%2] = p.start(old.Addr).Serving(t)
			testutil.Eventually(t, "the client has connected again", func() bool { return p.replicas[i%2].Output.Contains("msg=call") })
		}
	}
	report(t, l.run(t))
}

// report fails t for each violation of h.
func report(t *testing.T, h *history) {
	t.Helper()
	for _, v := range h.violations(t) {
		t.Error(v)
	}
}
