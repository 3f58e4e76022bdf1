package cli

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/server"
)

type healthcheckCommand struct {
	Address  string `env:"PHONENUMBER_LISTEN" default:":50511" placeholder:"HOST:PORT" help:"The service's listen address (${default})."`
	TLSCert  string `env:"PHONENUMBER_TLS_CERT" name:"tls-cert" placeholder:"FILE" help:"Set it as for serve: if it is set, the port uses TLS."`
	Liveness bool   `help:"Check only that the process answers, not its database."`
}

func (c *healthcheckCommand) Run(ctx context.Context) error {
	host, port, err := net.SplitHostPort(c.Address)
	if err != nil {
		return fmt.Errorf("--address (PHONENUMBER_LISTEN) must be host:port or :port, such as 127.0.0.1:50511")
	}
	switch host {
	case "", "0.0.0.0":
		host = "127.0.0.1"
	case "::":
		host = "::1"
	}
	creds := insecure.NewCredentials()
	if c.TLSCert != "" {
		// The request contains no secrets, and the certificate need not name this address.
		creds = credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}) //nolint:gosec // see above
	}
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(host, port), grpc.WithNoProxy(), grpc.WithTransportCredentials(creds))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	service := ""
	if c.Liveness {
		service = server.Liveness
	}
	res, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	fmt.Println(res.Status)
	if res.Status != healthpb.HealthCheckResponse_SERVING {
		return errors.New("not serving")
	}
	return nil
}
