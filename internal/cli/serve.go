package cli

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"reflect"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/reload"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const (
	metricsListen = "127.0.0.1:9090"
	closeTimeout  = 5 * time.Second // for the purge, the last traces and the database
)

type serveCommand struct {
	config.Config
	config.Aliyun
	DatabaseConnections int `env:"PHONENUMBER_DATABASE_CONNECTIONS" default:"64" min:"1" max:"1000" placeholder:"N" help:"Maximum of open connections to a MySQL server, 1 to 1000 (${default})."`
}

func (c *serveCommand) Run(ctx context.Context, p process, errs []error) error {
	s, err := newService(p, c.Config)
	defer s.logHandler.Flush() // last: the other deferred calls log
	var reader config.SecretReader
	secrets, secretsErr := reader.Read()
	dsn := secrets[config.DataSourceName]
	db, dbErr := openStore(dsn)
	errs = append(errs, err, secretsErr, dbErr)
	if dsn == "sqlite::memory:" {
		errs = append(errs, fmt.Errorf("DATA_SOURCE_NAME is %s, which loses every code at a restart; it must be a file, such as sqlite:/path/to/file.db (dev needs none)", dsn))
	}
	if os.Getenv("PHONENUMBER_FAIL_SENDS") != "" {
		errs = append(errs, errors.New("PHONENUMBER_FAIL_SENDS is for dev alone"))
	}
	aliyun, err := newAliyun(c, secrets)
	if err := config.Join(append(errs, err)...); err != nil {
		return err
	}
	db.LimitConnections(c.DatabaseConnections)
	keys, _ := config.Keys(secrets) // Read has checked them
	return s.serve(ctx, db, keys, aliyun, func(v *verify.Verifier, metrics *telemetry.Metrics) {
		metrics.Register(aliyun.Collectors()...)
		if config.SecretsInFiles() {
			r := secretReloader{db: db, verifier: v, aliyun: aliyun, keys: keys}
			go reload.Watcher{Kind: "secrets", Read: reader.Read, Apply: r.apply, StableReads: stableSecretReads}.Run(ctx, s.log, s.lastReload, secrets)
		}
	})
}

