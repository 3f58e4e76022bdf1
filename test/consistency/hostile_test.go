package consistency

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// Limits for the process's memory during an attack, and the good client's calls. The latency of these
// depends on the machine, so the test reports it and fails at a real client's deadline only.
const (
	attackDuration   = 6 * time.Second
	goodCallInterval = 20 * time.Millisecond
	maxMemory        = 120 << 20
	// Nearly as many connections as may be open also take memory: half of the limit in deploy/.
	maxMemoryOfConnections = 256 << 20
	// As in deploy/, the service collects garbage before it needs more. The rest is in use.
	memoryLimit     = "192MiB"
	goodCallTimeout = 10 * time.Second
)

var attacks = []struct {
	name      string
	attack    func(ctx context.Context, addr string) (summary string)
	maxMemory int // bytes
}{
	{"rapid reset", rapidReset, maxMemory},
	{"silent connections", silentConnections, maxMemory},
	{"slow loris", slowLoris, maxMemory},
	{"header bombs", headerBombs, maxMemory},
	{"message bombs", messageBombs, maxMemory},
	{"connections opened and dropped", openedAndDropped, maxMemory},
	{"garbage before the preface", garbage, maxMemory},
	{"gRPC-Web nonsense", webNonsense, maxMemory},
	{"frame floods", frameFloods, maxMemory},
	// Last, since the runtime returns their memory only after minutes.
	{"unread replies", unreadReplies, maxMemoryOfConnections},
	{"half-open calls", halfOpenCalls, maxMemoryOfConnections},
	{"half-open calls after health checks", halfOpenAfterHealthChecks, maxMemoryOfConnections},
}

// attackVariable has the name of an attack, if this process is the attacker. The good client is another
// process, as it would be: in one process, the attack would take the client's own time.
const attackVariable = "ATTACK"

// attack makes the attack that attackVariable names, and prints its summary.
func attack() {
	ctx, cancel := context.WithTimeout(context.Background(), attackDuration)
	defer cancel()
	for _, a := range attacks {
		if a.name == os.Getenv(attackVariable) {
			fmt.Print(a.attack(ctx, os.Getenv("ATTACKED")))
		}
	}
}

func TestHostilePeer_CostsAGoodClientNothing(t *testing.T) {
	fake := dysmsapitest.New(t)
	metrics := servicetest.FreeAddress(t)
	p := servicetest.Start(t, buildOnce(), servicetest.FreeAddress(t), append(servicetest.Environment(fake, mysqltest.DSN(t)),
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_IDLE_TIMEOUT=2s", "GOMEMLIMIT="+memoryLimit)).Serving(t)
	gauge := func(name string) float64 { return scrapeGauge(t, metrics, name) }
	good := startGoodClient(t, p.Addr)
	testutil.Eventually(t, "the good client has made 50 calls", func() bool { return good.calls.Load() > 50 })
	good.take()
	idle := gauge("go_goroutines")
	t.Logf("idle: %.0f goroutines, %.1f MB", idle, gauge("process_resident_memory_bytes")/(1<<20))
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			var mostGoroutines, mostBytes float64
			watching := make(chan struct{})
			go func() {
				defer close(watching)
				for ctx.Err() == nil {
					mostGoroutines = max(mostGoroutines, gauge("go_goroutines"))
					mostBytes = max(mostBytes, gauge("process_resident_memory_bytes"))
					time.Sleep(100 * time.Millisecond)
				}
			}()
			attacker := exec.CommandContext(t.Context(), os.Args[0])
			attacker.Env = append(os.Environ(), attackVariable+"="+a.name, "ATTACKED="+p.Addr)
			summary, err := attacker.Output()
			if err != nil {
				t.Errorf("%s: the attacker: got %v; want success", a.name, err)
			}
			cancel()
			<-watching
			calls, failures, p99, longest := good.take()
			t.Logf("%s: %s. The good client: %d calls, %d failed, p99 %v, longest %v; at most %.0f goroutines, %.1f MB",
				a.name, summary, calls, len(failures), p99.Round(time.Millisecond), longest.Round(time.Millisecond), mostGoroutines, mostBytes/(1<<20))
			if len(failures) > 0 {
				t.Errorf("%s: got %d failed calls of the good client, the first with %v; want none", a.name, len(failures), failures[0])
			}
			if calls < 50 {
				t.Errorf("%s: got %d calls of the good client; want 50 at least", a.name, calls)
			}
			if mostBytes > float64(a.maxMemory) {
				t.Errorf("%s: got %.1f MB of memory; want %d at most", a.name, mostBytes/(1<<20), a.maxMemory>>20)
			}
			start := time.Now()
			testutil.Eventually(t, "goroutines are back to the idle number after "+a.name, func() bool { return gauge("go_goroutines") <= idle+10 })
			t.Logf("%s: idle again after %v", a.name, time.Since(start).Round(time.Millisecond))
			good.take()
		})
	}
	if log := p.Output.String(); strings.Contains(log, "panic") {
		t.Errorf("got a panic in the log; want none:\n%s", log)
	}
}

// scrapeGauge returns the value of a metric without labels.
func scrapeGauge(t *testing.T, addr, name string) float64 {
	res, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Error(err)
		return 0
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Error(err)
		return 0
	}
	found := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindSubmatch(body)
	if found == nil {
		t.Errorf("got metrics without %s", name)
		return 0
	}
	value, err := strconv.ParseFloat(string(found[1]), 64)
	if err != nil {
		t.Error(err)
	}
	return value
}

// A goodClient makes calls at a steady rate, and does not wait for the previous ones.
type goodClient struct {
	calls    atomic.Int64
	mu       sync.Mutex
	took     []time.Duration
	failures []error
}

func startGoodClient(t *testing.T, addr string) *goodClient {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	client, g := pb.NewPhoneNumberServiceClient(conn), &goodClient{}
	stop := make(chan struct{})
	var calling sync.WaitGroup
	calling.Go(func() {
		tick := time.NewTicker(goodCallInterval)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			number := fmt.Sprintf("186%08d", i%1000)
			calling.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), goodCallTimeout)
				defer cancel()
				start := time.Now()
				var err error
				if i%2 == 0 {
					_, err = client.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"})
				} else {
					_, err = client.Valid(ctx, &pb.ValidRequest{PhoneNumber: number, Code: "000000"})
				}
				g.calls.Add(1)
				g.mu.Lock()
				defer g.mu.Unlock()
				g.took = append(g.took, time.Since(start))
				if err != nil {
					g.failures = append(g.failures, err)
				}
			})
		}
	})
	t.Cleanup(func() {
		close(stop)
		calling.Wait()
		conn.Close()
	})
	return g
}

// take returns the results since its last call.
func (g *goodClient) take() (calls int, failures []error, p99, longest time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	took := g.took
	failures = g.failures
	g.took, g.failures = nil, nil
	if len(took) == 0 {
		return 0, failures, 0, 0
	}
	slices.Sort(took)
	return len(took), failures, took[len(took)*99/100], took[len(took)-1]
}
