// Package e2e tests the built program: its commands, settings, signals, files and output.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	_ "github.com/go-sql-driver/mysql"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	_ "github.com/liulinhuai/phone-number-service/internal/cli" // go test repeats these tests after a change
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestMain(m *testing.M) {
	code := mysqltest.Run(m)
	servicetest.RemoveProgram()
	os.Exit(code)
}

// command returns a command of the program. Its environment is env only.
func command(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command(servicetest.Program(), args...)
	cmd.Env = env
	return cmd
}

type process struct{ *servicetest.Process }

// run starts the program on a free port, without waiting for it.
func run(t *testing.T, env []string, args ...string) process {
	t.Helper()
	return process{servicetest.Start(t, servicetest.Program(), servicetest.FreeAddress(t), env, args...)}
}

func (p process) serving(t *testing.T) process {
	t.Helper()
	p.Serving(t)
	return p
}

func (p process) send(t *testing.T, number string) {
	t.Helper()
	if _, err := p.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
		t.Fatalf("SendSMS: %v", err)
	}
}

func (p process) valid(t *testing.T, number, code string) bool {
	t.Helper()
	res, err := p.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
	if err != nil {
		t.Fatalf("Valid: %v", err)
	}
	return res.Valid
}

// health returns the status of the health check.
func (p process) health(t *testing.T) healthpb.HealthCheckResponse_ServingStatus {
	t.Helper()
	res, err := p.Health.Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatalf("health: %v", err)
	}
	return res.Status
}

// validBy calls Valid with a token and returns the status code.
func (p process) validBy(t *testing.T, token string) codes.Code {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
	_, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: "18612345678", Code: "000000"})
	return status.Code(err)
}

// logged returns a condition that is true if the program has written text since the call
// of logged.
func (p process) logged(text string) func() bool {
	before := p.Output.Count(text)
	return func() bool { return p.Output.Count(text) > before }
}

// mustStop sends SIGTERM. It requires exit code 0 within the time that docs/install.md names.
func (p process) mustStop(t *testing.T) {
	t.Helper()
	p.Signal(syscall.SIGTERM)
	p.mustEnd(t)
}

// mustEnd requires exit code 0 within 30 s.
func (p process) mustEnd(t *testing.T) {
	t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("exit: got %v; want code 0", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("the program still runs 30 s after the signal; want exit code 0")
	}
}

// write puts each secret into a file in dir and returns the _FILE variables.
func write(t *testing.T, dir string, secrets map[string]string) (env []string) {
	t.Helper()
	for name, value := range secrets {
		env = append(env, name+"_FILE="+testutil.WriteFile(t, dir, name, value+"\n"))
	}
	return env
}

// newToken runs the command token and returns the two values that it prints.
func newToken(t *testing.T) (token, hash string) {
	t.Helper()
	out, err := command(nil, "token").CombinedOutput()
	if err != nil {
		t.Fatalf("token: %v\n%s", err, out)
	}
	if n, err := fmt.Sscanf(string(out), "token:        %s\ntoken_sha256: %s\n", &token, &hash); n != 2 {
		t.Fatalf("token printed %q: %v", out, err)
	}
	return token, hash
}

// inspect runs the command inspect and returns its output.
func inspect(t *testing.T, dsn, number string) string {
	t.Helper()
	out, err := command([]string{"DATA_SOURCE_NAME=" + dsn, "TZ=UTC"}, "inspect", number).CombinedOutput()
	if err != nil {
		t.Fatalf("inspect: %v\n%s", err, out)
	}
	return string(out)
}
