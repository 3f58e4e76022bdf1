package server

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// LoadOn is the variable that makes this test binary run Load.
const LoadOn = "TEST_LOAD_ON"

const (
	loadStreams = 64
	loadCalls   = 40_000
)

// Load makes many calls to addr over one connection. It panics if a call fails.
func Load(addr string) {
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	client := pb.NewPhoneNumberServiceClient(conn)
	var calling sync.WaitGroup
	for range loadStreams {
		calling.Go(func() {
			for range loadCalls / loadStreams {
				if _, err := client.Valid(context.Background(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); err != nil {
					panic(err)
				}
			}
		})
	}
	calling.Wait()
}

type emptyService struct {
	pb.UnimplementedPhoneNumberServiceServer
}

func (emptyService) Valid(context.Context, *pb.ValidRequest) (*pb.ValidResponse, error) {
	return &pb.ValidResponse{}, nil
}

// BenchmarkTelemetry measures the server's CPU time for an empty call with and without the
// interceptors, which count the call, log it to a file and recover panics. The client is
// another process.
func BenchmarkTelemetry(b *testing.B) {
	const rounds = 7
	defer debug.SetGCPercent(debug.SetGCPercent(200)) // as main does
	file, err := os.Create(filepath.Join(b.TempDir(), "log"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	lines := telemetry.NewLines(file, prometheus.NewCounter(prometheus.CounterOpts{Name: "dropped"})) // as main does
	withTelemetry := func(h slog.Handler) grpc.ServerOption {
		tel := telemetry.Telemetry{
			Metrics: telemetry.NewMetrics("test"), Log: slog.New(telemetry.NewLogHandler(h)),
		}
		handle := newChains(newAdmission(b.Context(), config.DefaultLimits(), tel), nil, tel).calls
		return grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			c := &call{peer: "127.0.0.1", fullMethod: info.FullMethod, req: req, handler: handler}
			return handle(context.WithValue(ctx, callKey{}, c), c)
		})
	}
	servers := []struct {
		name    string
		options []grpc.ServerOption
		perCall []float64
	}{
		{name: "bare"},
		{name: "text", options: []grpc.ServerOption{withTelemetry(slog.NewTextHandler(lines, nil))}},
		{name: "json", options: []grpc.ServerOption{withTelemetry(slog.NewJSONHandler(lines, nil))}},
	}
	for b.Loop() {
		for range rounds {
			for i := range servers {
				servers[i].perCall = append(servers[i].perCall, cpuPerCall(b, servers[i].options...))
			}
		}
	}
	for i := range servers {
		slices.Sort(servers[i].perCall)
		median := servers[i].perCall[len(servers[i].perCall)/2]
		b.ReportMetric(median, "µs/"+servers[i].name)
		if i > 0 {
			b.ReportMetric(median/servers[0].perCall[len(servers[0].perCall)/2], servers[i].name+"/bare")
		}
	}
}

// cpuPerCall returns the CPU time of this process for one call, in microseconds.
func cpuPerCall(b *testing.B, options ...grpc.ServerOption) float64 {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := grpc.NewServer(append(options, grpcOptions(config.DefaultLimits())...)...)
	pb.RegisterPhoneNumberServiceServer(s, emptyService{})
	go s.Serve(listener)
	defer s.Stop()
	client := exec.Command(os.Args[0])
	client.Env = []string{LoadOn + "=" + listener.Addr().String()}
	before := ownCPU(b)
	if out, err := client.CombinedOutput(); err != nil {
		b.Fatal(fmt.Errorf("%w\n%s", err, out))
	}
	return float64((ownCPU(b) - before).Nanoseconds()) / 1000 / loadCalls
}

// ownCPU returns the CPU time of this process.
func ownCPU(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
