package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestConnections_OverTheLimitAreClosed(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Limits.Connections = 2 })
	var open []net.Conn
	closed := func(c net.Conn) bool {
		c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err := c.Read(make([]byte, 1))
		return errors.Is(err, io.EOF)
	}
	for range 2 {
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	testutil.Eventually(t, "a third connection is closed", func() bool {
		c, err := net.Dial("tcp", r.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return closed(c)
	})
	for _, c := range open {
		c.Close()
	}
	if _, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("a call after the connections closed: got %v; want OK", err)
	}
}

// HTTP connections have the same maximum age as gRPC connections. Otherwise a client with a
// certificate of a removed CA could keep its connection permanently.
func TestConnectionAge_HTTPClosesAfterTheResponse(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Limits.ConnectionAge = 300 * time.Millisecond })
	client := httpsClient(t, nil)
	ask := func() bool {
		q, err := http.NewRequest(http.MethodPost, "http://"+r.Addr+sendPath, strings.NewReader(`{"phone_number":"18600000000"}`))
		if err != nil {
			t.Fatal(err)
		}
		res, err := client.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		io.Copy(io.Discard, res.Body)
		if res.StatusCode != 200 {
			t.Fatalf("got %d; want 200", res.StatusCode)
		}
		return res.Close
	}
	if ask() {
		t.Error("a new connection: got closed; want open")
	}
	testutil.Eventually(t, "the old connection is closed", ask)
	if ask() {
		t.Error("the connection after it: got closed; want open")
	}
}

// Connections are replaced at their maximum age, and no call fails.
func TestConnectionAge_GRPCFailsNoCall(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) {
		c.Limits.ConnectionAge, c.Limits.ConnectionAgeGrace = 200*time.Millisecond, 5*time.Second
	})
	calls := 0
	for deadline := time.Now().Add(1500 * time.Millisecond); time.Now().Before(deadline); {
		if _, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000", Code: "000000"}); err != nil {
			t.Fatalf("call %d: got %v; want OK", calls+1, err)
		}
		calls++
	}
}

// Canceled health watches do not count as early resets (rapid reset).
func TestConnections_SurviveManyStreams(t *testing.T) {
	r, _ := startDev(t)
	health := healthpb.NewHealthClient(r.Conn)
	for i := range 1200 {
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := health.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		cancel()
		if err != nil {
			t.Fatalf("stream %d: got %v; want a response", i, err)
		}
	}
	if r.Log.Contains("reason=frames") {
		t.Error("the log: got a connection closed for its streams; want none")
	}
}

func TestConnections_SilentAreClosed(t *testing.T) {
	r, _ := startDev(t)
	for _, first := range []string{"", "P", "PRI * HTTP/2.0\r\n", "POST / HTTP/1.1\r\nHost:"} {
		t.Run(fmt.Sprintf("after %q", first), func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", r.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, first)
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection: got open; want closed")
			}
		})
	}
}
