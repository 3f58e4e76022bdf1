// Package servicetest builds and runs the program for tests.
package servicetest

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// Build builds the program of the module at root into a new directory, with further flags of
// go build. It returns the path of the program.
func Build(root string, flags ...string) (string, error) {
	dir, err := os.MkdirTemp("", "phone-number-service")
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "phone-number-service")
	cmd := exec.Command("go", append(append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", program}, flags...), ".")...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return program, nil
}

// maxLogged is the number of bytes of a program's output in the log of a failed test. More would hide
// the messages of the test.
const maxLogged = 8 << 10

var built string // path of the program, after the first call of Program

// Program builds the program of this module at the first call, as it is released, and returns its
// path. RemoveProgram deletes it.
var Program = sync.OnceValue(func() string {
	_, file, _, _ := runtime.Caller(0)
	program, err := Build(filepath.Join(filepath.Dir(file), "../../.."))
	if err != nil {
		panic(err)
	}
	built = program
	return program
})

// RemoveProgram deletes the program that Program built. TestMain calls it after the tests.
func RemoveProgram() {
	if built != "" {
		os.RemoveAll(filepath.Dir(built))
	}
}

// Environment returns the variables that serve needs, and the variable of a CA that the tests have.
func Environment(fake *dysmsapitest.Server, dsn string) []string {
	return []string{
		"DATA_SOURCE_NAME=" + dsn, "ALIYUN_ENDPOINT=" + fake.URL, "ALIYUN_PNVS_ENDPOINT=" + fake.PNVSURL,
		"ALIYUN_ACCESS_KEY_ID=" + fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET=" + fake.AccessKeySecret,
		"PHONENUMBER_DRAIN_DELAY=0s", "SSL_CERT_FILE=" + os.Getenv("SSL_CERT_FILE"),
	}
}

// A Process is the running program. Its methods for calls use one gRPC connection.
type Process struct {
	pb.PhoneNumberServiceClient
	Health healthpb.HealthClient
	Addr   string
	PID    int
	Output testutil.Output // stdout and stderr

	cmd    *exec.Cmd
	exited chan struct{}
	err    error
}

var lastPort atomic.Uint32

func init() { lastPort.Store(rand.Uint32()) }

// FreeAddress returns a loopback address on which no process listens, and another one at each call.
// Its port is below 20000. Package mysqltest uses ports above, and Linux gives ports from 32768 to
// connections and to listeners at port 0, so they cannot take it before the program listens.
func FreeAddress(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := 10_000 + lastPort.Add(1)%10_000
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no free port")
	return ""
}

// Start starts the program at addr and does not wait until it serves. Its environment is env and
// the address only. It is killed when the test ends.
func Start(t testing.TB, program, addr string, env []string, args ...string) *Process {
	t.Helper()
	p := &Process{Addr: addr, cmd: exec.Command(program, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.Output, &p.Output
	return p.start(t, env)
}

// StartWithStreams is Start with other streams as the program's stdout and stderr.
func StartWithStreams(t testing.TB, stdout, stderr io.Writer, program, addr string, env []string, args ...string) *Process {
	t.Helper()
	p := &Process{Addr: addr, cmd: exec.Command(program, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = stdout, stderr
	return p.start(t, env)
}

func (p *Process) start(t testing.TB, env []string) *Process {
	t.Helper()
	addr, args := p.Addr, p.cmd.Args[1:]
	p.cmd.Env = append(append([]string{}, env...), "PHONENUMBER_LISTEN="+addr)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.PID = p.cmd.Process.Pid
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	p.PhoneNumberServiceClient, p.Health = pb.NewPhoneNumberServiceClient(conn), healthpb.NewHealthClient(conn)
	t.Cleanup(func() {
		conn.Close()
		p.Kill()
		if t.Failed() {
			output := p.Output.String()
			t.Logf("end of the output of %v at %s:\n%s", args, addr, output[max(0, len(output)-maxLogged):])
		}
	})
	return p
}

// Serving waits until the program's health is SERVING.
func (p *Process) Serving(t testing.TB) *Process {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		// After a failed dial a gRPC client waits a second. So dial without it first.
		if c, err := net.Dial("tcp", p.Addr); err == nil {
			c.Close()
			res, err := p.Health.Check(ctx, &healthpb.HealthCheckRequest{})
			if err == nil && res.Status == healthpb.HealthCheckResponse_SERVING {
				return p
			}
		}
		select {
		case <-p.exited:
			t.Fatalf("the program exited before it served: %v\n%s", p.err, &p.Output)
		case <-time.After(time.Millisecond):
		}
	}
	t.Fatalf("health: not SERVING within 90 s\n%s", &p.Output)
	return nil
}

// Kill ends the program as kill -9 does.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// Signal sends a signal to the program.
func (p *Process) Signal(s syscall.Signal) { p.cmd.Process.Signal(s) }

// Wait waits for the end of the program. It returns an error unless the exit code is 0.
func (p *Process) Wait() error {
	<-p.exited
	return p.err
}
