package main

import (
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// The database and the trace collector do not respond. Even then the process ends within the
// time that docs/install.md names.
func TestSIGTERM_EndsTheProcessIfPeersHang(t *testing.T) {
	t.Parallel()
	database, fake := mysqltest.Start(t), dysmsapitest.New(t)
	collector, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never responds
	if err != nil {
		t.Fatal(err)
	}
	defer collector.Close()
	p := run(t, append(servicetest.Environment(fake, database.DSN(mysqltest.Database)),
		"OTEL_EXPORTER_OTLP_ENDPOINT=http://"+collector.Addr().String())).serving(t)
	p.send(t, "18612345678")
	fake.Next(dysmsapitest.Delay(time.Second))
	callEnded := make(chan error, 1)
	go func() {
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345679", Signature: "阿里云", TemplateCode: "SMS_1"})
		callEnded <- err
	}()
	testutil.Eventually(t, "the SMS is at Aliyun", func() bool { return len(fake.Accepted()) == 2 })
	if err := syscall.Kill(database.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p.Signal(syscall.SIGTERM)
	if err := <-callEnded; status.Code(err) != codes.Unknown {
		t.Errorf("the call in flight: got %v; want Unknown, since its outcome is not stored", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("exit: got %v; want code 0", err)
		}
		if want := "msg=stopped"; !strings.Contains(p.Output.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	case <-time.After(60 * time.Second): // 24 s, and a margin for slow machines
		t.Error("the process still runs a minute after SIGTERM")
	}
}
