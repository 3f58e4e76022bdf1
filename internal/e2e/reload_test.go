package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const (
	callersRejected = "failed to reload callers; keeping the previous version"
	secretsRejected = "failed to reload secrets; keeping the previous version"
)

func TestReload_SecretsNeedNoRestart(t *testing.T) {
	t.Parallel()
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	mysqltest.Exec(t, admin, "CREATE USER phone@'%' IDENTIFIED BY 'old'",
		"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON "+mysqltest.Database+".* TO phone@'%'")
	as := func(password, database string) string {
		return mysqltest.As(server.DSN(database), "phone:"+password)
	}
	dir := t.TempDir()
	env := append(write(t, dir, map[string]string{
		"DATA_SOURCE_NAME": as("old", mysqltest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID,
		"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
	}), "ALIYUN_ENDPOINT="+fake.URL, "PHONENUMBER_DRAIN_DELAY=0s")
	p := run(t, env).serving(t)
	p.send(t, "18612345678")
	before := fake.LastCode(t, "18612345678")

	reloaded := p.logged(`reloaded secrets" names="ALIYUN_ACCESS_KEY_ID ALIYUN_ACCESS_KEY_SECRET DATA_SOURCE_NAME"`)
	mysqltest.Exec(t, admin, "ALTER USER phone@'%' IDENTIFIED BY 'new'")
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tAnotherKey", "AnotherSecret0123456789"
	write(t, dir, map[string]string{
		"DATA_SOURCE_NAME": as("new", mysqltest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID,
		"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
	})
	testutil.Eventually(t, "the new secrets are in use", reloaded)
	for _, id := range server.Connections(t, "phone") { // new connections need the new password
		admin.Exec("KILL CONNECTION " + id)
	}
	testutil.Eventually(t, "a call succeeds with the new password", func() bool {
		_, err := p.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "x"})
		return err == nil
	})
	p.send(t, "18612345679")
	if !p.valid(t, "18612345679", fake.LastCode(t, "18612345679")) {
		t.Error("a code sent after the change: got invalid; want valid")
	}
	if !p.valid(t, "18612345678", before) { // its key was derived from the old secret
		t.Error("a code sent before the change: got invalid; want valid")
	}
	newReplica := run(t, env).serving(t)
	p.send(t, "18612345670")
	if !newReplica.valid(t, "18612345670", fake.LastCode(t, "18612345670")) {
		t.Error("the code at a replica started after the change: got invalid; want valid")
	}

	reloaded = p.logged("reloaded secrets")
	p.send(t, "18612345672")
	before = fake.LastCode(t, "18612345672")
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tThirdKey", "ThirdSecret0123456789"
	write(t, dir, map[string]string{"ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret})
	testutil.Eventually(t, "the third key is in use", reloaded)
	p.send(t, "18612345673")
	if !p.valid(t, "18612345672", before) {
		t.Error("a code sent between the two changes: got invalid; want valid")
	}
	if !p.valid(t, "18612345673", fake.LastCode(t, "18612345673")) {
		t.Error("a code sent after the second change: got invalid; want valid")
	}

	for _, c := range []struct {
		reason  string
		invalid map[string]string
	}{
		{"names another database; only a restart can change the database", map[string]string{"DATA_SOURCE_NAME": as("s3cret", "another")}},
		{"the Aliyun access key secret must be printable ASCII", map[string]string{
			"DATA_SOURCE_NAME":     as("new", mysqltest.Database),
			"ALIYUN_ACCESS_KEY_ID": "LTAI5tFourth", "ALIYUN_ACCESS_KEY_SECRET": "with a space s3cret",
		}},
		{"MySQL error 1045 (28000): the user or the password", map[string]string{"DATA_SOURCE_NAME": as("s3cret", mysqltest.Database)}},
	} {
		rejected := p.logged(secretsRejected)
		write(t, dir, c.invalid)
		testutil.Eventually(t, "rejected: "+c.reason, rejected)
		p.send(t, "18612345671")
		if out := p.Output.String(); !strings.Contains(out, c.reason) {
			t.Errorf("the log lacks %q:\n%s", c.reason, out)
		}
		write(t, dir, map[string]string{
			"DATA_SOURCE_NAME": as("new", mysqltest.Database), "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID,
			"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
		})
	}
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": as("later", mysqltest.Database)})
	testutil.Eventually(t, "a password that the database does not have yet is rejected", p.logged(secretsRejected))
	reloaded = p.logged("reloaded secrets")
	mysqltest.Exec(t, admin, "ALTER USER phone@'%' IDENTIFIED BY 'later'")
	testutil.Eventually(t, "the password is in use when the database has it", reloaded)
	if out := p.Output.String(); strings.Contains(out, "s3cret") || strings.Contains(out, ":new@") || strings.Contains(out, "later@") {
		t.Errorf("the log contains a secret:\n%s", out)
	}
}

// TestReload_WrongPasswordIsDialledLessAndLess counts the logins that the server rejected.
// A slow machine makes fewer attempts than the bound allows.
func TestReload_WrongPasswordIsDialledLessAndLess(t *testing.T) {
	t.Parallel()
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	aborted := func() (n int) {
		var name string
		if err := admin.QueryRow("SHOW GLOBAL STATUS LIKE 'Aborted_connects'").Scan(&name, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	atStart := aborted()
	rejected := func() int { return aborted() - atStart }
	dir := t.TempDir()
	dsn := server.DSN(mysqltest.Database)
	env := append(write(t, dir, map[string]string{"DATA_SOURCE_NAME": dsn}), slices.DeleteFunc(servicetest.Environment(fake, dsn), func(v string) bool {
		return strings.HasPrefix(v, "DATA_SOURCE_NAME=")
	})...)
	p := run(t, env).serving(t)
	bad := strings.Replace(dsn, server.Password(), "wr0ng", 1)
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": bad})
	testutil.Eventually(t, "the first attempt", func() bool { return rejected() > 0 })
	time.Sleep(11 * time.Second) // attempts follow after 2, 6 and 14 s
	if n := rejected(); n > 3 {
		t.Errorf("rejected logins within 11 s of the first: got %d; want at most 3", n)
	}
	before := rejected()
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": strings.Replace(bad, "wr0ng", "wr0ng again", 1)})
	testutil.Eventually(t, "a further change is attempted", func() bool { return rejected() > before })
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": dsn + "?timeout=1s"})
	testutil.Eventually(t, "the correct password is in use", func() bool { return p.Output.Contains("reloaded secrets") })
	if out := p.Output.String(); strings.Contains(out, "wr0ng") {
		t.Errorf("the log contains a password:\n%s", out)
	}
}

func TestReload_CertificatesAndCallersFailNoCall(t *testing.T) {
	t.Parallel()
	ca, fake, dir := catest.New(t), dysmsapitest.New(t), t.TempDir()
	first, firstHash := newToken(t)
	second, secondHash := newToken(t)
	callersFile := func(hash string) string {
		return testutil.WriteFile(t, dir, "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+hash+"\n")
	}
	certificate, key := ca.Issue("127.0.0.1")
	metrics := servicetest.FreeAddress(t)
	env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")),
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_CALLERS="+callersFile(firstHash),
		"PHONENUMBER_TLS_CERT="+testutil.WriteFile(t, dir, "tls.crt", certificate),
		"PHONENUMBER_TLS_KEY="+testutil.WriteFile(t, dir, "tls.key", key))
	p := run(t, env)
	testutil.Eventually(t, "healthcheck succeeds over TLS", func() bool {
		return command([]string{"PHONENUMBER_TLS_CERT=" + filepath.Join(dir, "tls.crt")}, "healthcheck", "--address", p.Addr).Run() == nil
	})
	if out := p.Output.String(); !strings.Contains(out, `level=INFO msg=listening`) || !strings.Contains(out, "tls=on") || !strings.Contains(out, "callers=file") {
		t.Errorf("the start-up line lacks TLS or the callers file:\n%s", out)
	}
	connect := func(ca *catest.CA) *grpc.ClientConn {
		conn, err := grpc.NewClient(p.Addr, grpc.WithTransportCredentials(credentials.NewTLS(ca.Client())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	call := func(conn *grpc.ClientConn, token string) error {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token), 20*time.Second)
		defer cancel()
		_, err := pb.NewPhoneNumberServiceClient(conn).Valid(ctx, &pb.ValidRequest{PhoneNumber: "18612345678", Code: "000000"})
		return err
	}
	old := connect(ca)
	if err := call(old, first); err != nil {
		t.Fatal(err)
	}

	// Calls continue during the whole test, with a token that every valid callers file has.
	both := "[" + firstHash + ", " + secondHash + "]"
	var calls atomic.Int64
	var callErr error
	stop := make(chan struct{})
	var calling sync.WaitGroup
	calling.Go(func() {
		for callErr == nil {
			select {
			case <-stop:
				return
			default:
				callErr = call(old, first)
				calls.Add(1)
			}
		}
	})
	gauge := func(name string) string {
		return regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindString(testutil.Get(t, metrics, "/metrics", 200))
	}
	expiry := gauge(`phonenumber_certificate_expiry_timestamp_seconds{certificate="server"}`)
	if expiry == "" {
		t.Error("the metrics lack the expiry of the certificate")
	}

	reloaded := p.logged("reloaded callers")
	callersFile(both)
	testutil.Eventually(t, "the new callers are in use", reloaded)
	if err := call(old, second); err != nil {
		t.Errorf("a call with the second token: got %v; want OK", err)
	}
	rejected := p.logged("failed to reload callers; keeping the previous version")
	testutil.WriteFile(t, dir, "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+second+"\n")
	testutil.Eventually(t, "a plaintext token is rejected", rejected)
	if out := p.Output.String(); !strings.Contains(out, "callers.yaml: line 3: token_sha256 must be the SHA-256") ||
		strings.Contains(out, second) {
		t.Errorf("the log: want the file and the line, and no token:\n%s", out)
	}
	if got := gauge(`phonenumber_config_last_reload_successful{files="callers"}`); !strings.HasSuffix(got, " 0") {
		t.Errorf("gauge of rejected files: got %q; want 1", got)
	}
	callersFile(both)
	testutil.Eventually(t, "the gauge is 1 again", func() bool {
		return strings.HasSuffix(gauge(`phonenumber_config_last_reload_successful{files="callers"}`), " 1")
	})

	rejected = p.logged("failed to reload certificates; keeping the previous version")
	_, otherKey := ca.Issue("127.0.0.1")
	testutil.WriteFile(t, dir, "tls.key", otherKey)
	testutil.Eventually(t, "a key of another certificate is rejected", rejected)
	if err := call(connect(ca), first); err != nil {
		t.Errorf("a new connection while the key file is invalid: got %v; want OK", err)
	}
	if got := gauge(`phonenumber_config_last_reload_successful{files="certificates"}`); !strings.HasSuffix(got, " 0") {
		t.Errorf("gauge of rejected files: got %q; want 1", got)
	}
	next := catest.New(t)
	certificate, key = next.Issue("127.0.0.1")
	reloaded = p.logged("reloaded certificates")
	testutil.WriteFile(t, dir, "tls.crt", certificate)
	testutil.WriteFile(t, dir, "tls.key", key)
	testutil.Eventually(t, "the new certificates are in use", reloaded)
	if err := call(connect(next), first); err != nil {
		t.Errorf("a call with the new certificate: got %v; want OK", err)
	}
	callersFile(secondHash)
	close(stop)
	calling.Wait()
	if callErr != nil || calls.Load() == 0 {
		t.Errorf("calls during the reloads: got %d calls, the last %v; want more than 0 and OK", calls.Load(), callErr)
	}
	testutil.Eventually(t, "a removed token is rejected", func() bool { return status.Code(call(old, first)) == codes.Unauthenticated })
	if out := p.Output.String(); strings.Contains(out, first) || strings.Contains(out, second) {
		t.Error("the log contains a token")
	}
}

func TestKeys_RotationKeepsTheCodesOfListedKeys(t *testing.T) {
	fake := dysmsapitest.New(t)
	dir := t.TempDir()
	env := servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db"))
	key := func(b byte) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }
	for i, keys := range []string{key(1), key(2) + "," + key(1), key(2)} {
		file := testutil.WriteFile(t, dir, "keys", keys+"\n")
		p := run(t, append(env, "PHONENUMBER_CODE_KEY_FILE="+file)).serving(t)
		if i > 0 && !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
			t.Errorf("step %d: a code sent before it: got invalid; want valid", i)
		}
		p.send(t, "18612345678")
		p.Kill()
	}
	p := run(t, env).serving(t) // without PHONENUMBER_CODE_KEY: the derived key
	if p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
		t.Error("a code under another key: got valid; want invalid")
	}
}

func TestCodeKey_RotationByReloadRejectsNoCode(t *testing.T) {
	t.Parallel()
	dsn, fake := mysqltest.DSN(t), dysmsapitest.New(t)
	old, fresh := "b2xkIG9sZCBvbGQgb2xkIG9sZCBvbGQgb2xkIG9sZCE=", "bmV3IG5ldyBuZXcgbmV3IG5ldyBuZXcgbmV3IG5ldyE="
	var dirs []string
	var replicas []process
	for range 2 {
		dir := t.TempDir()
		env := append(servicetest.Environment(fake, dsn), write(t, dir, map[string]string{"PHONENUMBER_CODE_KEY": old})...)
		dirs, replicas = append(dirs, dir), append(replicas, run(t, env).serving(t))
	}
	number := 18612340000
	mustVerify := func(step string) {
		t.Helper()
		for from := range replicas {
			for by := range replicas {
				number++
				replicas[from].send(t, fmt.Sprint(number))
				if !replicas[by].valid(t, fmt.Sprint(number), fake.LastCode(t, fmt.Sprint(number))) {
					t.Errorf("%s: a code sent by replica %d, at replica %d: got invalid; want valid", step, from, by)
				}
			}
		}
	}
	mustVerify("before")
	for _, keys := range []string{old + "," + fresh, fresh + "," + old, fresh} { // the steps of docs/install.md
		for i, p := range replicas { // in turn, with calls in between
			reloaded := p.logged("reloaded ")
			write(t, dirs[i], map[string]string{"PHONENUMBER_CODE_KEY": keys})
			testutil.Eventually(t, "the new keys are in use", reloaded)
			mustVerify(keys)
		}
	}
}

// A truncated callers file is still valid YAML, with fewer callers and fewer restrictions.
// It is rejected if the version before it ended with the line "...".
func TestCallersFile_TruncatedIsRejected(t *testing.T) {
	t.Parallel()
	fake, dir, metrics := dysmsapitest.New(t), t.TempDir(), servicetest.FreeAddress(t)
	shop, shopHash := newToken(t)
	batch, batchHash := newToken(t)
	caller := "callers:\n  - name: shop\n    token_sha256: " + shopHash + "\n"
	limits := "    calls: [SendSMS]\n    sends_per_minute: 60\n"
	complete := caller + limits + "  - name: batch\n    token_sha256: " + batchHash + "\n...\n"
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")),
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_CALLERS="+testutil.WriteFile(t, dir, "callers.yaml", complete))).serving(t)
	reloadFailed := func() bool {
		return strings.Contains(testutil.Get(t, metrics, "/metrics", 200), `phonenumber_config_last_reload_successful{files="callers"} 0`)
	}
	for name, cut := range map[string]string{"after a caller": caller + limits, "inside a caller": caller, "at the start": ""} {
		rejected := p.logged(callersRejected)
		testutil.WriteFile(t, dir, "callers.yaml", cut)
		testutil.Eventually(t, "a file truncated "+name+" is rejected", rejected)
		if byShop, byBatch := p.validBy(t, shop), p.validBy(t, batch); byShop != codes.PermissionDenied || byBatch != codes.OK {
			t.Errorf("truncated %s: got %v for shop and %v for batch; want PermissionDenied and OK as before", name, byShop, byBatch)
		}
		if !reloadFailed() {
			t.Errorf("truncated %s: the gauge of the last reload: got 1; want 0", name)
		}
		testutil.WriteFile(t, dir, "callers.yaml", complete)
		testutil.Eventually(t, "the gauge is 1 again", func() bool { return !reloadFailed() })
	}
	if out := p.Output.String(); !strings.Contains(out, "callers.yaml: must end with a line ...") ||
		strings.Contains(out, "reloaded callers") {
		t.Errorf("the log: want the cause, and no reload:\n%s", out)
	}
}

// A change of the callers file logs each caller that it removes, adds or allows more.
// The metrics drop the removed callers only.
func TestCallersFile_ChangeIsLogged(t *testing.T) {
	t.Parallel()
	fake, dir, metrics := dysmsapitest.New(t), t.TempDir(), servicetest.FreeAddress(t)
	shop, shopHash := newToken(t)
	batch, batchHash := newToken(t)
	entry := func(name, hash string) string { return "  - name: " + name + "\n    token_sha256: " + hash + "\n" }
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")), "PHONENUMBER_METRICS_LISTEN="+metrics,
		"PHONENUMBER_CALLERS="+testutil.WriteFile(t, dir, "callers.yaml",
			"callers:\n"+entry("batch", batchHash)+entry("shop", shopHash)+"    countries: [CN]\n"))).serving(t)
	counted := func(caller string) bool {
		return strings.Contains(testutil.Get(t, metrics, "/metrics", 200), `{caller="`+caller+`"`)
	}
	if by := p.validBy(t, batch); by != codes.OK || !counted("batch") {
		t.Fatalf("batch: got %v, in the metrics: %v; want OK, true", by, counted("batch"))
	}
	reloaded := p.logged("reloaded callers")
	testutil.WriteFile(t, dir, "callers.yaml", "callers:\n"+entry("shop", shopHash)+entry("login", batchHash))
	testutil.Eventually(t, "the new callers are in use", reloaded)
	const want = `level=WARN msg="reloaded callers with other permissions" removed=batch added=login may_do_more="shop countries"`
	if out := p.Output.String(); !strings.Contains(out, want) || strings.Contains(out, shopHash) || strings.Contains(out, batchHash) {
		t.Errorf("the log: want a line with %s, and no hash:\n%s", want, out)
	}
	if by := p.validBy(t, shop); by != codes.OK || counted("batch") || !counted("shop") {
		t.Errorf("got %v, batch in the metrics: %v, shop: %v; want OK, false, true", by, counted("batch"), counted("shop"))
	}
}

// A truncated secret can be a valid one. It is rejected if the file ended with a newline
// before.
func TestSecretFile_TruncatedIsRejected(t *testing.T) {
	t.Parallel()
	fake, dir := dysmsapitest.New(t), t.TempDir()
	dsn := "sqlite:" + filepath.Join(dir, "codes.db")
	p := run(t, append(write(t, dir, map[string]string{
		"DATA_SOURCE_NAME": dsn, "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
	}), "ALIYUN_ENDPOINT="+fake.URL, "PHONENUMBER_DRAIN_DELAY=0s")).serving(t)
	for name, value := range map[string]string{
		"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret, "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID,
		"DATA_SOURCE_NAME": dsn,
	} {
		rejected := p.logged(secretsRejected)
		testutil.WriteFile(t, dir, name, value[:len(value)-3])
		testutil.Eventually(t, name+" is rejected", rejected)
		if want := "the file that " + name + "_FILE names must end with a newline"; !p.Output.Contains(want) {
			t.Errorf("the log lacks %q", want)
		}
		testutil.WriteFile(t, dir, name, value+"\n")
	}
	p.send(t, "18612345678")
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tAnotherKey", "AnotherSecret0123456789"
	reloaded := p.logged("reloaded secrets")
	write(t, dir, map[string]string{"ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret})
	testutil.Eventually(t, "a complete key is in use", reloaded)
	p.send(t, "18612345679")
}

// A list of CAs that is truncated between two certificates is valid. Callers with a
// certificate of a missing CA are then rejected, so the log must contain a warning.
func TestCertificates_FewerThanBeforeIsLogged(t *testing.T) {
	t.Parallel()
	ca, another, fake, dir := catest.New(t), catest.New(t), dysmsapitest.New(t), t.TempDir()
	certificate, key := ca.Issue("127.0.0.1")
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")),
		"PHONENUMBER_TLS_CERT="+testutil.WriteFile(t, dir, "tls.crt", certificate),
		"PHONENUMBER_TLS_KEY="+testutil.WriteFile(t, dir, "tls.key", key),
		"PHONENUMBER_TLS_CLIENT_CA="+testutil.WriteFile(t, dir, "ca.crt", ca.PEM+another.PEM)))
	testutil.Eventually(t, "serving", func() bool { return p.Output.Contains("msg=serving") })
	reloaded := p.logged("reloaded certificates")
	testutil.WriteFile(t, dir, "ca.crt", ca.PEM)
	testutil.Eventually(t, "the new list is in use", reloaded)
	want := `level=WARN msg="reloaded a file with fewer certificates" file=` + filepath.Join(dir, "ca.crt") + ` before=2 now=1`
	if !p.Output.Contains(want) {
		t.Errorf("the log lacks %s", want)
	}
}
