package phonenumberservice_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func Example() {
	address, inbox, stop := startService()
	defer stop()

	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	client := pb.NewPhoneNumberServiceClient(conn)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	_, err = client.SendSMS(ctx, &pb.SendSMSRequest{
		PhoneNumber:  "18600000000",
		Signature:    "Acme",
		TemplateCode: "SMS_123456789",
	})
	if err != nil {
		log.Fatal(err)
	}

	// The user reads the SMS and types the code. In this example an inbox has it.
	message := inbox.Messages("+8618600000000")[0]
	for range 2 {
		res, err := client.Valid(ctx, &pb.ValidRequest{PhoneNumber: "+86 186 0000 0000", Code: message.Code})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(res.Valid)
	}
	// Output:
	// true
	// false
}

// startService runs the service in this process, with the inbox that "phone-number-service dev"
// has in place of Aliyun.
func startService() (address string, inbox *dev.Inbox, stop func()) {
	db, err := store.Open("sqlite::memory:")
	if err != nil {
		log.Fatal(err)
	}
	if err := db.Prepare(context.Background()); err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	inbox = &dev.Inbox{}
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		server.Serve(ctx, server.Config{
			Listener: listener,
			Verifier: verify.New(verify.Config{
				Rules:      verify.Rules{AttemptLimit: 3, CodeTTL: 10 * time.Minute},
				Keys:       verify.RandomKeys(),
				Store:      db,
				Sender:     inbox,
				SMSTimeout: 5 * time.Second,
				Now:        verify.SteadyClock(),
				Random:     rand.Reader,
				Log:        slog.New(slog.DiscardHandler),
			}),
			Numbers:   verify.NumberParser{Region: "CN", Plan: numberplan.Mobile},
			Ready:     db.Ready,
			Limits:    config.DefaultLimits(),
			Telemetry: telemetry.Telemetry{Metrics: telemetry.NewMetrics("example"), Log: slog.New(slog.DiscardHandler)},
		})
	}()
	return listener.Addr().String(), inbox, func() { cancel(); <-stopped; db.Close() }
}
