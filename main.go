// Command phone-number-service proves that a person holds a phone number; see
// README.md.
package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

//go:embed phonenumberservice.sql
var schema string

var version string // set by the release build

const (
	productionListen  = ":50511"
	developmentListen = "127.0.0.1:50511" // the inbox shows codes
	databaseComesUpIn = 60 * time.Second
)

type commands struct {
	Serve       serveCommand       `cmd:"" default:"withargs" help:"Run the service (the default command). Needs DATA_SOURCE_NAME, ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_SECRET."`
	Dev         devCommand         `cmd:"" help:"Run for development: nothing installed, nothing stored, no SMS; codes are shown on its page, in the terminal and at /inbox.json."`
	Migrate     migrateCommand     `cmd:"" help:"Create the table in DATA_SOURCE_NAME, where it is missing, and exit. serve does that by itself."`
	Healthcheck healthcheckCommand `cmd:"" help:"Exit 0 when the service on this machine is serving, 1 when not."`
	Version     versionCommand     `cmd:"" help:"Print the version."`
}

const description = `Proves that a person holds a phone number: SendSMS sends a six-digit code through Aliyun SMS, Valid says whether a code is right, once.

Secrets are taken from the environment, or from the file that the name with _FILE at its end points to: DATA_SOURCE_NAME (user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db), ALIYUN_ACCESS_KEY_ID, ALIYUN_ACCESS_KEY_SECRET, PHONENUMBER_CODE_KEY (optional).

To try it with nothing installed: phone-number-service dev`

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // of a few MB that live; at the usual 100, a tenth of the throughput goes
	}
	// Libraries that log by themselves could quote what a peer sent: net/http does
	// so with a reply that nobody asked for.
	log.SetOutput(io.Discard)
	dropEmptyVariables()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	command := kong.Parse(&commands{},
		kong.Name("phone-number-service"), kong.Description(description), kong.ShortUsageOnError(),
		kong.Vars{"aliyun_endpoint": sms.DefaultAliyunEndpoint, "failure_kinds": strings.Join(sms.FailureKinds(), ", ")},
		kong.BindTo(ctx, (*context.Context)(nil)),
	)
	if err := command.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "phone-number-service:", err)
		os.Exit(1)
	}
}

type serveCommand struct {
	settings
	AliyunEndpoint string `env:"ALIYUN_ENDPOINT" default:"${aliyun_endpoint}" placeholder:"URL" help:"Where Aliyun SMS is (${default})."`
}

func (c *serveCommand) Run(ctx context.Context) error {
	var f faults
	r := c.resolve(&f, productionListen, "5s")
	s := readSecrets(&f, c.AliyunEndpoint)
	db := openStore(&f, s.dsn)
	if s.dsn == "sqlite::memory:" {
		f.add("DATA_SOURCE_NAME is %s, which loses every code at a restart; it must be a file, such as sqlite:/path/to/file.db (dev needs none)", s.dsn)
	}
	if os.Getenv(failSends) != "" {
		f.add("%s is for dev alone", failSends)
	}
	aliyun, err := sms.NewAliyun(s.aliyun)
	if err != nil && s.aliyun.AccessKeyID != "" && s.aliyun.AccessKeySecret != "" {
		f.add("%v", err)
	}
	if err := f.err(); err != nil {
		return err
	}
	defer db.Close()
	if up, err := prepareStore(ctx, db, r.log); !up {
		return err
	}
	for _, w := range db.Warnings(ctx) {
		r.log.Warn(w)
	}
	return serve(ctx, r, db, s.keys, aliyun, nil)
}

type devCommand struct {
	settings
	FailSends         string `env:"PHONENUMBER_FAIL_SENDS" placeholder:"KIND[:TIMES]" help:"Make all sends fail, or the next TIMES, as at Aliyun: ${failure_kinds}."`
	IgnoreCredentials bool   `help:"Start although Aliyun credentials are in the environment; they are not used."`
}

func (c *devCommand) Run(ctx context.Context) error {
	var f faults
	r := c.resolve(&f, developmentListen, "0s")
	for _, name := range []string{"ALIYUN_ACCESS_KEY_ID", "ALIYUN_ACCESS_KEY_SECRET"} {
		if !c.IgnoreCredentials && os.Getenv(name)+os.Getenv(name+"_FILE") != "" {
			f.add("%s is set, so this may be production, where dev would show every code; use serve, or dev --ignore-credentials", name)
		}
	}
	inbox := &sms.Inbox{Rules: r.rules, Arrived: func(d sms.Delivered) {
		fmt.Printf("  %s  SMS to %s  【%s】 code %s  %s\n", d.SentAt.Format(time.TimeOnly), d.PhoneNumber, d.Signature, d.Code, d.TemplateCode)
	}}
	if c.FailSends != "" {
		if err := inbox.Fail(sms.ParseFailure(c.FailSends)); err != nil {
			f.add("--fail-sends (PHONENUMBER_FAIL_SENDS) is %q; it must be KIND or KIND:TIMES: %v", c.FailSends, err)
		}
	}
	db := openStore(&f, "sqlite::memory:")
	if err := f.err(); err != nil {
		return err
	}
	defer db.Close()
	if up, err := prepareStore(ctx, db, r.log); !up {
		return err
	}
	return serve(ctx, r, db, verify.RandomKeys(), inbox, inbox)
}

