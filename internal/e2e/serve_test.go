package e2e

import (
	"bytes"
	"database/sql"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestServe_TwoReplicasSendAndVerify(t *testing.T) {
	dsn, fake := mysqltest.DSN(t), dysmsapitest.New(t)
	one := run(t, servicetest.Environment(fake, dsn)).serving(t)
	two := run(t, servicetest.Environment(fake, dsn), "serve").serving(t)
	for range 3 {
		one.send(t, "+86 186 1234 5678")
		code := fake.LastCode(t, "18612345678")
		if got := fake.Accepted()[0].PhoneNumber; got != "18612345678" {
			t.Errorf("phone number at Aliyun: got %s; want 18612345678", got)
		}
		if two.valid(t, "18612345678", "x") {
			t.Error("a wrong code: got valid; want invalid")
		}
		if !two.valid(t, "008618612345678", code) {
			t.Error("the sent code, at the other replica: got invalid; want valid")
		}
		if one.valid(t, "18612345678", code) {
			t.Error("the used code: got valid; want invalid")
		}
		if out := one.Output.String() + two.Output.String(); strings.Contains(out, code) || strings.Contains(out, "18612345678") {
			t.Errorf("the log contains the code or the number:\n%s", out)
		}
	}

	db, err := sql.Open("mysql", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	one.send(t, "18612345678")
	var number string
	var state []byte
	if err := db.QueryRow("SELECT phone_number, state FROM phone_numbers").Scan(&number, &state); err != nil {
		t.Fatal(err)
	}
	if number != "+8618612345678" || len(state) == 0 || bytes.Contains(state, []byte(fake.LastCode(t, "18612345678"))) {
		t.Errorf("row: got number %s and %d bytes of state; want +8618612345678 and a state without the code", number, len(state))
	}
}

func TestServe_CodeSentBeforeKill9IsAccepted(t *testing.T) {
	dsn, fake := mysqltest.DSN(t), dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	fake.Next(dysmsapitest.Hang().ButAccepted())
	failed := make(chan error, 1)
	go func() {
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
		failed <- err
	}()
	testutil.Eventually(t, "the SMS is at Aliyun", func() bool { return len(fake.Accepted()) > 0 })
	p.Kill()
	if err := <-failed; err == nil {
		t.Error("the call whose replica was killed: got OK; want an error")
	}
	if p := run(t, servicetest.Environment(fake, dsn)).serving(t); !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
		t.Error("the code that reached the phone: got invalid; want valid")
	}
}

// The peer in Aliyun's place switches protocols. It then sends nothing, and does not close
// the connection.
func TestServe_SwitchedProtocolHoldsNoCall(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Always(dysmsapitest.Raw("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", "", func() {}))
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")),
		"PHONENUMBER_SMS_TIMEOUT=1s", "PHONENUMBER_MAX_CALLS=1")).serving(t)
	for _, number := range []string{"18612345678", "18612345679"} { // the second needs the slot of the first
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"})
		if status.Code(err) != codes.Unknown {
			t.Errorf("%s: got %v; want Unknown", number, err)
		}
	}
	p.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGTERM: got %v; want exit code 0", err)
	}
}

func TestServe_UnreachableProxyIsNamedInTheLog(t *testing.T) {
	fake := dysmsapitest.New(t)
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")),
		"ALIYUN_ENDPOINT=https://aliyun.invalid", "HTTPS_PROXY=http://user:hunter2@"+testutil.RefusingAddress)).serving(t)
	_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v; want Unavailable", err)
	}
	const want = `proxy: connection refused`
	testutil.Eventually(t, "the log names the proxy", func() bool { return p.Output.Contains(want) })
	if p.Output.Contains("hunter2") {
		t.Error("the log contains the proxy's password")
	}
}

func TestServe_OpenPortIsTwoWarnings(t *testing.T) {
	fake := dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
	out := p.Output.String()
	for _, want := range []string{
		"tls=off callers=unauthenticated\n", `level=WARN msg="TLS is off: `,
		`level=WARN msg="callers are not authenticated: `,
	} {
		if got := strings.Count(out, want); got != 1 {
			t.Errorf("the log of serve: got %q %d times; want once:\n%s", want, got, out)
		}
	}
	if out := run(t, nil, "dev").serving(t).Output.String(); strings.Contains(out, "TLS is off") ||
		strings.Contains(out, "not authenticated") {
		t.Errorf("dev: got a warning about its open port; want none:\n%s", out)
	}
}

