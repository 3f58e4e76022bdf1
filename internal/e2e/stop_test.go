package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
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

func TestSIGTERM_FinishesTheCallInFlight(t *testing.T) {
	fake := dysmsapitest.New(t)
	p := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
	fake.Next(dysmsapitest.Delay(time.Second))
	done := make(chan error, 1)
	go func() {
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
		done <- err
	}()
	testutil.Eventually(t, "the SMS is at Aliyun", func() bool { return len(fake.Accepted()) > 0 })
	p.Signal(syscall.SIGTERM)
	if err := <-done; err != nil {
		t.Errorf("the call in flight: got %v; want OK", err)
	}
	if err := p.Wait(); err != nil {
		t.Errorf("exit: got %v; want code 0", err)
	}
}

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
		_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
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
		if want := "msg=stopped"; !p.Output.Contains(want) {
			t.Errorf("the log lacks %q", want)
		}
	case <-time.After(60 * time.Second): // 24 s, and a margin for slow machines
		t.Error("the process still runs a minute after SIGTERM")
	}
}

func TestSIGHUP_DrainsLikeSIGTERM(t *testing.T) {
	for _, signals := range [][]syscall.Signal{
		{syscall.SIGHUP},
		{syscall.SIGHUP, syscall.SIGHUP},
		{syscall.SIGTERM, syscall.SIGHUP},
		{syscall.SIGHUP, syscall.SIGTERM},
	} {
		t.Run(fmt.Sprint(signals), func(t *testing.T) {
			fake := dysmsapitest.New(t)
			p := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
			fake.Next(dysmsapitest.Delay(2 * time.Second))
			done := make(chan error, 1)
			go func() {
				_, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18612345678", Signature: "阿里云", TemplateCode: "SMS_1"})
				done <- err
			}()
			testutil.Eventually(t, "the SMS is at Aliyun", func() bool { return len(fake.Accepted()) > 0 })
			for _, s := range signals {
				p.Signal(s)
				testutil.Eventually(t, "the program drains", func() bool { return p.Output.Contains("draining") || len(done) > 0 })
			}
			if err := <-done; err != nil {
				t.Errorf("the call in flight: got %v; want OK", err)
			}
			p.mustEnd(t)
		})
	}
}

// nohup starts a program with SIGHUP ignored. The program must not handle it then.
func TestSIGHUP_StaysIgnoredUnderNohup(t *testing.T) {
	const nohup = `trap "" HUP; exec "$0" dev`
	p := process{servicetest.Start(t, "/bin/sh", servicetest.FreeAddress(t), nil, "-c", nohup, servicetest.Program())}.serving(t)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	ignored, err := strconv.ParseUint(regexp.MustCompile(`SigIgn:\s*(\w+)`).FindStringSubmatch(string(status))[1], 16, 64)
	if err != nil || ignored&(1<<(syscall.SIGHUP-1)) == 0 {
		t.Errorf("mask of ignored signals: got %x, %v; want SIGHUP in it", ignored, err)
	}
}
