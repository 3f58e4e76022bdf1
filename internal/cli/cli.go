// Package cli implements the commands of the program, and connects the other packages according to the
// settings. It is separate from package main so that its tests need no built program.
package cli

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/grpclog"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

const (
	databaseStartTimeout = 60 * time.Second
	lastLinesTimeout     = time.Second // for the last lines of stdout and stderr
)

// commands defines the command line for kong. kong calls the method Run of the command that the arguments
// name. Its arguments are the values that Main binds and the errors of config.Parse.
type commands struct {
	Serve       serveCommand       `kong:"cmd,default='withargs',set='listen=:50511',set='drain_delay=5s',help='Run the service (the default command). Needs DATA_SOURCE_NAME, and ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_SECRET or a RAM role.'"`
	Dev         devCommand         `kong:"cmd,set='listen=127.0.0.1:50511',set='drain_delay=0s',help='Run for development: nothing installed, nothing stored, no SMS; codes are shown on its page, in the terminal and at /inbox.json.'"`
	Check       checkCommand       `kong:"cmd,set='listen=:50511',set='drain_delay=5s',help='Check the settings that serve would have: database, Aliyun, certificates, callers. Sends no SMS, and exits with 0 or 1.'"`
	Migrate     migrateCommand     `cmd:"" help:"Create the table in DATA_SOURCE_NAME if it is missing, check it, and exit. serve does the same at start."`
	Inspect     inspectCommand     `cmd:"" help:"Show what happened to a number: its last send, Aliyun's answer, attempts, live codes, and with credentials for Aliyun if its SMS arrived. Needs DATA_SOURCE_NAME, with the right to read."`
	Forget      forgetCommand      `cmd:"" help:"Delete what is kept of a number, and show it. Waits until no send to the number is in flight. Needs DATA_SOURCE_NAME, with the rights to read and to delete."`
	Token       tokenCommand       `cmd:"" help:"Make a bearer token for a caller, and print it with its entry for the callers file."`
	Healthcheck healthcheckCommand `cmd:"" help:"Exit with 0 if the service on this machine is serving, else with 1."`
	Version     versionCommand     `cmd:"" help:"Print the version."`
}

const description = "Verifies that a person holds a phone number: SendSMS sends a six-digit code through Aliyun SMS, Valid checks a code, and accepts it once.\n\n" +
	"Each secret comes from its variable, or from the file that the variable with _FILE at its end names: DATA_SOURCE_NAME (user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db), ALIYUN_ACCESS_KEY_ID, ALIYUN_ACCESS_KEY_SECRET, ALIYUN_SECURITY_TOKEN (of a temporary access key), PHONENUMBER_CODE_KEY (required with temporary credentials).\n\n" +
	"A RAM role gives temporary credentials in place of an access key: set " + config.RoleVariables + ".\n\n" +
	"To try it with nothing installed: phone-number-service dev"

// Main runs the command that the process's arguments name, and ends the process.
func Main(version string) {
	// Discard the logs of libraries, which could quote data of a peer: net/http logs unsolicited
	// responses.
	log.SetOutput(io.Discard)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	signal.Ignore(syscall.SIGPIPE) // a write to a closed pipe fails instead
	p := newProcess(cmp.Or(version, "(devel)"))
	command, errs := config.Parse(&commands{}, os.Args[1:],
		kong.Name("phone-number-service"), kong.Description(description), kong.ShortUsageOnError(), vars,
		kong.BindTo(untilStopped(), (*context.Context)(nil)), kong.Bind(p),
		kong.Writers(os.Stdout, p.stderr),
		kong.Exit(func(code int) { p.exit(min(code, 1)) }), // kong has 80 for a wrong flag
	)
	if err := command.Run(errs); err != nil {
		fmt.Fprintln(p.stderr, "phone-number-service:", err)
		p.exit(1)
	}
	p.exit(0)
}

