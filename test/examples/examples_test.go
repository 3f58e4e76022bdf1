package examples

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", "16") // the examples mostly wait
	code := mysqltest.Run(m)
	servicetest.RemoveProgram()
	os.Exit(code)
}

// A runtime that compiles at its first call can take long between its connection and its request.
const patientServer = "PHONENUMBER_CONNECTION_TIMEOUT=30s"

func run(t *testing.T, addr string, env []string, args ...string) *servicetest.Process {
	t.Helper()
	return servicetest.Start(t, servicetest.Program(), addr, append(env, patientServer), args...).Serving(t)
}

// inbox returns the code of the only message to number in dev.
func inbox(t *testing.T, dev *servicetest.Process, number string) string {
	t.Helper()
	var messages []struct{ Code string }
	body := testutil.Get(t, dev.Addr, "/inbox.json?wait=30s&phone_number="+number, 200)
	if err := json.Unmarshal([]byte(body), &messages); err != nil || len(messages) != 1 {
		t.Fatalf("inbox: got %s, %v; want one message", body, err)
	}
	return messages[0].Code
}

func TestExamples_LogInWithDev(t *testing.T) {
	dev := run(t, servicetest.FreeAddress(t), nil, "dev")
	each(t, func(t *testing.T, p program) {
		began := time.Now()
		s := p.start(t, newNumber(), dev.Addr)
		s.sent()
		s.types("000000x")
		s.wrong()
		s.types(inbox(t, dev, s.number))
		s.welcome()
		t.Logf("%s: logged in within %v", p.name, time.Since(began).Round(100*time.Millisecond))
	})
}

// dev fails sends as Aliyun does.
func TestExamples_ExplainFailedSends(t *testing.T) {
	dev := run(t, servicetest.FreeAddress(t), []string{"PHONENUMBER_SMS_TIMEOUT=1s"}, "dev")
	each(t, func(t *testing.T, p program) {
		failing := func(kind string) *session {
			number := newNumber()
			failure := strings.NewReader(`{"kind":"` + kind + `","phone_number":"` + number + `"}`)
			q, err := http.NewRequest(http.MethodPut, "http://"+dev.Addr+"/failures.json", failure)
			if err != nil {
				t.Fatal(err)
			}
			res, err := http.DefaultClient.Do(q)
			if err != nil || res.StatusCode != http.StatusOK {
				t.Fatalf("%s: got %v, %v; want 200", kind, res, err)
			}
			res.Body.Close()
			return p.start(t, number, dev.Addr)
		}
		s := failing("limit_hour")
		s.limited(3600)
		s.ends(false)

		s = failing("illegal_number")
		s.noMobile()
		s.ends(false)

		s = p.start(t, "10086", dev.Addr)
		s.noMobile()
		s.ends(false)

		s = failing("no_balance")
		s.notSent()
		s.ends(false)

		s = failing("timeout_delivered")
		s.late()
		s.types(inbox(t, dev, s.number))
		s.welcome()
	})
}

