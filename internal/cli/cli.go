// Package cli has the commands of the program: it connects the other packages as settings say.
// It is a package so that main is only the build's version and its tests need no built program.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"google.golang.org/grpc/grpclog"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/store"
)

const databaseStartTimeout = 60 * time.Second

type commands struct {
	Serve       serveCommand       `cmd:"" default:"withargs" set:"listen=:50511" set:"drain_delay=5s" help:"Run the service (the default command). Needs DATA_SOURCE_NAME, ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_SECRET."`
	Dev         devCommand         `cmd:"" set:"listen=127.0.0.1:50511" set:"drain_delay=0s" help:"Run for development: nothing installed, nothing stored, no SMS; codes are shown on its page, in the terminal and at /inbox.json."`
	Migrate     migrateCommand     `cmd:"" help:"Create the table in DATA_SOURCE_NAME if it is missing, check it, and exit. serve does the same at start."`
	Inspect     inspectCommand     `cmd:"" help:"Show what happened to a number: its last send, Aliyun's answer, attempts, live codes. Needs DATA_SOURCE_NAME, with the right to read."`
	Token       tokenCommand       `cmd:"" help:"Make a bearer token for a caller, and print it with its entry for the callers file."`
	Healthcheck healthcheckCommand `cmd:"" help:"Exit with 0 if the service on this machine is serving, else with 1."`
	Version     versionCommand     `cmd:"" help:"Print the version."`
}

const description = `Verifies that a person holds a phone number: SendSMS sends a six-digit code through Aliyun SMS, Valid checks a code, and accepts it once.

Each secret comes from its variable, or from the file that the variable with _FILE at its end names: DATA_SOURCE_NAME (user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db), ALIYUN_ACCESS_KEY_ID, ALIYUN_ACCESS_KEY_SECRET, PHONENUMBER_CODE_KEY (optional).

To try it with nothing installed: phone-number-service dev`

// Main runs the command that the process's arguments name, and ends the process.
func Main(version string) {
	// Discard the logs of libraries, which could quote what a peer sent: net/http logs
	// unsolicited responses.
	log.SetOutput(io.Discard)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	signal.Ignore(syscall.SIGPIPE) // a write to a closed pipe fails instead
	p := newProcess(cmp.Or(version, "(devel)"))
	command, errs := config.Parse(&commands{}, os.Args[1:],
		kong.Name("phone-number-service"), kong.Description(description), kong.ShortUsageOnError(), vars,
		kong.BindTo(untilStopped(), (*context.Context)(nil)), kong.Bind(p),
		kong.Writers(os.Stdout, p.stderr), kong.Exit(p.exit),
	)
	if err := command.Run(errs); err != nil {
		fmt.Fprintln(p.stderr, "phone-number-service:", err)
		p.exit(1)
	}
	p.exit(0)
}

var vars = kong.Vars{"aliyun_endpoint": sms.DefaultAliyunEndpoint, "failure_kinds": strings.Join(dev.FailureKinds(), ", ")}

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

// openStore opens dsn. It returns nil if dsn is "", which SecretReader reports.
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

// waitForDatabase retries for databaseStartTimeout, because containers start in any order. It
// reports whether the database is ready. It returns false, nil if the process is stopped first.
func waitForDatabase(ctx context.Context, db *store.DB, logger *slog.Logger) (up bool, err error) {
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
	if up, err := waitForDatabase(ctx, db, slog.New(slog.NewTextHandler(p.stderr, nil))); !up {
		return err
	}
	fmt.Println("the table is there")
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
