package main

import (
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const (
	callersRejected = "failed to reload callers; keeping the previous version"
	secretsRejected = "failed to reload secrets; keeping the previous version"
)

// logged returns a condition that is true if the program has written text since the call
// of logged.
func (p process) logged(text string) func() bool {
	before := strings.Count(p.Output.String(), text)
	return func() bool { return strings.Count(p.Output.String(), text) > before }
}

// validBy calls Valid with a token and returns the status code.
func (p process) validBy(t *testing.T, token string) codes.Code {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
	_, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18612345678", Code: "000000"})
	return status.Code(err)
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
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_CALLERS="+put(t, dir, "callers.yaml", complete))).serving(t)
	reloadFailed := func() bool {
		return strings.Contains(get(t, metrics, "/metrics", 200), `phonenumber_config_last_reload_successful{files="callers"} 0`)
	}
	for name, cut := range map[string]string{"after a caller": caller + limits, "inside a caller": caller, "at the start": ""} {
		rejected := p.logged(callersRejected)
		put(t, dir, "callers.yaml", cut)
		testutil.Eventually(t, "a file truncated "+name+" is rejected", rejected)
		if byShop, byBatch := p.validBy(t, shop), p.validBy(t, batch); byShop != codes.PermissionDenied || byBatch != codes.OK {
			t.Errorf("truncated %s: got %v for shop and %v for batch; want PermissionDenied and OK as before", name, byShop, byBatch)
		}
		if !reloadFailed() {
			t.Errorf("truncated %s: the gauge of the last reload: got 1; want 0", name)
		}
		put(t, dir, "callers.yaml", complete)
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
		"PHONENUMBER_CALLERS="+put(t, dir, "callers.yaml",
			"callers:\n"+entry("batch", batchHash)+entry("shop", shopHash)+"    countries: [CN]\n"))).serving(t)
	counted := func(caller string) bool {
		return strings.Contains(get(t, metrics, "/metrics", 200), `{caller="`+caller+`"`)
	}
	if by := p.validBy(t, batch); by != codes.OK || !counted("batch") {
		t.Fatalf("batch: got %v, in the metrics: %v; want OK, true", by, counted("batch"))
	}
	reloaded := p.logged("reloaded callers")
	put(t, dir, "callers.yaml", "callers:\n"+entry("shop", shopHash)+entry("login", batchHash))
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
		put(t, dir, name, value[:len(value)-3])
		testutil.Eventually(t, name+" is rejected", rejected)
		if want := "the file that " + name + "_FILE names must end with a newline"; !strings.Contains(p.Output.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
		put(t, dir, name, value+"\n")
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
		"PHONENUMBER_TLS_CERT="+put(t, dir, "tls.crt", certificate), "PHONENUMBER_TLS_KEY="+put(t, dir, "tls.key", key),
		"PHONENUMBER_TLS_CLIENT_CA="+put(t, dir, "ca.crt", ca.PEM+another.PEM)))
	testutil.Eventually(t, "serving", func() bool { return strings.Contains(p.Output.String(), "msg=serving") })
	reloaded := p.logged("reloaded certificates")
	put(t, dir, "ca.crt", ca.PEM)
	testutil.Eventually(t, "the new list is in use", reloaded)
	want := `level=WARN msg="reloaded a file with fewer certificates" file=` + filepath.Join(dir, "ca.crt") + ` before=2 now=1`
	if !strings.Contains(p.Output.String(), want) {
		t.Errorf("the log lacks %s", want)
	}
}