func newAliyun(c *serveCommand, secrets map[string]string) (*sms.Aliyun, error) {
	var errs []error
	for _, setting := range [][2]string{
		{"--aliyun-endpoint (ALIYUN_ENDPOINT)", c.Endpoint}, {"--aliyun-pnvs-endpoint (ALIYUN_PNVS_ENDPOINT)", c.PNVSEndpoint},
	} {
		if _, err := sms.ParseEndpoint(setting[1]); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", setting[0], err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	key := sms.Credentials{AccessKeyID: secrets[config.AccessKeyID], AccessKeySecret: secrets[config.AccessKeySecret]}
	if key.AccessKeyID == "" || key.AccessKeySecret == "" {
		key = sms.Credentials{} // SecretReader reports it
	}
	return sms.NewAliyun(sms.AliyunConfig{
		Credentials: key, Endpoint: c.Endpoint, PNVSEndpoint: c.PNVSEndpoint, Variable: c.TemplateVariable, CodeTTL: c.CodeTTL,
	})
}

// secretReloader applies changed secrets to the running service.
type secretReloader struct {
	db       *store.DB
	verifier *verify.Verifier
	aliyun   *sms.Aliyun
	keys     verify.Keys // in use: the newest first
}

// apply applies all secrets or none: the steps that can fail come first.
func (r *secretReloader) apply(ctx context.Context, before, now reload.Files) error {
	key := sms.Credentials{AccessKeyID: now[config.AccessKeyID], AccessKeySecret: now[config.AccessKeySecret]}
	if err := key.Check(); err != nil {
		return err
	}
	if dsn := now[config.DataSourceName]; dsn != before[config.DataSourceName] {
		if err := r.db.ReplaceDSN(ctx, dsn); err != nil {
			return fmt.Errorf("DATA_SOURCE_NAME: %w", err)
		}
	}
	previous, _ := config.Keys(before) // Read has checked both
	if next, _ := config.Keys(now); !reflect.DeepEqual(next, previous) {
		if now[config.CodeKey] == "" { // keep the old keys for codes already sent
			const maxOldKeys = 4
			next = append(next, r.keys[:min(len(r.keys), maxOldKeys)]...)
		}
		r.keys = next
		r.verifier.ReplaceKeys(next)
	}
	return r.aliyun.ReplaceCredentials(key)
}

// stableSecretReads returns how many identical reads a change of secrets needs. If one half of the
// access key changed, the other half may change soon.
func stableSecretReads(before, now reload.Files) int {
	if (now[config.AccessKeyID] != before[config.AccessKeyID]) != (now[config.AccessKeySecret] != before[config.AccessKeySecret]) {
		return 15
	}
	return 0
}

type devCommand struct {
	config.Config
	FailSends         string `env:"PHONENUMBER_FAIL_SENDS" placeholder:"KIND[:TIMES]" help:"Make all sends fail, or the next TIMES, as Aliyun would: ${failure_kinds}."`
	IgnoreCredentials bool   `help:"Start although Aliyun credentials are in the environment; they are not used."`
}

func (c *devCommand) Run(ctx context.Context, p process, errs []error) error {
	if len(c.CORSOrigins) == 0 {
		c.CORSOrigins = []string{"*"}
	}
	s, err := newService(p, c.Config)
	defer s.logHandler.Flush() // last: the other deferred calls log
	errs = append(errs, err)
	for _, name := range []string{config.AccessKeyID, config.AccessKeySecret} {
		if !c.IgnoreCredentials && os.Getenv(name)+os.Getenv(name+"_FILE") != "" {
			errs = append(errs, fmt.Errorf("%s is set, so this may be production, where dev would show every code; use serve, or dev --ignore-credentials", name))
		}
	}
	rules, _ := c.ForVerify()
	inbox := &dev.Inbox{Rules: rules, OnMessage: func(d dev.Message) {
		fmt.Fprintf(p.stdout, "  %s  SMS to %s  【%s】 code %s  %s\n", d.SentAt.Format(time.TimeOnly), d.PhoneNumber, d.Signature, d.Code, d.TemplateCode)
	}}
	if c.FailSends != "" {
		if err := inbox.SetFailure(dev.ParseFailure(c.FailSends)); err != nil {
			errs = append(errs, fmt.Errorf("--fail-sends (PHONENUMBER_FAIL_SENDS) is %q; it must be KIND or KIND:TIMES: %w", c.FailSends, err))
		}
	}
	db, err := store.Open("sqlite::memory:")
	if err := config.Join(append(errs, err)...); err != nil {
		return err
	}
	return s.serve(ctx, db, verify.RandomKeys(), inbox, func(*verify.Verifier, *telemetry.Metrics) {})
}

// service has the values that serve and dev share.
type service struct {
	process
	settings   config.Config
	access     access
	lastReload *prometheus.GaugeVec
	log        *slog.Logger
	logHandler telemetry.LogHandler // the handler of log
}

func newService(p process, settings config.Config) (service, error) {
	settingsErr := settings.Complete()
	a, accessErr := newAccess(settings.Access)
	var level slog.Level
	_ = level.UnmarshalText([]byte(settings.LogLevel)) // Parse has checked it
	options := &slog.HandlerOptions{Level: level}
	var handler slog.Handler = slog.NewTextHandler(p.stderr, options)
	if settings.LogFormat == "json" {
		handler = slog.NewJSONHandler(p.stderr, options)
	}
	logHandler := telemetry.NewLogHandler(handler)
	s := service{
		process: p, settings: settings, access: a, log: slog.New(logHandler), logHandler: logHandler,
		lastReload: reload.NewMetric("callers", "certificates", "secrets"), // also without files
	}
	p.stderr.OnLoss(func(lost int) { s.log.Warn("dropped log lines", "count", lost) })
	return s, errors.Join(settingsErr, telemetry.CheckTracing(), accessErr)
}

// serve runs the service with sender until ctx is done; a *dev.Inbox makes it the service of dev.
// It calls onStart when the verifier exists.
func (s service) serve(
	ctx context.Context, db *store.DB, keys verify.Keys, sender verify.Sender, onStart func(*verify.Verifier, *telemetry.Metrics),
) error {
	defer db.Close()
	if up, err := waitForDatabase(ctx, db, s.log); !up {
		return err
	}
	for _, w := range db.Warnings() {
		s.log.Warn(w)
	}
	tel, stopTracing, err := telemetry.Start(ctx, s.version, s.log)
	if err != nil {
		return err
	}
	defer stopTracing()
	rules, numbers := s.settings.ForVerify()
	v := verify.New(verify.Config{
		Rules: rules, Keys: keys, Store: tel.Store(db), Sender: tel.Sender(sender), SMSTimeout: s.settings.SMSTimeout,
		Now: verify.SteadyClock(), Random: rand.Reader, Log: s.log,
	})
	onStart(v, tel.Metrics)
	listener, err := net.Listen("tcp", s.settings.Listen)
	if err != nil {
		return fmt.Errorf("--listen (PHONENUMBER_LISTEN): %w", err)
	}
	metricsListener, err := s.listenMetrics()
	if err != nil {
		return err
	}
	tel.Metrics.Register(append(db.Collectors(), s.lastReload, s.dropped)...)
	tel.Metrics.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "phonenumber_outcomes_pending", Help: "Outcomes of sends that are still being stored.",
	}, func() float64 { return float64(v.Pending()) }))
	if s.access.tls != nil {
		tel.Metrics.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "phonenumber_certificate_expiry_timestamp_seconds", Help: sms.CertificateHelp, ConstLabels: prometheus.Labels{"certificate": "server"},
		}, func() float64 { return float64(s.access.tls.Expires().Unix()) }))
	}
	s.access.watchFiles(ctx, tel.Metrics, s.log, s.lastReload)
	var background sync.WaitGroup
	defer background.Wait()
	serveCtx, stop := context.WithCancel(ctx)
	defer stop()
	background.Go(func() { db.RunPurge(serveCtx, s.settings.Retention, s.log) })
	metricsAt := "nowhere"
	if metricsListener != nil {
		metricsAt = metricsListener.Addr().String()
	}
	serverConfig := server.Config{
		Listener: listener, Verifier: v, Numbers: numbers, Ready: db.Ready, DrainDelay: s.settings.DrainDelay, Limits: s.settings.Limits,
		TLS: s.access.tls, Authenticate: s.access.authenticator(), Origins: s.access.CORSOrigins, Reflection: s.access.Reflection == "on",
		Version: s.version, Telemetry: tel, Metrics: metricsListener,
	}
	tlsState, callers, warnings := s.access.startupSummary()
	if inbox, ok := sender.(*dev.Inbox); ok {
		dev.Configure(&serverConfig, inbox)
		printBanner(s.stdout, listener.Addr(), s.access.tls != nil)
		warnings = nil // they are about production
	}
	s.log.Info("listening", "address", listener.Addr().String(), "metrics", metricsAt, "version", s.version, "tls", tlsState,
		"callers", callers)
	for _, w := range warnings {
		s.log.Warn(w)
	}
	context.AfterFunc(ctx, func() { // bounds the steps after Serve
		timeout := serverConfig.StopTimeout() + closeTimeout
		time.Sleep(timeout)
		s.log.Error("exiting by force: stopping took too long", "after", timeout.String())
		time.Sleep(time.Second) // for the log line
		os.Exit(1)
	})
	return server.Serve(ctx, serverConfig)
}

// listenMetrics returns a nil listener if no address is set and the default one is in use,
// because other replicas may run on this machine.
func (s service) listenMetrics() (net.Listener, error) {
	listener, err := net.Listen("tcp", cmp.Or(s.settings.MetricsListen, metricsListen))
	switch {
	case err == nil:
		return listener, nil
	case s.settings.MetricsListen != "":
		return nil, fmt.Errorf("--metrics-listen (PHONENUMBER_METRICS_LISTEN): %w", err)
	}
	s.log.Warn("metrics are not served; set PHONENUMBER_METRICS_LISTEN", "error", err)
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
