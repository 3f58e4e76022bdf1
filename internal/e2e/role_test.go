package e2e

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole/ststest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

var codeKey = "PHONENUMBER_CODE_KEY=" + base64.StdEncoding.EncodeToString([]byte(strings.Repeat("k", 32)))

// roleEnvironment returns the variables that serve needs with a role by OIDC, on a SQLite file.
func roleEnvironment(t *testing.T, gateway *dysmsapitest.Server, sts *ststest.Server) (env []string, tokenFile string) {
	t.Helper()
	gateway.SetIssuer(sts.Issued)
	tokenFile = testutil.WriteFile(t, t.TempDir(), "token", ststest.FirstToken+"\n")
	return []string{
		"DATA_SOURCE_NAME=sqlite:" + filepath.Join(t.TempDir(), "codes.db"), "ALIYUN_ENDPOINT=" + gateway.URL,
		"ALIYUN_PNVS_ENDPOINT=" + gateway.PNVSURL, "ALIYUN_STS_ENDPOINT=" + sts.STSURL, "ALIBABA_CLOUD_ROLE_ARN=" + ststest.RoleARN,
		"ALIBABA_CLOUD_OIDC_PROVIDER_ARN=" + ststest.ProviderARN, "ALIBABA_CLOUD_OIDC_TOKEN_FILE=" + tokenFile, codeKey,
		"PHONENUMBER_DRAIN_DELAY=0s",
	}, tokenFile
}

func (p process) sendBy(t *testing.T, number, template string) error {
	t.Helper()
	_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "签名", TemplateCode: template})
	return err
}

func TestRole_IsReadyWithTheFirstCredentials(t *testing.T) {
	t.Parallel()
	gateway, sts := dysmsapitest.New(t), ststest.New(t)
	env, _ := roleEnvironment(t, gateway, sts)
	sts.Revoke(true)
	metrics := servicetest.FreeAddress(t)
	p := run(t, append(env, "PHONENUMBER_METRICS_LISTEN="+metrics))
	for _, want := range []string{`msg="not serving" error="no Aliyun credentials yet"`, `msg="using Aliyun credentials" provider=oidc_role_arn`, "AuthenticationFail.NoPermission", "the trust policy of ALIBABA_CLOUD_ROLE_ARN"} {
		testutil.Eventually(t, "the log has "+want, func() bool { return strings.Contains(p.Output.String(), want) })
	}
	testutil.Get(t, metrics, "/readyz", 503)
	if err := p.sendBy(t, "18612345678", "SMS_1"); status.Code(err) != codes.Unavailable {
		t.Errorf("a send without credentials: got %v; want UNAVAILABLE", err)
	}
	if text := testutil.Get(t, metrics, "/metrics", 200); strings.Contains(text, "phonenumber_aliyun_credentials_expiry_timestamp_seconds ") {
		t.Error("without credentials: got the metric of their end; want none")
	}
	sts.Revoke(false)
	p.serving(t)
	for template, number := range map[string]string{"SMS_1": "18612345671", "100001": "18612345672"} {
		if err := p.sendBy(t, number, template); err != nil {
			t.Errorf("%s: got %v; want nil", template, err)
		} else if !p.valid(t, number, gateway.LastCode(t, number)) {
			t.Errorf("%s: the code is not valid; want valid", template)
		}
	}
	if text := testutil.Get(t, metrics, "/metrics", 200); !strings.Contains(text, "phonenumber_aliyun_credentials_expiry_timestamp_seconds ") {
		t.Error("with credentials: got no metric of their end; want one")
	}
	p.mustStop(t)
}

// The credentials last an hour, so that only the rejection can cause the second request to STS.
func TestRole_ExpiredAnswerRenewsTheCredentials(t *testing.T) {
	t.Parallel()
	gateway, sts := dysmsapitest.New(t), ststest.New(t)
	env, _ := roleEnvironment(t, gateway, sts)
	p := run(t, env).serving(t)
	gateway.Next(dysmsapitest.Reply(400, "InvalidSecurityToken.Expired", "x"))
	if err := p.sendBy(t, "18612345671", "SMS_1"); err == nil {
		t.Error("the rejected send: got nil; want an error")
	}
	testutil.Eventually(t, "the credentials were renewed", func() bool { return p.Output.Count("fetched Aliyun credentials") == 2 })
	if err := p.sendBy(t, "18612345672", "SMS_1"); err != nil {
		t.Errorf("the next send: got %v; want nil", err)
	}
	if n := sts.Requests(); n != 2 {
		t.Errorf("got %d requests to STS; want 2", n)
	}
	p.mustStop(t)
}

