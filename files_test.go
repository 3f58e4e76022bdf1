package main

import (
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/catest"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const (
	callersRefused = "failed to reload callers; keeping the previous version"
	secretsRefused = "failed to reload secrets; keeping the previous version"
)

// told returns a condition: the program has written text since told was called.
func (p process) told(text string) func() bool {
	before := strings.Count(p.Output.String(), text)
	return func() bool { return strings.Count(p.Output.String(), text) > before }
}

// validBy is the status of a Valid with a token.
func (p process) validBy(t *testing.T, token string) codes.Code {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
	_, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18612345678", Code: "000000"})
	return status.Code(err)
}

// A callers file that was cut off has fewer restrictions and fewer callers, and can be
// read. It is refused if the version before it said that it was whole.
func TestCallersFile_TruncatedIsRejected(t *testing.T) {
	t.Parallel()
	fake, dir, metrics := dysmsapitest.New(t), t.TempDir(), servicetest.FreeAddress(t)
	shop, shopHash := newToken(t)
	batch, batchHash := newToken(t)
	caller := "callers:\n  - name: shop\n    token_sha256: " + shopHash + "\n"
	limits := "    calls: [SendSMS]\n    sends_per_minute: 60\n"
	whole := caller + limits + "  - name: batch\n    token_sha256: " + batchHash + "\n...\n"
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")),
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_CALLERS="+put(t, dir, "callers.yaml", whole))).serving(t)
	alarm := func() bool {
		return strings.Contains(get(t, metrics, "/metrics", 200), `phonenumber_config_last_reload_successful{files="callers"} 0`)
	}
	for name, cut := range map[string]string{"behind a caller": caller + limits, "in a caller": caller, "at its begin": ""} {
		refused := p.told(callersRefused)
		put(t, dir, "callers.yaml", cut)
		eventually(t, "a file cut off "+name+" is refused", refused)
		if byShop, byBatch := p.validBy(t, shop), p.validBy(t, batch); byShop != codes.PermissionDenied || byBatch != codes.OK {
			t.Errorf("cut off %s: got %v and %v; want PermissionDenied and OK as before", name, byShop, byBatch)
		}
		if !alarm() {
			t.Errorf("cut off %s: the metrics have no alarm", name)
		}
		put(t, dir, "callers.yaml", whole)
		eventually(t, "the alarm ends", func() bool { return !alarm() })
	}
	if out := p.Output.String(); !strings.Contains(out, "callers.yaml: must end with a line ...") || strings.Contains(out, "took over callers") {
		t.Errorf("want the cause, and nothing taken over:\n%s", out)
	}
}

func TestCallersFile_ChangeIsLogged(t *testing.T) {
	t.Parallel()
	fake, dir, metrics := dysmsapitest.New(t), t.TempDir(), servicetest.FreeAddress(t)
	shop, shopHash := newToken(t)
	batch, batchHash := newToken(t)
	entry := func(name, hash string) string { return "  - name: " + name + "\n    token_sha256: " + hash + "\n" }
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")), "PHONENUMBER_METRICS_LISTEN="+metrics,
		"PHONENUMBER_CALLERS="+put(t, dir, "callers.yaml", "callers:\n"+entry("batch", batchHash)+entry("shop", shopHash)+"    countries: [CN]\n"))).serving(t)
	counted := func(caller string) bool {
		return strings.Contains(get(t, metrics, "/metrics", 200), `{caller="`+caller+`"`)
	}
	if by := p.validBy(t, batch); by != codes.OK || !counted("batch") {
		t.Fatalf("batch: got %v, counted %v; want OK and a count", by, counted("batch"))
	}
	taken := p.told("reloaded callers")
	put(t, dir, "callers.yaml", "callers:\n"+entry("shop", shopHash)+entry("login", batchHash))
	eventually(t, "taken over", taken)
	const want = `level=WARN msg="reloaded callers with other permissions" removed=batch added=login may_do_more="shop countries"`
	if out := p.Output.String(); !strings.Contains(out, want) || strings.Contains(out, shopHash) || strings.Contains(out, batchHash) {
		t.Errorf("want a line with %s, and no hash:\n%s", want, out)
	}
	if by := p.validBy(t, shop); by != codes.OK || counted("batch") || !counted("shop") {
		t.Errorf("got %v; want the metrics to forget batch alone: batch %v, shop %v", by, counted("batch"), counted("shop"))
	}
}

// A secret that was cut off can look like one. It is refused if its file ended with a
// newline before.
func TestSecretFile_TruncatedIsRejected(t *testing.T) {
	t.Parallel()
	fake, dir := dysmsapitest.New(t), t.TempDir()
	dsn := "sqlite:" + filepath.Join(dir, "codes.db")
	p := run(t, append(write(t, dir, map[string]string{
		"DATA_SOURCE_NAME": dsn, "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret,
	}), "ALIYUN_ENDPOINT="+fake.URL, "PHONENUMBER_DRAIN_DELAY=0s")).serving(t)
	for name, value := range map[string]string{"ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret, "ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "DATA_SOURCE_NAME": dsn} {
		refused := p.told(secretsRefused)
		put(t, dir, name, value[:len(value)-3])
		eventually(t, name+" is refused", refused)
		if want := "the file that " + name + "_FILE names must end with a newline"; !strings.Contains(p.Output.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
		put(t, dir, name, value+"\n")
	}
	p.send(t, "18612345678")
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tAnotherKey", "AnotherSecret0123456789"
	taken := p.told("reloaded secrets")
	write(t, dir, map[string]string{"ALIYUN_ACCESS_KEY_ID": fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET": fake.AccessKeySecret})
	eventually(t, "a whole key is taken over", taken)
	p.send(t, "18612345679")
}

// A list of CAs that was cut off between two of them can be used, and its callers stay
// out.
func TestCertificates_FewerThanBeforeIsLogged(t *testing.T) {
	t.Parallel()
	ca, another, fake, dir := catest.New(t), catest.New(t), dysmsapitest.New(t), t.TempDir()
	certificate, key := ca.Issue("127.0.0.1")
	p := run(t, append(servicetest.Environment(fake, "sqlite:"+filepath.Join(dir, "codes.db")),
		"PHONENUMBER_TLS_CERT="+put(t, dir, "tls.crt", certificate), "PHONENUMBER_TLS_KEY="+put(t, dir, "tls.key", key),
		"PHONENUMBER_TLS_CLIENT_CA="+put(t, dir, "ca.crt", ca.PEM+another.PEM)))
	eventually(t, "serving", func() bool { return strings.Contains(p.Output.String(), "msg=serving") })
	taken := p.told("reloaded certificates")
	put(t, dir, "ca.crt", ca.PEM)
	eventually(t, "taken over", taken)
	want := `level=WARN msg="reloaded a file with fewer certificates" file=` + filepath.Join(dir, "ca.crt") + ` before=2 now=1`
	if !strings.Contains(p.Output.String(), want) {
		t.Errorf("the log lacks %s", want)
	}
}
