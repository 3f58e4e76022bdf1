// Command phone-number-service verifies that a person holds a phone number; see README.md.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"reflect"
	"runtime/debug"
	"strings"
	"sync"
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
	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var version string // set by the release build

const (
	productionListen     = ":50511"
	developmentListen    = "127.0.0.1:50511" // the inbox shows codes
	metricsListen        = "127.0.0.1:9090"
	databaseStartTimeout = 60 * time.Second
	closeTimeout         = 5 * time.Second // for the purge, the last traces and the database
)

type commands struct {
	Serve       serveCommand       `cmd:"" default:"withargs" help:"Run the service (the default command). Needs DATA_SOURCE_NAME, ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_SECRET."`
	Dev         devCommand         `cmd:"" help:"Run for development: nothing installed, nothing stored, no SMS; codes are shown on its page, in the terminal and at /inbox.json."`
	Migrate     migrateCommand     `cmd:"" help:"Create the table in DATA_SOURCE_NAME if it is missing, check it, and exit. serve does the same at start."`
	Inspect     inspectCommand     `cmd:"" help:"Show what happened to a number: its last send, Aliyun's answer, attempts, live codes. Needs DATA_SOURCE_NAME, with the right to read."`
	Token       tokenCommand       `cmd:"" help:"Make a bearer token for a caller, and print it with its entry for the callers file."`
	Healthcheck healthcheckCommand `cmd:"" help:"Exit with 0 if the service on this machine is serving, else with 1."`
	Version     versionCommand     `cmd:"" help:"Print the version."`
}

const description = `Verifies that a person holds a phone number: SendSMS sends a six-digit code through Aliyun SMS, Valid checks a code, and accepts it once.

Each secret comes from its variable, or from the file that the variable with _FILE at its end names: DATA_SOURCE_NAME (user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db), ALIYUN_ACCESS_KEY_ID, ALIYUN_ACCESS_KEY_SECRET, PHONENUMBER_CODE_KEY (optional).

To try it with nothing installed: phone-number-service dev`