// vars has the values of ${…} in the tags of settings.
var vars = kong.Vars{
	"aliyun_endpoint": sms.DefaultEndpoint, "aliyun_pnvs_endpoint": sms.DefaultPNVSEndpoint, "template_variable": sms.DefaultVariable,
	"aliyun_sts_endpoint": ramrole.DefaultSTSEndpoint,
	"failure_kinds":       strings.Join(dev.FailureKinds(), ", "),
}

// process has the values of the process that commands use. Its stdout and stderr are writers that
// never block, so that a stopped or closed reader blocks no call and no exit.
type process struct {
	version        string
	stdout, stderr *telemetry.Lines
	dropped        prometheus.Counter
}

func newProcess(version string) process {
	dropped := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "phonenumber_log_lines_dropped_total", Help: "Log lines that were not written: their reader is too slow, or gone, or the disk is full.",
	})
	p := process{version: version, stderr: telemetry.NewLines(os.Stderr, dropped), dropped: dropped}
	p.stdout = p.stderr // keeps the order of lines if both are the same file
	out, _ := os.Stdout.Stat()
	if errors, _ := os.Stderr.Stat(); !os.SameFile(out, errors) {
		p.stdout = telemetry.NewLines(os.Stdout, dropped)
	}
	return p
}

// exit writes the last lines and ends the process.
func (p process) exit(code int) {
	p.stdout.Flush(lastLinesTimeout)
	p.stderr.Flush(lastLinesTimeout)
	os.Exit(code)
}

// untilStopped returns a context that is done after SIGTERM, SIGINT or SIGHUP.
func untilStopped() context.Context {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop)        // a second signal ends the process at once
	if signal.Ignored(syscall.SIGHUP) { // nohup
		return ctx
	}
	// A terminal that closes can send SIGHUP twice, and systemd can send it after
	// SIGTERM, so only the first has an effect.
	ctx, _ = signal.NotifyContext(ctx, syscall.SIGHUP)
	return ctx
}

// openStore opens dsn. If dsn is "", it returns nil, nil, because SecretReader returns the error.
func openStore(dsn string) (*store.DB, error) {
	if dsn == "" {
		return nil, nil
	}
	db, err := store.Open(dsn)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", config.DataSourceName, err)
	}
	return db, nil
}

// openConfigured opens the store that DATA_SOURCE_NAME names, unless errs has an error.
func openConfigured(errs []error) (*store.DB, error) {
	dsn, err := new(config.SecretReader).DataSourceName()
	db, openErr := openStore(dsn)
	return db, config.Join(append(errs, err, openErr)...)
}

// waitForDatabase retries Prepare for databaseStartTimeout, because containers start in any order. It
// reports whether the database is ready. If the process is stopped first, it returns false, nil.
func waitForDatabase(ctx context.Context, db *store.DB, logger *slog.Logger) (ready bool, err error) {
	waitCtx, cancel := context.WithTimeout(ctx, databaseStartTimeout)
	defer cancel()
	for {
		err := db.Prepare(waitCtx)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, store.ErrUnavailable) && waitCtx.Err() == nil {
			return false, fmt.Errorf("DATA_SOURCE_NAME: %w", err)
		}
		logger.Warn("waiting for the database", "error", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			logger.Info("stopped while waiting for the database")
			return false, nil
		case <-waitCtx.Done():
			return false, fmt.Errorf("DATA_SOURCE_NAME: the database did not come up within %v: %w", databaseStartTimeout, err)
		}
	}
}

type migrateCommand struct{}

func (*migrateCommand) Run(ctx context.Context, p process, errs []error) error {
	db, err := openConfigured(errs)
	if err != nil {
		return err
	}
	defer db.Close()
	if ready, err := waitForDatabase(ctx, db, slog.New(slog.NewTextHandler(p.stderr, nil))); !ready {
		return err
	}
	fmt.Println("the table is there")
	return nil
}

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

type tokenCommand struct{}

func (tokenCommand) Run() error {
	token, hash := auth.NewToken()
	fmt.Printf("token:        %s\ntoken_sha256: %s\n", token, hash)
	return nil
}

type versionCommand struct{}

func (versionCommand) Run(p process) error {
	fmt.Println(p.version)
	return nil
}