// The port has TLS, and only a caller with a token may call. Aliyun limits a number to one SMS a
// minute, throttles requests and does not reply.
func TestExamples_HandleErrorsOfServe(t *testing.T) {
	ca := catest.New(t)
	certificate, key := ca.Issue("127.0.0.1")
	dir := t.TempDir()
	const token = "example-token"
	tls := []string{
		"PHONENUMBER_TLS_CERT=" + testutil.WriteFile(t, dir, "tls.crt", certificate),
		"PHONENUMBER_TLS_KEY=" + testutil.WriteFile(t, dir, "tls.key", key),
		"PHONENUMBER_CALLERS=" + testutil.WriteFile(t, dir, "callers.yaml", callersFile(token)),
		"PHONENUMBER_SMS_TIMEOUT=1s", patientServer,
	}
	caFile := testutil.WriteFile(t, dir, "ca.crt", ca.PEM)
	client := []string{"PHONE_NUMBER_SERVICE_CA=" + caFile, "NODE_EXTRA_CA_CERTS=" + caFile, "PHONE_NUMBER_SERVICE_TOKEN=" + token}
	each(t, func(t *testing.T, p program) {
		fake := dysmsapitest.New(t)
		tls, client := tls, client
		if p.name == "csharp/login.exe" { // its CAs are the system's
			tls, client = tls[2:], client[2:]
		}
		env := append(servicetest.Environment(fake, mysqltest.DSN(t)), tls...)
		serve := servicetest.Start(t, servicetest.Program(), servicetest.FreeAddress(t), env)
		testutil.Eventually(t, "the program listens", func() bool { return serve.Output.Contains("listening") })

		s := p.start(t, newNumber(), serve.Addr, client...)
		s.sent()
		fake.Limits(true)
		s.types("")
		s.limited(60)
		fake.Limits(false)
		throttled := dysmsapitest.Reply(http.StatusBadRequest, "Throttling.User", "Request was denied due to user flow control.")
		before := len(fake.Accepted())
		fake.Next(throttled, throttled)
		s.types("")
		s.sent() // the third try
		if got := len(fake.Accepted()) - before; got != 1 {
			t.Errorf("throttled twice: got %d SMS; want 1", got)
		}
		fake.Next(throttled, throttled, throttled)
		s.types("")
		s.notSent()
		fake.Next(dysmsapitest.Hang().ButAccepted())
		s.types("")
		s.late()
		s.types(fake.LastCode(t, s.number))
		s.welcome()

		unknown := p.start(t, newNumber(), serve.Addr, client[:len(client)-1]...)
		unknown.notSent() // has no token
		unknown.ends(false)
	})
}

// callersFile returns a callers file with one token.
func callersFile(token string) string {
	return fmt.Sprintf("callers:\n  - name: example\n    token_sha256: %x\n...\n", sha256.Sum256([]byte(token)))
}

// All examples run at once. First the database is down. Then the service is killed while Aliyun has the
// requests. Then the connections break when the checks are done.
func TestExamples_SurviveOutages(t *testing.T) {
	database, fake := mysqltest.Start(t), dysmsapitest.New(t)
	addr, metrics := servicetest.FreeAddress(t), servicetest.FreeAddress(t)
	env := append(servicetest.Environment(fake, database.DSN(mysqltest.Database)),
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_SMS_TIMEOUT=20s")
	serve := run(t, addr, env)
	programs := allAvailable(t)
	start := func(address string) (sessions []*session) {
		for _, p := range programs {
			sessions = append(sessions, p.start(t, newNumber(), address))
		}
		return sessions
	}
	welcome := func(sessions []*session) {
		for _, s := range sessions {
			s.types(fake.LastCode(t, s.number))
		}
		for _, s := range sessions {
			s.welcome()
		}
	}

	sessions := start(addr)
	for _, s := range sessions {
		s.sent()
	}
	database.Stop()
	for _, s := range sessions {
		s.types(fake.LastCode(t, s.number))
	}
	failing := start(addr)
	for i, s := range failing {
		sessions[i].notChecked()
		s.notSent()
		s.ends(false)
	}
	database.Restart()
	serve.Serving(t)
	welcome(sessions)

	before := len(fake.Accepted())
	fake.Always(dysmsapitest.Hang().ButAccepted())
	sessions = start(addr)
	testutil.Eventually(t, "all SMS are at Aliyun", func() bool { return len(fake.Accepted()) == before+len(sessions) })
	fake.Always(dysmsapitest.Delay(0))
	serve.Kill()
	run(t, addr, env) // a repeated call would arrive
	for _, s := range sessions {
		s.late()
	}
	if got := len(fake.Accepted()) - before; got != len(sessions) {
		t.Errorf("the service was killed: got %d SMS; want %d, one for each send", got, len(sessions))
	}
	welcome(sessions)

	// grpcurl makes a call only after it has read from a new connection.
	programs = slices.DeleteFunc(programs, func(p program) bool { return p.name == "shell/grpcurl.sh" })
	proxy := startProxy(t, addr)
	sessions = start(proxy.Listen)
	for _, s := range sessions {
		s.sent()
	}
	matches := verifications(t, metrics)
	if _, err := proxy.Toxics.AddToxicJson(strings.NewReader(`{"name":"deaf","type":"timeout","stream":"downstream","attributes":{"timeout":0}}`)); err != nil {
		t.Fatal(err)
	}
	for _, s := range sessions {
		s.types(fake.LastCode(t, s.number))
	}
	testutil.Eventually(t, "all checks are done", func() bool { return verifications(t, metrics) == matches+len(sessions) })
	proxy.Stop()
	proxy.Toxics.ResetToxics(context.Background())
	if err := proxy.Start(); err != nil { // a repeated call would arrive
		t.Fatal(err)
	}
	for _, s := range sessions {
		s.mayCount()
	}
	for _, s := range sessions {
		s.types(fake.LastCode(t, s.number))
		s.wrong() // the check had used the code
		s.types("")
		s.sent()
	}
	welcome(sessions)
}

// startProxy starts a proxy before the service.
func startProxy(t *testing.T, addr string) *toxiproxy.Proxy {
	t.Helper()
	proxy := toxiproxy.NewProxy(toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop()), "service", "127.0.0.1:0", addr)
	if err := proxy.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Stop)
	return proxy
}

