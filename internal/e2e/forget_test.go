package e2e

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestForget_DeletesANumberAndWaitsForItsSend(t *testing.T) {
	server, fake := mysqltest.Start(t), dysmsapitest.New(t)
	dsn := server.DSN(mysqltest.Database)
	admin := server.Open(t)
	p := run(t, servicetest.Environment(fake, dsn)).serving(t)
	mysqltest.Exec(t, admin,
		"CREATE USER eraser@'%' IDENTIFIED BY 'e'",
		"GRANT SELECT, DELETE ON "+mysqltest.Database+".phone_numbers TO eraser@'%'",
		"CREATE USER reader@'%' IDENTIFIED BY 'r'",
		"GRANT SELECT ON "+mysqltest.Database+".phone_numbers TO reader@'%'",
	)
	const number, masked = "18612345678", `\+86186\*\*\*\*5678`
	forget := func(user string, wants ...string) {
		t.Helper()
		out, _ := command([]string{"DATA_SOURCE_NAME=" + mysqltest.As(dsn, user)}, "forget", "186 1234 5678").CombinedOutput()
		for _, want := range wants {
			if !regexp.MustCompile(want).Match(out) {
				t.Errorf("forget as %s: got no %q in\n%s", user, want, out)
			}
		}
		if strings.Contains(string(out), "12345678") || strings.Contains(string(out), fake.Accepted()[0].Code) {
			t.Errorf("forget as %s: the output contains the number or the code:\n%s", user, out)
		}
	}
	rows := func() (n int) {
		t.Helper()
		if err := admin.QueryRow("SELECT COUNT(*) FROM phone_numbers WHERE phone_number = '+86" + number + "'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}

	// A send is in flight: forget waits, and the code works.
	release := make(chan struct{})
	fake.OnAccepted(func(dysmsapitest.Accepted) { <-release })
	sent := make(chan error, 1)
	go func() {
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"})
		sent <- err
	}()
	testutil.Eventually(t, "the send is in flight", func() bool { return rows() == 1 })
	cmd := command([]string{"DATA_SOURCE_NAME=" + mysqltest.As(dsn, "eraser:e")}, "forget", number)
	var output testutil.Output
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "forget waits", func() bool {
		return strings.Contains(output.String(), "waiting until no send to the number can be in flight")
	})
	close(release)
	if err := <-sent; err != nil {
		t.Errorf("SendSMS beside forget: got %v; want OK", err)
	}
	if code := fake.Accepted()[0].Code; !p.valid(t, number, code) {
		t.Error("the code of a send in flight during forget: got invalid; want valid")
	}
	cmd.Process.Kill()
	cmd.Wait()

	// The last send is old.
	ctx := metadata.AppendToOutgoingContext(t.Context(), "idempotency-key", "4f6d1c98")
	if _, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
		t.Fatalf("SendSMS: %v", err)
	}
	if _, err := admin.Exec("UPDATE phone_numbers SET begun_at = begun_at - ? WHERE phone_number = ?", time.Minute.Microseconds(), "+86"+number); err != nil {
		t.Fatal(err)
	}
	forget("reader:r", "failed to forget the number.*1142", "DELETE")
	if rows() != 1 {
		t.Fatal("rows after forget without the right: got 0; want 1")
	}
	forget("eraser:e", "number     "+masked+"\n", "code       live until ", "keys       in use: 1", `"msg":"forgot a number","record_deleted":true,"live_codes":1,"keyed_sends":1}`)
	if rows() != 0 {
		t.Error("rows after forget: got 1; want 0")
	}
	forget("eraser:e", "last send  none", `"msg":"forgot a number","record_deleted":false,"live_codes":0,"keyed_sends":0}`)
	if p.valid(t, number, fake.Accepted()[1].Code) {
		t.Error("the code of a forgotten number: got valid; want invalid")
	}
	p.send(t, number)

	file := filepath.Join(t.TempDir(), "none.db")
	out, err := command([]string{"DATA_SOURCE_NAME=sqlite:" + file}, "forget", "10086").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "phone_number must be one mobile number") {
		t.Errorf("a bad number: got %v, %s; want its field", err, out)
	}
}