func TestCORSOrigins_MatchHoweverTheyAreWritten(t *testing.T) {
	fake := dysmsapitest.New(t)
	env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), "PHONENUMBER_CORS_ORIGINS=HTTPS://App.Example.org:443, http://bücher.example:80")
	p := run(t, env).serving(t)
	for _, origin := range []string{"https://app.example.org", "http://xn--bcher-kva.example"} {
		q, err := http.NewRequest(http.MethodOptions, "http://"+p.Addr+pb.PhoneNumberService_SendSMS_FullMethodName, nil)
		if err != nil {
			t.Fatal(err)
		}
		q.Header.Set("Origin", origin)
		q.Header.Set("Access-Control-Request-Method", "POST")
		res, err := http.DefaultClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if got := res.Header.Get("Access-Control-Allow-Origin"); got != origin {
			t.Errorf("preflight from %s: got the allowed origin %q; want the same origin", origin, got)
		}
	}
}

// If PHONENUMBER_METRICS_LISTEN is set and its address is taken, the program does not start.
// If it is unset and the default address is taken, the program runs without metrics.
func TestMetricsListen_SetAddressIsRequiredDefaultIsNot(t *testing.T) {
	fake := dysmsapitest.New(t)
	env := func(more ...string) []string {
		return append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), more...)
	}
	address := servicetest.FreeAddress(t)
	p := run(t, env("PHONENUMBER_METRICS_LISTEN="+address)).serving(t)
	p.send(t, "18612345678")
	for _, want := range []string{
		"phonenumber_build_info{", "phonenumber_outcomes_pending 0", "phonenumber_database_rows",
		`go_sql_max_open_connections{db_name="codes"} 1`, "process_cpu_seconds_total", "go_goroutines",
	} {
		if body := testutil.Get(t, address, "/metrics", 200); !strings.Contains(body, want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	if out, err := command(env("PHONENUMBER_METRICS_LISTEN="+address, "PHONENUMBER_LISTEN="+servicetest.FreeAddress(t))).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("--metrics-listen (PHONENUMBER_METRICS_LISTEN)")) {
		t.Errorf("a taken address: got %v, %s; want an error that names the setting", err, out)
	}
	if taken, err := net.Listen("tcp", "127.0.0.1:9090"); err == nil {
		defer taken.Close()
	}
	unset := run(t, env()).serving(t) // its default address is taken
	if out := unset.Output.String(); !strings.Contains(out, "metrics are not served; set PHONENUMBER_METRICS_LISTEN") {
		t.Errorf("the default address is taken: the log lacks a line about it:\n%s", out)
	}
}

func TestHealthcheck_LivenessIgnoresTheDatabase(t *testing.T) {
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, server.DSN(mysqltest.Database))).serving(t)
	succeeds := func(args ...string) bool {
		return command(nil, slices.Concat([]string{"healthcheck", "--address", p.Addr}, args)...).Run() == nil
	}
	server.Stop()
	testutil.Eventually(t, "not ready without the database", func() bool { return !succeeds() })
	if !succeeds("--liveness") {
		t.Error("liveness without the database: got a failure; want success, since a restart would not help")
	}
}

// TestServe_SendsARealSMS sends one real SMS to TEST_REAL_SMS_NUMBER, with
// TEST_REAL_SMS_SIGN_NAME, TEST_REAL_SMS_TEMPLATE_CODE and the usual credentials.
// It checks only that Aliyun accepts the SMS. Check by eye that the phone receives it.
func TestServe_SendsARealSMS(t *testing.T) {
	number := os.Getenv("TEST_REAL_SMS_NUMBER")
	if number == "" {
		t.Skip("costs money: set TEST_REAL_SMS_NUMBER, TEST_REAL_SMS_SIGN_NAME, TEST_REAL_SMS_TEMPLATE_CODE, ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_SECRET")
	}
	p := run(t, []string{
		"DATA_SOURCE_NAME=sqlite:" + filepath.Join(t.TempDir(), "codes.db"),
		"ALIYUN_ACCESS_KEY_ID=" + os.Getenv("ALIYUN_ACCESS_KEY_ID"), "ALIYUN_ACCESS_KEY_SECRET=" + os.Getenv("ALIYUN_ACCESS_KEY_SECRET"),
	}).serving(t)
	_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{
		PhoneNumber: number, Signature: os.Getenv("TEST_REAL_SMS_SIGN_NAME"), TemplateCode: os.Getenv("TEST_REAL_SMS_TEMPLATE_CODE"),
	})
	if err != nil {
		t.Fatalf("SendSMS: %v", status.Convert(err).Proto())
	}
}
