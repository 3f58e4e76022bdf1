package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestInspect_PrintsTheHistoryOfANumber(t *testing.T) {
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	fake.Limits(true)
	dsn := server.DSN(mysqltest.Database)
	admin := server.Open(t)
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	mysqltest.Exec(t, admin,
		"CREATE USER reader@'%' IDENTIFIED BY 'r'",
		"GRANT SELECT ON "+mysqltest.Database+".phone_numbers TO reader@'%'",
	)
	reader := mysqltest.As(dsn, "reader:r") // may only read
	mustPrint := func(step string, wants ...string) {
		t.Helper()
		out := inspect(t, reader, "186 1234 5678")
		for _, want := range wants {
			if !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("%s: got no %q in\n%s", step, want, out)
			}
		}
		for _, m := range fake.Accepted() {
			if strings.Contains(out, m.Code) || strings.Contains(out, "12345678") {
				t.Errorf("%s: the output contains the code or the number:\n%s", step, out)
			}
		}
	}
	const ago, soon = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \(\d+s ago\)`, `\(in (10m0s|9m\d\ds)\)`
	mustPrint("never sent", `^number     \+86186\*\*\*\*5678\nlast send  none: nothing was sent`)

	p.send(t, "18612345678")
	sent := fake.Accepted()[0]
	accepted := "Aliyun     accepted " + ago + ", BizId " + regexp.QuoteMeta(sent.BizID)
	mustPrint("sent", "last send  "+ago+`, send ID \d+`, "Aliyun     answer not known yet", "code       live until .*"+soon+", 0 of 3 attempts used, Aliyun's answer not known\n")
	p.valid(t, "18612345678", "x")
	mustPrint("a wrong code", accepted+"\n", "1 of 3 attempts used, accepted by Aliyun\n")
	p.valid(t, "18612345678", sent.Code)
	mustPrint("verified", accepted+"\n", "code       no live code", "verified   "+ago+" with attempt 2\n")

	p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	requestID := fake.RequestIDs()[1]
	testutil.Eventually(t, "the rejection is stored", func() bool { return strings.Contains(inspect(t, reader, "186 1234 5678"), requestID) })
	mustPrint("limited", "Aliyun     not sent, limited "+ago+", code isv.BUSINESS_LIMIT_CONTROL, RequestId "+requestID+"\n",
		accepted+" \\(of an earlier send", "verified .* with attempt 2 \\(of an earlier send")

	fake.Next(dysmsapitest.CloseAfterReading().ButAccepted())
	fake.Limits(false)
	p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
	mustPrint("a lost response", "answer not known yet", "not sent, limited .*of an earlier send",
		"0 of 3 attempts used, Aliyun's answer not known\n")
	for range 3 {
		p.valid(t, "18612345678", "x")
	}
	mustPrint("exhausted", "no live code", "exhausted  "+ago+" by 3 wrong attempts\n")

	file := filepath.Join(t.TempDir(), "none.db")
	out, err := command([]string{"DATA_SOURCE_NAME=sqlite:" + file}, "inspect", "18612345678").CombinedOutput()
	if _, missing := os.Stat(file); err == nil || missing == nil || !strings.Contains(string(out), "must be able to read and write "+file) {
		t.Errorf("a missing file: got %v, %s; want its name, and no new file", err, out)
	}
	out, err = command([]string{"DATA_SOURCE_NAME=" + reader}, "inspect", "10086").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "phone_number must be one mobile number") {
		t.Errorf("an invalid number: got %v, %s; want an error for phone_number", err, out)
	}
	out, err = command([]string{"DATA_SOURCE_NAME=" + dsn[:strings.LastIndex(dsn, "/")] + "/mysql"}, "inspect", "18612345678").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "the table phone_numbers is not there") {
		t.Errorf("a database without the table: got %v, %s; want an error for the table", err, out)
	}
}

func TestInspect_PrintsThatACodeExpired(t *testing.T) {
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	p.send(t, "18612345678")
	p.valid(t, "18612345678", "x")
	var out []byte
	testutil.Eventually(t, "inspect prints that the code expired", func() bool {
		out, _ = command([]string{"DATA_SOURCE_NAME=" + dsn, "PHONENUMBER_CODE_TTL=1s"}, "inspect", "18612345678").CombinedOutput()
		return regexp.MustCompile(`code       no live code\nexpired    .* ago\)\n`).Match(out)
	})
}

// The acceptance of a sole code is stored ten seconds later, or at the drain.
func TestDrain_StoresTheAcceptanceOfASoleCode(t *testing.T) {
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	p.send(t, "18612345678")
	p.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if out := inspect(t, dsn, "18612345678"); !strings.Contains(out, "BizId "+fake.Accepted()[0].BizID+"\n") {
		t.Errorf("inspect after the drain: want the BizId:\n%s", out)
	}
}

func TestInspect_ReadsASQLiteFileInUse(t *testing.T) {
	fake := dysmsapitest.New(t)
	dsn := "sqlite:" + filepath.Join(t.TempDir(), "codes.db")
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	p.send(t, "18612345678")
	if out := inspect(t, dsn, "+8618612345678"); !strings.Contains(out, "0 of 3 attempts used") {
		t.Errorf("inspect: want a live code:\n%s", out)
	}
	if !p.valid(t, "18612345678", fake.LastCode(t, "18612345678")) {
		t.Error("the code after inspect: got invalid; want valid")
	}
}
