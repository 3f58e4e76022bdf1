package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole/ststest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// inspectBy runs inspect in an environment and returns its output, which must contain no code and no
// number.
func inspectBy(t *testing.T, fake *dysmsapitest.Server, env []string, args ...string) string {
	t.Helper()
	out, err := command(env, append([]string{"inspect"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	mustHideCodes(t, fake, "inspect", string(out))
	return string(out)
}

// mustHideCodes requires that text contains no code that was sent, no number, and nothing of the text of
// an SMS. Longer numbers, such as a BizId, may contain the digits of a code.
func mustHideCodes(t *testing.T, fake *dysmsapitest.Server, name, text string) {
	t.Helper()
	for _, m := range fake.Accepted() {
		if found := regexp.MustCompile(`\b` + m.Code + `\b|` + m.PhoneNumber + `|您的验证码`).FindString(text); found != "" {
			t.Errorf("%s: got %q in\n%s\nwant no code, number or text of an SMS", name, found, text)
		}
	}
}

func TestInspect_TellsIfTheSMSArrived(t *testing.T) {
	t.Parallel()
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	env := append(servicetest.Environment(fake, dsn), "TZ=UTC")
	p := run(t, env).serving(t)
	const ago = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \(\d+s ago\)`
	for i, c := range []struct {
		template string
		receipt  dysmsapitest.Receipt
		want     string // of the line delivery and the next one
	}{
		{"SMS_1", dysmsapitest.Receipt{}, "SMS SMS_1, sent " + ago + ": delivered " + ago + "\n"},
		{"100001", dysmsapitest.Receipt{}, "PNVS, sent " + ago + ": delivered " + ago + "\n"},
		{"SMS_1", dysmsapitest.Receipt{After: time.Hour}, "SMS SMS_1, sent " + ago + ": the carrier has not answered yet\n"},
		{"SMS_1", dysmsapitest.Receipt{Code: "PORT_NOT_REGISTERED"}, "SMS SMS_1, sent " + ago + ": not delivered, PORT_NOT_REGISTERED " + ago +
			"\n +the carrier does not know the sign name: .*: see its state in the console .*\n"},
		{"100001", dysmsapitest.Receipt{Code: "MOBILE_NOT_ON_SERVICE"}, "PNVS, sent " + ago + ": not delivered, MOBILE_NOT_ON_SERVICE " + ago +
			"\n +the phone is off .*\n"},
		{"SMS_1", dysmsapitest.Receipt{Code: "MK:0001"}, "SMS SMS_1, sent " + ago + ": not delivered, MK:0001 " + ago + "\n$"},
		{"SMS_1", dysmsapitest.Receipt{Code: "网关 拒绝/1"}, "SMS SMS_1, sent " + ago + ": not delivered, 网关 拒绝/1 " + ago + "\n$"},
		{"SMS_1", dysmsapitest.Receipt{Code: "E123456"}, "SMS SMS_1, sent " + ago + ": not delivered, a code that is not shown here \\(see Aliyun's console\\) " + ago + "\n$"},
	} {
		number := fmt.Sprintf("1861234%04d", i)
		fake.SetReceipts(func(dysmsapitest.Accepted) dysmsapitest.Receipt { return c.receipt })
		if _, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: c.template}); err != nil {
			t.Fatal(err)
		}
		// The attempt stores the acceptance of the send, which would wait for some seconds.
		if _, err := p.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: "no code"}); err != nil {
			t.Fatal(err)
		}
		out := inspectBy(t, fake, env, number)
		if !regexp.MustCompile("\ndelivery   "+c.want).MatchString(out) || strings.Count(out, "delivery ") != 1 {
			t.Errorf("%s, %+v: got\n%s\nwant one line delivery %s", c.template, c.receipt, out, c.want)
		}
		var printed struct {
			Accepted struct {
				BizID string `json:"biz_id"`
			}
			Deliveries []struct {
				Product, Status, Meaning string
				ErrorCode                string    `json:"error_code"`
				SentAt                   time.Time `json:"sent_at"`
			}
			Unanswered []any
		}
		out = inspectBy(t, fake, env, "--json", number)
		if err := json.Unmarshal([]byte(out), &printed); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		sent := fake.Accepted()[i]
		if len(printed.Deliveries) != 1 || len(printed.Unanswered) > 0 || printed.Accepted.BizID != sent.BizID ||
			!printed.Deliveries[0].SentAt.Equal(sent.At.Truncate(time.Second)) {
			t.Errorf("--json: got %+v; want one delivery of %+v", printed, sent)
		}
	}
	fake.SetReceipts(func(dysmsapitest.Accepted) dysmsapitest.Receipt { return dysmsapitest.Receipt{} })
	sts := ststest.New(t)
	role, _ := roleEnvironment(t, fake, sts)
	fake.SetIssuer(func(id string) (dysmsapitest.Issued, bool) {
		if id == fake.AccessKeyID {
			return dysmsapitest.Issued{AccessKeySecret: fake.AccessKeySecret}, true
		}
		return sts.Issued(id)
	})

	for name, c := range map[string]struct {
		env   []string
		fault dysmsapitest.Fault
		wants []string
	}{
		"no credentials": {
			[]string{"DATA_SOURCE_NAME=" + dsn},
			dysmsapitest.Delay(0),
			[]string{"delivery   not known, because Aliyun was not asked: ALIYUN_ACCESS_KEY_ID is missing .*; ALIYUN_ACCESS_KEY_SECRET is missing .*; set the credentials as serve has them"},
		},
		"a role": {
			append(role, "DATA_SOURCE_NAME="+dsn),
			dysmsapitest.Delay(0),
			[]string{"delivery   SMS SMS_1, sent " + ago + ": delivered " + ago + "\n"},
		},
		"a role that cannot be assumed": {
			append(role, "DATA_SOURCE_NAME="+dsn, "ALIBABA_CLOUD_ROLE_ARN=acs:ram::1:role/r"),
			dysmsapitest.Delay(0),
			[]string{"delivery   not known, because Aliyun was not asked: STS: HTTP 404, EntityNotExist.Role.*; set the credentials as serve has them"},
		},
		"half a role": {
			[]string{"DATA_SOURCE_NAME=" + dsn, "ALIBABA_CLOUD_ROLE_ARN=acs:ram::1:role/r"},
			dysmsapitest.Delay(0),
			[]string{"Aliyun was not asked: ALIBABA_CLOUD_OIDC_PROVIDER_ARN and ALIBABA_CLOUD_OIDC_TOKEN_FILE are missing"},
		},
		"no right": {
			env, dysmsapitest.Reply(200, "isp.RAM_PERMISSION_DENY", "RAM权限不足"),
			[]string{
				"delivery   SMS: not known, because Aliyun gave no records: rejected by Aliyun, code isp.RAM_PERMISSION_DENY, RequestId .*: allow the RAM user or role the action dysms:QuerySendDetails",
				"delivery   PNVS: not known, .*: allow the RAM user or role the action dypns:QuerySendDetails",
			},
		},
		"records without times": {
			env, dysmsapitest.Body(200, "application/json", `{"Code":"OK","SmsSendDetailDTOs":{"SmsSendDetailDTO":[{"SendStatus":3,"ErrCode":"DELIVERED"}]}}`),
			[]string{"delivery   SMS, sent at an unknown time: delivered at an unknown time\n"},
		},
		"Aliyun cannot be reached": {append(env, "ALIYUN_ENDPOINT=http://"+testutil.RefusingAddress), dysmsapitest.Delay(0), []string{"delivery   SMS: not known, because Aliyun gave no records: connection refused"}},
	} {
		fake.FailQueries(c.fault)
		out := inspectBy(t, fake, c.env, "18612340000")
		for _, want := range append(c.wants, "last send  .*, send ID", "code       live until") {
			if !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("%s: got\n%s\nwant %s", name, out, want)
			}
		}
	}
	fake.FailQueries(dysmsapitest.Delay(0))
	out := inspectBy(t, fake, env, "13900000000")
	if !regexp.MustCompile(`last send  none.*\ndelivery   Aliyun has no record of an SMS to this number`).MatchString(out) {
		t.Errorf("a number without an SMS: got\n%s\nwant no send and no record", out)
	}
	out = inspectBy(t, fake, append(env, "TZ=Asia/Shanghai"), "18612340000")
	if !regexp.MustCompile(`delivery   .*Z \(\d\d:\d\d:\d\d \+0800, \d+s ago\): delivered`).MatchString(out) {
		t.Errorf("in Shanghai: got\n%s\nwant UTC and the local time", out)
	}
}

// The incident: the carriers refuse one of two sign names. The operator's three steps give the reason.
func TestIncident_OneSignNameIsRefused(t *testing.T) {
	t.Parallel()
	fake := dysmsapitest.New(t)
	fake.SetReceipts(func(m dysmsapitest.Accepted) dysmsapitest.Receipt {
		if m.SignName == "新签名" {
			return dysmsapitest.Receipt{Code: "PORT_NOT_REGISTERED", After: time.Second}
		}
		return dysmsapitest.Receipt{After: 3 * time.Second}
	})
	metrics := servicetest.FreeAddress(t)
	env := append(servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db")), "TZ=UTC",
		"PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_DELIVERY_SAMPLE=1", "PHONENUMBER_LOG_FORMAT=json")
	p := run(t, env).serving(t)
	for i := range 10 {
		for prefix, sign := range map[string]string{"186": "阿里云", "187": "新签名"} {
			number := fmt.Sprintf("%s1234%04d", prefix, i)
			if _, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: sign, TemplateCode: "SMS_1"}); err != nil {
				t.Fatal(err)
			}
		}
	}

	// 1. Why do SMS not arrive?
	testutil.Eventually(t, "the metrics have the carrier's code", func() bool {
		scraped := testutil.Get(t, metrics, "/metrics", 200)
		mustHideCodes(t, fake, "/metrics", regexp.MustCompile(` [0-9.e+-]+\n`).ReplaceAllString(scraped, "\n")) // without values
		return strings.Contains(scraped, `phonenumber_deliveries_total{country="CN",error_code="PORT_NOT_REGISTERED",outcome="failed",product="sms"} 10`) &&
			strings.Contains(scraped, `phonenumber_deliveries_total{country="CN",error_code="DELIVERED",outcome="delivered",product="sms"} 10`)
	})
	// 2. Which sign name?
	testutil.Eventually(t, "the log has a line for each", func() bool { return p.Output.Count(`"msg":"SMS not delivered"`) == 10 })
	mustHideCodes(t, fake, "the log", p.Output.String())
	for line := range strings.Lines(p.Output.String()) {
		if strings.Contains(line, `"msg":"SMS not delivered"`) && !strings.Contains(line, `"sign_name":"新签名","template_code":"SMS_1"`) {
			t.Errorf("got %s; want the sign name and the template", line)
		}
	}
	// 3. What to do?
	out := inspectBy(t, fake, env, "18712340000")
	if !strings.Contains(out, "not delivered, PORT_NOT_REGISTERED") || !strings.Contains(out, "its real-name registration is not finished: see its state in the console (签名管理 → 实名制报备)") {
		t.Errorf("got\n%s\nwant the reason and what to do", out)
	}
}
