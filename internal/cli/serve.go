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
	"net/url"
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
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const (
	metricsListen = "127.0.0.1:9090"
	closeTimeout  = 5 * time.Second // for the purge, the last traces and the database
)

type serveCommand struct{ serveSettings }

// serveSettings are the settings of serve and check.
type serveSettings struct {
	config.Config
	config.Aliyun
	DeliverySample      float64 `env:"PHONENUMBER_DELIVERY_SAMPLE" default:"0" min:"0" max:"1" placeholder:"SHARE" help:"Share of the accepted SMS of which Aliyun is asked if they were delivered, 0 to 1, for at most 60 a minute (${default})."`
	DatabaseConnections int     `env:"PHONENUMBER_DATABASE_CONNECTIONS" default:"64" min:"1" max:"1000" placeholder:"N" help:"Maximum of open connections to a MySQL server, 1 to 1000 (${default})."`
}

func (c *serveCommand) Run(ctx context.Context, p process, errs []error) error {
	s, err := newService(p, c.Config)
	defer s.logHandler.Flush() // last: the other deferred calls log
	deps, depsErr := c.openDependencies()
	if err := config.Join(append(errs, err, depsErr)...); err != nil {
		return err
	}
	db, aliyun := deps.db, deps.aliyun
	keys, _ := config.Keys(deps.secrets) // Read has checked them
	return s.serve(ctx, db, keys, aliyun, func(v *verify.Verifier, metrics *telemetry.Metrics) {
		metrics.Register(aliyun.Collectors()...)
		provider := accessKey(deps.secrets).Provider
		if deps.role != nil {
			provider = deps.role.Provider()
			renewer := ramrole.NewRenewer(deps.role, aliyun.ReplaceCredentials, s.log)
			aliyun.OnExpired = renewer.Expired
			metrics.Register(renewer.Collectors()...)
			go renewer.Run(ctx)
		}
		s.log.Info("using Aliyun credentials", "provider", provider)
		deliveries := telemetry.NewDeliveries(ctx, aliyun.Deliveries, c.DeliverySample, s.log)
		metrics.Register(deliveries.Collectors()...)
		aliyun.OnAccepted = deliveries.Accepted
		if config.SecretsInFiles() {
			r := secretReloader{db: db, verifier: v, aliyun: aliyun, keys: keys}
			w := reload.Watcher{Kind: "secrets", Read: deps.reader.Read, Apply: r.apply, StableReads: stableSecretReads}
			go w.Run(ctx, s.log, s.lastReload, deps.secrets)
		}
	})
}

// dependencies are the secrets, the database and Aliyun, as the settings of serve name them.
type dependencies struct {
	reader  config.SecretReader
	secrets map[string]string
	db      *store.DB      // nil if its data source name is invalid
	aliyun  *sms.Aliyun    // nil if a setting of Aliyun is invalid
	role    ramrole.Source // nil if the credentials are an access key
}

// openDependencies returns the dependencies, and all errors of their settings. It opens no connection.
func (c *serveSettings) openDependencies() (*dependencies, error) {
	s := &dependencies{reader: config.SecretReader{Role: c.Role.Wanted()}}
	secrets, err := s.reader.Read()
	s.secrets = secrets
	errs := []error{err}
	dsn := s.secrets[config.DataSourceName]
	if s.db, err = openStore(dsn); s.db != nil {
		s.db.LimitConnections(c.DatabaseConnections)
	}
	errs = append(errs, err)
	if dsn == "sqlite::memory:" {
		errs = append(errs, fmt.Errorf("DATA_SOURCE_NAME is %s, which loses every code at a restart; it must be a file, such as sqlite:/path/to/file.db (dev needs none)", dsn))
	}
	if os.Getenv("PHONENUMBER_FAIL_SENDS") != "" {
		errs = append(errs, errors.New("PHONENUMBER_FAIL_SENDS is for dev alone"))
	}
	s.aliyun, s.role, err = newAliyun(c.Aliyun, c.CodeTTL, s.secrets)
	return s, errors.Join(append(errs, err)...)
}