// serve runs the service; inbox is nil in production.
func serve(ctx context.Context, r resolved, db *store.DB, keys verify.Keys, sender verify.Sender, inbox *sms.Inbox) error {
	listener, err := net.Listen("tcp", r.listen)
	if err != nil {
		return fmt.Errorf("--listen (PHONENUMBER_LISTEN): %w", err)
	}
	if inbox != nil {
		printBanner(os.Stdout, listener.Addr())
	}
	r.log.Info("listening", "address", listener.Addr().String(), "version", versionText(), "tls", "off", "callers", "anyone who reaches the port")
	return server.Serve(ctx, server.Config{
		Listener: listener,
		Verifier: &verify.Verifier{
			Rules:      r.rules,
			Keys:       keys,
			Store:      db,
			Sender:     sender,
			SMSTimeout: r.smsTimeout,
			Now:        verify.SteadyClock(),
			Random:     rand.Reader,
			Log:        r.log,
		},
		Numbers:    r.numbers,
		Ready:      db.Ready,
		DrainDelay: r.drainDelay,
		Inbox:      inbox,
		Version:    versionText(),
		Log:        r.log,
	})
}

func printBanner(w io.Writer, a net.Addr) {
	address := a.String()
	if t, ok := a.(*net.TCPAddr); ok && t.IP.IsUnspecified() {
		address = fmt.Sprintf("localhost:%d", t.Port)
	}
	fmt.Fprintf(w, `phone-number-service for development: codes are shown here, no SMS is sent, nothing is kept.

  open this page           http://%[1]s/
  gRPC, JSON and gRPC-Web  %[1]s
  for tests                http://%[1]s/openapi.json, docs/testing.md

  curl -d '{"phone_number":"18600000000"}' http://%[1]s/phonenumberservice.PhoneNumberService/SendSMS
  grpcurl -plaintext -d '{"phone_number":"18600000000"}' %[1]s phonenumberservice.PhoneNumberService/SendSMS

`, address)
}

// openStore adds to the faults what is wrong with dsn; a missing one was told.
func openStore(f *faults, dsn string) *store.DB {
	if dsn == "" {
		return nil
	}
	db, err := store.Open(dsn)
	if err != nil {
		f.add("DATA_SOURCE_NAME: %v", err)
	}
	return db
}

// prepareStore waits for a database that is not up yet: containers start in any
// order. It reports whether the database is ready; neither that nor an error
// means that the process was told to stop.
func prepareStore(ctx context.Context, db *store.DB, logger *slog.Logger) (up bool, err error) {
	waiting, cancel := context.WithTimeout(ctx, databaseComesUpIn)
	defer cancel()
	for {
		err := db.Prepare(waiting, schema)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, store.ErrNotUp) && waiting.Err() == nil {
			return false, fmt.Errorf("DATA_SOURCE_NAME: %w", err)
		}
		logger.Warn("waiting for the database", "error", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			logger.Info("stopped while waiting for the database")
			return false, nil
		case <-waiting.Done():
			return false, fmt.Errorf("DATA_SOURCE_NAME: the database did not come up within %v: %w", databaseComesUpIn, err)
		}
	}
}

type migrateCommand struct{}

func (*migrateCommand) Run(ctx context.Context) error {
	var f faults
	unknownVariables(&f, os.Environ())
	db := openStore(&f, dataSourceName(&f))
	if err := f.err(); err != nil {
		return err
	}
	defer db.Close()
	if up, err := prepareStore(ctx, db, slog.New(slog.NewTextHandler(os.Stderr, nil))); !up {
		return err
	}
	fmt.Println("the table is there")
	return nil
}

type healthcheckCommand struct {
	Address string `env:"PHONENUMBER_LISTEN" default:":50511" placeholder:"HOST:PORT" help:"The service's listen address (${default})."`
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
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(host, port), grpc.WithNoProxy(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	res, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return err
	}
	fmt.Println(res.Status)
	if res.Status != healthpb.HealthCheckResponse_SERVING {
		return errors.New("not serving")
	}
	return nil
}

type versionCommand struct{}

func (versionCommand) Run() error {
	fmt.Println(versionText())
	return nil
}

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
