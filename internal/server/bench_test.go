package server_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// empty responds immediately.
type empty struct {
	pb.UnimplementedPhoneNumberServiceServer
}

func (empty) Valid(context.Context, *pb.ValidRequest) (*pb.ValidResponse, error) {
	return &pb.ValidResponse{}, nil
}

// BenchmarkCall compares Valid, on a replica that has the record in memory, with a call of a
// server without any logic. Both include the client's work.
func BenchmarkCall(b *testing.B) {
	const attempts = verify.MaxAttemptLimit
	number := servertest.FreshNumber()
	guess := &pb.ValidRequest{PhoneNumber: number, Code: "000000"}

	b.Run("empty", func(b *testing.B) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		s := grpc.NewServer()
		pb.RegisterPhoneNumberServiceServer(s, empty{})
		go s.Serve(listener)
		defer s.Stop()
		conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		client := pb.NewPhoneNumberServiceClient(conn)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := client.Valid(b.Context(), guess); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Valid", func(b *testing.B) {
		sender := senderFunc(func(verify.Message) (verify.Receipt, error) { return verify.Receipt{}, nil })
		r := servertest.Start(b, servertest.OpenStore(b, mysqltest.DSN(b)), sender, func(c *server.Config) {
			c.Telemetry.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
			c.Verifier.Rules.AttemptLimit = attempts
		})
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if i%attempts == 0 {
				b.StopTimer()
				r.MustSend(b, number)
				b.StartTimer()
			}
			if _, err := r.Valid(b.Context(), guess); err != nil {
				b.Fatal(err)
			}
		}
	})
}