// newAliyun returns the Sender, and the source of its credentials. The source is nil if the credentials
// are an access key.
func newAliyun(c config.Aliyun, codeTTL time.Duration, secrets map[string]string) (*sms.Aliyun, ramrole.Source, error) {
	var errs []error
	endpoint := func(setting, address, defaultURL string) *url.URL {
		u, err := sms.ParseEndpoint(address)
		if err != nil {
			err = fmt.Errorf("%s: %w; the default is %s", setting, err, defaultURL)
		}
		errs = append(errs, err)
		return u
	}
	endpoint("--aliyun-endpoint (ALIYUN_ENDPOINT)", c.Endpoint, sms.DefaultEndpoint)
	endpoint("--aliyun-pnvs-endpoint (ALIYUN_PNVS_ENDPOINT)", c.PNVSEndpoint, sms.DefaultPNVSEndpoint)
	var source ramrole.Source
	switch {
	case config.HasAccessKey():
	case c.Role.ByOIDC():
		sts := endpoint("--aliyun-sts-endpoint (ALIYUN_STS_ENDPOINT)", c.Role.STSEndpoint, ramrole.DefaultSTSEndpoint)
		errs = append(errs, c.Role.Check())
		if err := errors.Join(errs...); err != nil {
			return nil, nil, err
		}
		transport, err := sms.NewTransport(sts)
		if err != nil {
			return nil, nil, err
		}
		source = ramrole.OIDC{
			RoleARN: c.Role.ARN, ProviderARN: c.Role.ProviderARN, TokenFile: c.Role.TokenFile, SessionName: c.Role.SessionName,
			Endpoint: sts, Transport: transport,
		}
	case c.Role.InstanceRole != "":
		source = ramrole.ECS{Role: c.Role.InstanceRole, Endpoint: ramrole.DefaultMetadataEndpoint}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, err
	}
	key := accessKey(secrets)
	if key.AccessKeyID == "" || key.AccessKeySecret == "" {
		key = sms.Credentials{} // SecretReader reports it if there is no role
	}
	aliyun, err := sms.NewAliyun(sms.AliyunConfig{
		Credentials: key, Endpoint: c.Endpoint, PNVSEndpoint: c.PNVSEndpoint, Variable: c.TemplateVariable, CodeTTL: codeTTL,
	})
	return aliyun, source, err
}

// accessKey returns the credentials among the secrets.
func accessKey(secrets map[string]string) sms.Credentials {
	c := sms.Credentials{
		AccessKeyID: secrets[config.AccessKeyID], AccessKeySecret: secrets[config.AccessKeySecret], SecurityToken: secrets[config.SecurityToken],
		Provider: "static_ak",
	}
	if c.SecurityToken != "" {
		c.Provider = "static_sts"
	}
	return c
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
	key := accessKey(now)
	if config.HasAccessKey() {
		if err := key.Check(); err != nil {
			return err
		}
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
	if !config.HasAccessKey() {
		return nil // a role's credentials are no secrets of the settings
	}
	return r.aliyun.ReplaceCredentials(key)
}

// stableSecretReads returns the number of identical reads that a change of secrets needs before it is
// applied. If only a part of the access key changed, the other parts may change soon.
func stableSecretReads(before, now reload.Files) int {
	parts := []string{config.AccessKeyID, config.AccessKeySecret}
	if before[config.SecurityToken]+now[config.SecurityToken] != "" {
		parts = append(parts, config.SecurityToken)
	}
	changed := 0
	for _, name := range parts {
		if now[name] != before[name] {
			changed++
		}
	}
	if changed > 0 && changed < len(parts) {
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
	for _, name := range []string{
		config.AccessKeyID, config.AccessKeySecret, config.SecurityToken, "ALIBABA_CLOUD_ROLE_ARN", "ALIBABA_CLOUD_ECS_METADATA",
	} {
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

// serve runs the service with sender until ctx is done. With a *dev.Inbox it runs the service of dev. It
// calls onStart after it has created the verifier, and before it listens.
func (s service) serve(
	ctx context.Context, db *store.DB, keys verify.Keys, sender verify.Sender, onStart func(*verify.Verifier, *telemetry.Metrics),
) error {
	defer db.Close()
	if ready, err := waitForDatabase(ctx, db, s.log); !ready {
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
	ready := func(ctx context.Context) error {
		if err := db.Ready(ctx); err != nil {
			return fmt.Errorf("the database cannot be used: %w", err)
		}
		if aliyun, ok := sender.(*sms.Aliyun); ok {
			return aliyun.Ready()
		}
		return nil
	}
	metricsAt := "nowhere"
	if metricsListener != nil {
		metricsAt = metricsListener.Addr().String()
	}
	serverConfig := server.Config{
		Listener: listener, Verifier: v, Numbers: numbers, Ready: ready, DrainDelay: s.settings.DrainDelay, Limits: s.settings.Limits,
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

// listenMetrics opens the listener for metrics and probes. If no address is set and the default address
// is in use, it returns nil, nil, because other replicas may run on this machine.
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