// TestRole_OutputHoldsNoToken renews credentials while STS works, is revoked, and replies with what it
// should not.
func TestRole_OutputHoldsNoToken(t *testing.T) {
	t.Parallel()
	gateway, sts := dysmsapitest.New(t), ststest.New(t)
	env, tokenFile := roleEnvironment(t, gateway, sts)
	sts.SetLifetime(4 * time.Second)
	traces := &testutil.Output{}
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(traces, r.Body) }))
	defer collector.Close()
	metrics := servicetest.FreeAddress(t)
	p := run(t, append(env, "PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_LOG_LEVEL=debug",
		"OTEL_EXPORTER_OTLP_ENDPOINT="+collector.URL, "OTEL_BSP_SCHEDULE_DELAY=100")).serving(t)
	responses := &strings.Builder{}
	sent := 0
	send := func() {
		sent++
		fmt.Fprintln(responses, p.sendBy(t, fmt.Sprintf("1867777%04d", sent), []string{"SMS_1", "100001"}[sent%2]))
	}
	renewed := func() {
		t.Helper()
		testutil.Eventually(t, "credentials were fetched", p.logged("fetched Aliyun credentials"))
		send()
	}
	failed := func() {
		t.Helper()
		testutil.Eventually(t, "a fetch failed", p.logged("failed to fetch Aliyun credentials"))
		send()
	}
	renewed()
	gateway.Next(dysmsapitest.Reply(400, "InvalidSecurityToken.Expired", "quoted"), dysmsapitest.Reply(400, "SignatureDoesNotMatch", "quoted"))
	renewed()
	send()
	for _, reply := range []string{
		`{"Code":"` + ststest.FirstToken + `","Message":"` + ststest.FirstToken + `","RequestId":"` + ststest.FirstToken + `"}`,
		`{"Credentials":{"AccessKeyId":"STS.NLeaked1","AccessKeySecret":"LeakedSecret","SecurityToken":"LeakedToken","Expiration":"LeakedExpiration"}}`,
		`LeakedToken`,
	} {
		sts.Break(ststest.Body(200, reply))
		failed()
		sts.Break(ststest.Body(400, reply))
		failed()
		sts.Break(nil)
		renewed() // after a success, the next failures are repeated soon again
	}
	sts.SetToken("another.token.of.the-account")
	failed()
	testutil.WriteFile(t, filepath.Dir(tokenFile), "token", "another.token.of.the-account")
	renewed()
	sts.Revoke(true)
	failed()
	scrapes := testutil.Get(t, metrics, "/metrics", 200)
	out, _ := command(env, "check", "--json").CombinedOutput()
	responses.Write(out)
	sts.Revoke(false)
	out, _ = command(env, "check").CombinedOutput()
	responses.Write(out)
	p.mustStop(t)
	for name, text := range map[string]string{
		"log": p.Output.String(), "responses": responses.String(), "metrics": scrapes, "traces": traces.String(),
	} {
		if len(text) < 500 {
			t.Errorf("%s: got %d bytes; want at least 500", name, len(text))
		}
		secrets := append(sts.Secrets(), ststest.FirstToken, "FirstServiceAccountToken", "STS.NLeaked1", "LeakedSecret", "LeakedToken",
			"LeakedExpiration")
		for _, secret := range secrets {
			if i := strings.Index(text, secret); i >= 0 {
				t.Errorf("%s: got %s in …%q…; want no secret", name, secret, text[max(0, i-100):min(len(text), i+100)])
			}
		}
	}
}

func TestRole_CheckSaysIfItGivesCredentials(t *testing.T) {
	t.Parallel()
	gateway, sts := dysmsapitest.New(t), ststest.New(t)
	env, _ := roleEnvironment(t, gateway, sts)
	out, ok := check(t, env)
	for _, want := range []string{
		"ok       credentials  oidc_role_arn gives credentials until 20",
		"ok       Aliyun SMS   can be reached without a proxy, and accepts the credentials",
		"ok       Aliyun PNVS  can be reached without a proxy, and accepts the credentials",
	} {
		if !ok || !strings.Contains(out, want) {
			t.Errorf("got ok %t and\n%s\nwant ok and %q", ok, out, want)
		}
	}
	sts.Revoke(true)
	out, ok = check(t, env)
	want := regexp.MustCompile(`(?m)^failed   credentials  STS: HTTP 403, AuthenticationFail\.NoPermission, .*: the trust policy of ALIBABA_CLOUD_ROLE_ARN must let`)
	if ok || !want.MatchString(out) {
		t.Errorf("a revoked role: got ok %t and\n%s\nwant a failure and %s", ok, out, want)
	}
	if strings.Contains(out, "Aliyun SMS") {
		t.Errorf("a revoked role: got\n%s\nwant no line of a product", out)
	}
}

// An agent can rotate a temporary access key in files.
func TestSecurityToken_IsReloadedFromItsFile(t *testing.T) {
	t.Parallel()
	gateway, dir := dysmsapitest.New(t), t.TempDir()
	issued := map[string]dysmsapitest.Issued{
		"STS.NFirst":  {AccessKeySecret: "FirstSecret", SecurityToken: "FirstToken=="},
		"STS.NSecond": {AccessKeySecret: "SecondSecret", SecurityToken: "SecondToken=="},
	}
	gateway.SetIssuer(func(id string) (dysmsapitest.Issued, bool) { i, ok := issued[id]; return i, ok })
	secrets := func(id string) map[string]string {
		return map[string]string{
			"ALIYUN_ACCESS_KEY_ID": id, "ALIYUN_ACCESS_KEY_SECRET": issued[id].AccessKeySecret, "ALIYUN_SECURITY_TOKEN": issued[id].SecurityToken,
		}
	}
	p := run(t, append(write(t, dir, secrets("STS.NFirst")), "DATA_SOURCE_NAME=sqlite:"+filepath.Join(t.TempDir(), "codes.db"),
		"ALIYUN_ENDPOINT="+gateway.URL, "ALIYUN_PNVS_ENDPOINT="+gateway.PNVSURL, "PHONENUMBER_DRAIN_DELAY=0s", codeKey)).serving(t)
	p.send(t, "18612345671")
	reloaded := p.logged(`reloaded secrets" names="ALIYUN_ACCESS_KEY_ID ALIYUN_ACCESS_KEY_SECRET ALIYUN_SECURITY_TOKEN"`)
	write(t, dir, secrets("STS.NSecond"))
	testutil.Eventually(t, "the log reports the new credentials", reloaded)
	delete(issued, "STS.NFirst")
	p.send(t, "18612345672")
	if !p.valid(t, "18612345671", gateway.LastCode(t, "18612345671")) {
		t.Error("a code from before the rotation: got invalid; want valid")
	}
	if !strings.Contains(p.Output.String(), "provider=static_sts") {
		t.Error("the log lacks provider=static_sts")
	}
	p.mustStop(t)
}
