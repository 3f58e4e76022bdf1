package examples

import (
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

// Three replicas stop and start again in turn, twice. Meanwhile one process of each example with the
// service config sends code after code and checks each.
func TestExamples_LoseNoCallInARollingRestart(t *testing.T) {
	fake, dsn := dysmsapitest.New(t), mysqltest.DSN(t)
	fake.Always(dysmsapitest.Delay(200 * time.Millisecond)) // so that calls are in flight when a replica stops
	_, port, _ := net.SplitHostPort(servicetest.FreeAddress(t))
	// A number has eight idempotency keys at most, and they end with the lifetime of a code.
	env := append(servicetest.Environment(fake, dsn), "PHONENUMBER_DRAIN_DELAY=1s", "PHONENUMBER_CODE_TTL=1s")
	var addresses []string
	var replicas []*servicetest.Process
	for _, ip := range replicaIPs {
		addresses = append(addresses, ip+":"+port)
		replicas = append(replicas, run(t, ip+":"+port, env))
	}
	ipv4 := "ipv4:" + strings.Join(addresses, ",")
	hosts := testutil.WriteFile(t, t.TempDir(), "hosts", strings.Join(replicaIPs, " replicas.test\n")+" replicas.test\n")
	targets := map[string]string{
		"go": "dns://" + startDNS(t) + "/replicas.test:" + port, "java/example.Login": "dns:///replicas.test:" + port,
		"cpp/login": ipv4, "node/grpc.js": ipv4, "python/login.py": ipv4, "ruby/login.rb": ipv4,
	}

	var running, restarted atomic.Int32
	programs := slices.DeleteFunc(allAvailable(t), func(p program) bool { return targets[p.name] == "" })
	go func() {
		defer restarted.Store(1)
		testutil.Eventually(t, "all examples call", func() bool { return int(running.Load()) == len(programs) || t.Failed() })
		for i := range 2 * len(replicas) {
			old := replicas[i%len(replicas)]
			old.Signal(syscall.SIGTERM)
			if err := old.Wait(); err != nil {
				t.Errorf("replica %d: exit after SIGTERM: got %v; want nil", i%len(replicas), err)
			}
			replicas[i%len(replicas)] = run(t, old.Addr, env)
		}
	}()
	t.Run("calls", func(t *testing.T) {
		for _, p := range programs {
			t.Run(p.name, func(t *testing.T) {
				t.Parallel()
				s := p.start(t, newNumber(), targets[p.name], "JAVA_TOOL_OPTIONS=-Djdk.net.hosts.file="+hosts)
				s.sent()
				running.Add(1)
				sends := 1
				for ; restarted.Load() == 0; sends++ {
					s.types("000000x")
					s.wrong()
					s.types("")
					s.sent()
				}
				got := 0
				for _, m := range fake.Accepted() {
					if m.PhoneNumber == s.number {
						got++
					}
				}
				t.Logf("%d sends and %d checks", sends, sends)
				if got != sends {
					t.Errorf("%d sends: got %d SMS; want one for each", sends, got)
				}
			})
		}
	})
}

var replicaIPs = []string{"127.0.0.2", "127.0.0.3", "127.0.0.4"}

// startDNS starts a DNS server that resolves every name to the replicas, and returns its address.
func startDNS(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		query := make([]byte, 512)
		for {
			n, peer, err := conn.ReadFrom(query)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(query[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.Additionals = true, nil
			for _, ip := range replicaIPs {
				if m.Questions[0].Type == dnsmessage.TypeA {
					m.Answers = append(m.Answers, dnsmessage.Resource{
						Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 1},
						Body:   &dnsmessage.AResource{A: [4]byte(net.ParseIP(ip).To4())},
					})
				}
			}
			if reply, err := m.Pack(); err == nil {
				conn.WriteTo(reply, peer)
			}
		}
	}()
	return conn.LocalAddr().String()
}