func main() {
	if os.Getenv("GOGC") == "" {
		// The default of 100 costs 10 % of the throughput on this small heap. 400 lets a hostile
		// client push memory use over 100 MB (docs/performance.md).
		debug.SetGCPercent(200)
	}
	// Discard the logs of libraries, which could quote what a peer sent: net/http logs
	// unsolicited responses.
	log.SetOutput(io.Discard)
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	unsetEmptyEnv()
	signal.Ignore(syscall.SIGPIPE) // a write to a closed pipe fails instead
	out := newOutput()
	ctx := untilStopped()
	command := kong.Parse(&commands{},
		kong.Name("phone-number-service"), kong.Description(description), kong.ShortUsageOnError(),
		kong.Vars{"aliyun_endpoint": sms.DefaultAliyunEndpoint, "failure_kinds": strings.Join(dev.FailureKinds(), ", ")},
		kong.BindTo(ctx, (*context.Context)(nil)), kong.Bind(out),
		kong.Writers(os.Stdout, out.stderr), kong.Exit(out.exit),
	)
	if err := command.Run(); err != nil {
		fmt.Fprintln(out.stderr, "phone-number-service:", err)
		out.exit(1)
	}
	out.exit(0)
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

type serveCommand struct {
	settings
	AliyunEndpoint      string `env:"ALIYUN_ENDPOINT" default:"${aliyun_endpoint}" placeholder:"URL" help:"URL of Aliyun SMS (${default})."`
	DatabaseConnections string `env:"PHONENUMBER_DATABASE_CONNECTIONS" default:"64" placeholder:"N" help:"Maximum of open connections to a MySQL server, 1 to 1000 (${default})."`
}

func (c *serveCommand) Run(ctx context.Context, out output) error {
	var f configErrors
	r := c.parse(&f, out, commandDefaults{listen: productionListen, drainDelay: "5s"})
	s := readSecrets(&f)
	keys := s.keys(&f)
	db := openStore(&f, s.dsn)
	if n := number(&f, "--database-connections (PHONENUMBER_DATABASE_CONNECTIONS)", c.DatabaseConnections, 1, 1000); db != nil {
		db.LimitConnections(n)
	}
	if s.dsn == "sqlite::memory:" {
		f.add("DATA_SOURCE_NAME is %s, which loses every code at a restart; it must be a file, such as sqlite:/path/to/file.db (dev needs none)", s.dsn)
	}
	if os.Getenv(failSends) != "" {
		f.add("%s is for dev alone", failSends)
	}
	aliyun := c.aliyun(&f, s)
	if err := f.err(); err != nil {
		return err
	}
	defer db.Close()
	if up, err := waitForDatabase(ctx, db, r.log); !up {
		return err
	}
	for _, w := range db.Warnings(ctx) {
		r.log.Warn(w)
	}
	v := r.verifier(db, keys, aliyun)
	apply := func(before, now secrets) error {
		// Apply all secrets or none: first the steps that can fail.
		if err := sms.CheckAccessKey(now.keyID, now.keySecret); err != nil {
			return err
		}
		if before.dsn != now.dsn {
			if err := db.ReplaceDSN(ctx, now.dsn); err != nil {
				return fmt.Errorf("DATA_SOURCE_NAME: %w", err)
			}
		}
		if next := now.keys(&configErrors{}); !reflect.DeepEqual(next, before.keys(&configErrors{})) {
			if now.codeKeys == "" { // keep the old keys for codes already sent
				const maxOldKeys = 4
				next = append(next, keys[:min(len(keys), maxOldKeys)]...)
			}
			keys = next
			v.ReplaceKeys(keys)
		}
		return aliyun.ReplaceAccessKey(now.keyID, now.keySecret)
	}
	if secretsInFiles() {
		go watchFiles(ctx, r.log, r.access.lastReload, s, secretFiles(apply))
	}
	return serve(ctx, r, db, v, nil, aliyun.Collectors()...)
}

func (c *serveCommand) aliyun(f *configErrors, s secrets) *sms.Aliyun {
	endpoint, err := sms.ParseAliyunEndpoint(c.AliyunEndpoint)
	if err != nil {
		f.add("--aliyun-endpoint (ALIYUN_ENDPOINT): %v", err)
		return nil
	}
	if err := sms.CheckProxy(endpoint); err != nil {
		f.add("%v", err)
		return nil
	}
	aliyun, err := sms.NewAliyun(sms.AliyunConfig{AccessKeyID: s.keyID, AccessKeySecret: s.keySecret, Endpoint: c.AliyunEndpoint})
	if err != nil && s.keyID != "" && s.keySecret != "" {
		f.add("%v", err)
	}
	return aliyun
}

type devCommand struct {
	settings
	FailSends         string `env:"PHONENUMBER_FAIL_SENDS" placeholder:"KIND[:TIMES]" help:"Make all sends fail, or the next TIMES, as Aliyun would: ${failure_kinds}."`
	IgnoreCredentials bool   `help:"Start although Aliyun credentials are in the environment; they are not used."`
}

func (c *devCommand) Run(ctx context.Context, out output) error {
	var f configErrors
	r := c.parse(&f, out, commandDefaults{listen: developmentListen, drainDelay: "0s", origins: "*"})
	for _, name := range []string{"ALIYUN_ACCESS_KEY_ID", "ALIYUN_ACCESS_KEY_SECRET"} {
		if !c.IgnoreCredentials && os.Getenv(name)+os.Getenv(name+"_FILE") != "" {
			f.add("%s is set, so this may be production, where dev would show every code; use serve, or dev --ignore-credentials", name)
		}
	}
	inbox := &dev.Inbox{Rules: r.rules, OnMessage: func(d dev.Message) {
		fmt.Fprintf(out.stdout, "  %s  SMS to %s  【%s】 code %s  %s\n", d.SentAt.Format(time.TimeOnly), d.PhoneNumber, d.Signature, d.Code, d.TemplateCode)
	}}
	if c.FailSends != "" {
		if err := inbox.SetFailure(dev.ParseFailure(c.FailSends)); err != nil {
			f.add("--fail-sends (PHONENUMBER_FAIL_SENDS) is %q; it must be KIND or KIND:TIMES: %v", c.FailSends, err)
		}
	}
	db := openStore(&f, "sqlite::memory:")
	if err := f.err(); err != nil {
		return err
	}
	defer db.Close()
	if up, err := waitForDatabase(ctx, db, r.log); !up {
		return err
	}
	return serve(ctx, r, db, r.verifier(db, verify.RandomKeys(), inbox), inbox)
}

func (r config) verifier(db *store.DB, keys verify.Keys, sender verify.Sender) *verify.Verifier {
	return &verify.Verifier{
		Rules: r.rules, Keys: keys, Store: db, Sender: sender, SMSTimeout: r.smsTimeout,
		Now: verify.SteadyClock(), Random: rand.Reader, Log: r.log,
	}
}

// serve runs the service, for development if inbox is not nil.
func serve(ctx context.Context, r config, db *store.DB, v *verify.Verifier, inbox *dev.Inbox, collectors ...prometheus.Collector) error {
	defer r.sampled.Flush()
	listener, err := net.Listen("tcp", r.listen)
	if err != nil {
		return fmt.Errorf("--listen (PHONENUMBER_LISTEN): %w", err)
	}
	metricsListener, err := listenMetrics(r)
	if err != nil {
		return err
	}
	tracer, stopTracing, err := telemetry.Tracing(ctx, versionText(), r.log)
	if err != nil {
		return err
	}
	defer stopTracing()
	tel := telemetry.Telemetry{Metrics: telemetry.NewMetrics(versionText()), Tracer: tracer, Log: r.log}
	tel.Metrics.Register(append(collectors, db.Collectors()...)...)
	tel.Metrics.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "phonenumber_outcomes_pending", Help: "Outcomes of sends that are still being stored.",
	}, func() float64 { return float64(v.Pending()) }))
	tel.Metrics.Register(r.access.lastReload, r.out.dropped)
	if r.access.tls != nil {
		tel.Metrics.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "phonenumber_certificate_expiry_timestamp_seconds", Help: sms.CertificateHelp, ConstLabels: prometheus.Labels{"certificate": "server"},
		}, func() float64 { return float64(r.access.tls.Expires().Unix()) }))
	}
	r.access.watchFiles(ctx, tel.Metrics, r.log)
	v.Store, v.Sender = tel.Store(v.Store), tel.Sender(v.Sender)
	var background sync.WaitGroup
	defer background.Wait()
	serveCtx, stop := context.WithCancel(ctx)
	defer stop()
	background.Go(func() { db.RunPurge(serveCtx, r.retention, r.log) })
	metricsAt := "nowhere"
	if metricsListener != nil {
		metricsAt = metricsListener.Addr().String()
	}
	config := server.Config{
		Listener:     listener,
		Verifier:     v,
		Numbers:      r.numbers,
		Ready:        db.Ready,
		DrainDelay:   r.drainDelay,
		TLS:          r.access.tls,
		Authenticate: r.access.authenticator(),
		Origins:      r.access.origins,
		Reflection:   r.access.reflects,
		Limits:       r.limits,
		Version:      versionText(),
		Telemetry:    tel,
		Metrics:      metricsListener,
	}
	tlsState, callers, warnings := r.access.startupSummary()
	if inbox != nil {
		dev.Configure(&config, inbox)
		printBanner(r.out.stdout, listener.Addr(), r.access.tls != nil)
		warnings = nil // they are about production
	}
	r.log.Info("listening", "address", listener.Addr().String(), "metrics", metricsAt, "version", versionText(), "tls", tlsState,
		"callers", callers)
	for _, w := range warnings {
		r.log.Warn(w)
	}
	context.AfterFunc(ctx, func() { exitAfter(config.StopTimeout()+closeTimeout, r.log) })
	return server.Serve(ctx, config)
}