// verifications returns how many codes the service has accepted.
func verifications(t *testing.T, metrics string) (n int) {
	t.Helper()
	for _, m := range regexp.MustCompile(`(?m)^phonenumber_verifications_total\{.*outcome="match".*\} (\d+)$`).FindAllStringSubmatch(testutil.Get(t, metrics, "/metrics", 200), -1) {
		count, _ := strconv.Atoi(m[1])
		n += count
	}
	return n
}

// A peer accepts the connection and never replies. The example's own deadline ends the call.
func TestExamples_HaveADeadline(t *testing.T) {
	hole, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hole.Close() })
	each(t, func(t *testing.T, p program) {
		began := time.Now()
		s := p.start(t, newNumber(), hole.Addr().String())
		if p.name == "shell/grpcurl.sh" { // connects before it sends
			s.notSent()
		} else {
			s.late()
		}
		if took := time.Since(began); took < 12*time.Second {
			t.Errorf("the call ended after %v; want the time that a send can take, 11 s, and more", took)
		}
	})
}

// Every example is short, and has the service config that docs/calling.md explains.
func TestExamples_AreShortAndHaveTheServiceConfig(t *testing.T) {
	spaces := regexp.MustCompile(`\s+`)
	config := testutil.ReadFile(t, filepath.Join(folder, "service-config.json"))
	want := spaces.ReplaceAllString(config, "")
	for file, hasConfig := range map[string]bool{
		"../docs/calling.md": true, "cpp/login.cc": true, "csharp/Login.cs": false, "go/main.go": true,
		"java/src/main/java/example/Login.java": true, "node/grpc.js": true, "node/fetch.js": false,
		"php/login.php": false, "python/login.py": true, "ruby/login.rb": true, "rust/src/main.rs": false,
		"shell/curl.sh": false, "shell/grpcurl.sh": false,
	} {
		text, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			t.Error(err)
		}
		if got := strings.Count(string(text), "\n"); got > 120 && !strings.HasSuffix(file, ".md") {
			t.Errorf("%s: got %d lines; want 120 at most", file, got)
		}
		if got := strings.Contains(spaces.ReplaceAllString(string(text), ""), want); got != hasConfig {
			t.Errorf("%s: has the text of service-config.json: got %t; want %t", file, got, hasConfig)
		}
	}
}
