// Package servicetest runs the built program for tests, as its users do.
package servicetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// Build builds the program of the module at root into a new directory, with
// further flags of go build, and returns its path.
func Build(root string, flags ...string) (string, error) {
	dir, err := os.MkdirTemp("", "phone-number-service")
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "phone-number-service")
	cmd := exec.Command("go", append(append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", binary}, flags...), ".")...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return binary, nil
}

// Environment is what serve needs.
func Environment(fake *dysmsapitest.Server, dsn string) []string {
	return []string{
		"DATA_SOURCE_NAME=" + dsn, "ALIYUN_ENDPOINT=" + fake.URL,
		"ALIYUN_ACCESS_KEY_ID=" + fake.AccessKeyID, "ALIYUN_ACCESS_KEY_SECRET=" + fake.AccessKeySecret,
		"PHONENUMBER_DRAIN_DELAY=0s",
	}
}

// A Process is the running program. Its calls go over a connection of its own.
type Process struct {
	pb.PhoneNumberServiceClient
	Health healthpb.HealthClient
	Addr   string
	PID    int
	Output Output

	cmd    *exec.Cmd
	exited chan struct{}
	err    error
}

// Output is what the program wrote to both of its streams.
type Output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// FreeAddress returns a loopback address that nobody listens on.
func FreeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Start starts the program at addr, with env and nothing else of this process's
// own, and does not wait for it. It is killed when the test ends.
func Start(t testing.TB, binary, addr string, env []string, args ...string) *Process {
	t.Helper()
	p := &Process{Addr: addr, cmd: exec.Command(binary, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.Output, &p.Output
	return p.start(t, env)
}

// StartWithStreams is Start, with these as the program's stdout and stderr.
func StartWithStreams(t testing.TB, stdout, stderr io.Writer, binary, addr string, env []string, args ...string) *Process {
	t.Helper()
	p := &Process{Addr: addr, cmd: exec.Command(binary, args...), exited: make(chan struct{})}
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
			t.Logf("output of %v at %s:\n%s", args, addr, &p.Output)
		}
	})
	return p
}

// Serving waits until the program's health says so.
func (p *Process) Serving(t testing.TB) *Process {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		// A gRPC client that was refused once would wait a second to dial again.
		if c, err := net.Dial("tcp", p.Addr); err == nil {
			c.Close()
			res, err := p.Health.Check(ctx, &healthpb.HealthCheckRequest{})
			if err == nil && res.Status == healthpb.HealthCheckResponse_SERVING {
				return p
			}
		}
		select {
		case <-p.exited:
			t.Fatalf("exited: %v\n%s", p.err, &p.Output)
		case <-time.After(time.Millisecond):
		}
	}
	t.Fatalf("not serving within 30 s\n%s", &p.Output)
	return nil
}

// Kill is kill -9.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// Signal sends the program a signal.
func (p *Process) Signal(s syscall.Signal) { p.cmd.Process.Signal(s) }

// Wait waits for the program's end and returns an error unless its exit code is 0.
func (p *Process) Wait() error {
	<-p.exited
	return p.err
}