// exitAfter ends the process after timeout, if it still runs. It bounds the steps after Serve.
func exitAfter(timeout time.Duration, log *slog.Logger) {
	time.Sleep(timeout)
	log.Error("exiting by force: stopping took too long", "after", timeout.String())
	time.Sleep(time.Second) // for the log line
	os.Exit(1)
}

// listenMetrics returns a nil listener if no address is set and the default one is in use,
// because other replicas may run on this machine.
func listenMetrics(r config) (net.Listener, error) {
	listener, err := net.Listen("tcp", cmp.Or(r.metrics, metricsListen))
	switch {
	case err == nil:
		return listener, nil
	case r.metrics != "":
		return nil, fmt.Errorf("--metrics-listen (PHONENUMBER_METRICS_LISTEN): %w", err)
	}
	r.log.Warn("metrics are not served; set PHONENUMBER_METRICS_LISTEN", "error", err)
	return nil, nil
}

func printBanner(w io.Writer, a net.Addr, tls bool) {
	scheme, curl, grpcurl := "http", "", "-plaintext"
	if tls {
		scheme, curl, grpcurl = "https", "-k ", "-insecure"
	}
	address := a.String()
	if t, ok := a.(*net.TCPAddr); ok && t.IP.IsUnspecified() {
		address = fmt.Sprintf("localhost:%d", t.Port)
	}
	fmt.Fprintf(w, `phone-number-service for development: codes are shown here, no SMS is sent, nothing is kept.

  open this page           %[2]s://%[1]s/
  gRPC, JSON and gRPC-Web  %[1]s
  for tests                %[2]s://%[1]s/openapi.json, docs/testing.md

  curl %[3]s-d '{"phone_number":"18600000000"}' %[2]s://%[1]s/phonenumberservice.PhoneNumberService/SendSMS
  grpcurl %[4]s -d '{"phone_number":"18600000000"}' %[1]s phonenumberservice.PhoneNumberService/SendSMS

`, address, scheme, curl, grpcurl)
}

// openStore opens dsn, and adds errors to f. dataSourceName already reported a missing dsn.
func openStore(f *configErrors, dsn string) *store.DB {
	if dsn == "" {
		return nil
	}
	db, err := store.Open(dsn)
	if err != nil {
		f.add("DATA_SOURCE_NAME: %v", err)
	}
	return db
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

func (*migrateCommand) Run(ctx context.Context, out output) error {
	var f configErrors
	checkUnknownEnv(&f, os.Environ())
	db := openStore(&f, dataSourceName(&f))
	if err := f.err(); err != nil {
		return err
	}
	defer db.Close()
	if up, err := waitForDatabase(ctx, db, slog.New(slog.NewTextHandler(out.stderr, nil))); !up {
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
