package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Settings are flags that each have an environment variable. kong gets them as strings, so that
// parse can report all errors in one message.

// ruleSettings define how a number is parsed and how long its codes are valid.
type ruleSettings struct {
	AttemptLimit string `env:"PHONENUMBER_ATTEMPT_LIMIT" default:"3" placeholder:"N" help:"Valid calls that can succeed after one successful SendSMS, 1 to 100 (${default})."`
	CodeTTL      string `env:"PHONENUMBER_CODE_TTL" name:"code-ttl" default:"10m" placeholder:"DURATION" help:"How long a code lives, 1s to 10m (${default})."`
	Region       string `env:"PHONENUMBER_REGION" default:"CN" placeholder:"CC" help:"Region of numbers without a country code, ISO 3166 (${default})."`
}

// settings are the settings of serve and dev.
type settings struct {
	ruleSettings
	Listen        string `env:"PHONENUMBER_LISTEN" placeholder:"HOST:PORT" help:"Address for gRPC, JSON and gRPC-Web (serve: :50511, dev: 127.0.0.1:50511)."`
	SMSTimeout    string `env:"PHONENUMBER_SMS_TIMEOUT" name:"sms-timeout" default:"5s" placeholder:"DURATION" help:"How long Aliyun may take for one SMS, 100ms to 20s (${default})."`
	DrainDelay    string `env:"PHONENUMBER_DRAIN_DELAY" placeholder:"DURATION" help:"How long to accept calls after SIGTERM, until load balancers have noticed, up to 5m (serve: 5s, dev: 0s)."`
	LogLevel      string `env:"PHONENUMBER_LOG_LEVEL" default:"info" placeholder:"LEVEL" help:"debug, info, warn or error (${default})."`
	LogFormat     string `env:"PHONENUMBER_LOG_FORMAT" default:"text" placeholder:"FORMAT" help:"text or json (${default})."`
	MetricsListen string `env:"PHONENUMBER_METRICS_LISTEN" placeholder:"HOST:PORT" help:"Address for /metrics, /healthz and /readyz (127.0.0.1:9090, unless that is taken)."`
	accessSettings
	limitSettings
	Retention string `env:"PHONENUMBER_RETENTION" default:"72h" placeholder:"DURATION" help:"How long a number is kept after its last send, 24h or more (${default})."`
}

// limitSettings bound the resources that peers can use.
type limitSettings struct {
	MaxConnections     string `env:"PHONENUMBER_MAX_CONNECTIONS" default:"2000" placeholder:"N" help:"Maximum of open connections (${default})."`
	MaxStreams         string `env:"PHONENUMBER_MAX_STREAMS" default:"128" placeholder:"N" help:"Maximum of calls in flight on one connection (${default})."`
	MaxCalls           string `env:"PHONENUMBER_MAX_CALLS" default:"1000" placeholder:"N" help:"Maximum of calls in flight; further calls get UNAVAILABLE (${default})."`
	MaxMessageBytes    string `env:"PHONENUMBER_MAX_MESSAGE_BYTES" default:"4096" placeholder:"N" help:"Maximum size of a message (${default})."`
	MaxHeaderBytes     string `env:"PHONENUMBER_MAX_HEADER_BYTES" default:"8192" placeholder:"N" help:"Maximum size of a call's headers (${default})."`
	ConnectionTimeout  string `env:"PHONENUMBER_CONNECTION_TIMEOUT" default:"2s" placeholder:"DURATION" help:"Timeout for the first bytes of a connection, with TLS, and for headers over HTTP/1.1 (${default})."`
	ReadTimeout        string `env:"PHONENUMBER_READ_TIMEOUT" default:"5s" placeholder:"DURATION" help:"Timeout for a whole request over HTTP/1.1 (${default})."`
	IdleTimeout        string `env:"PHONENUMBER_IDLE_TIMEOUT" default:"5m" placeholder:"DURATION" help:"How long a connection stays open without a call (${default})."`
	ConnectionAge      string `env:"PHONENUMBER_CONNECTION_AGE" default:"10m" placeholder:"DURATION" help:"Age of a connection at which its client is asked to reconnect; over gRPC it varies by 10 % (${default})."`
	ConnectionAgeGrace string `env:"PHONENUMBER_CONNECTION_AGE_GRACE" placeholder:"DURATION" help:"How long calls on such a connection may continue (the call timeout)."`
	PingInterval       string `env:"PHONENUMBER_PING_INTERVAL" default:"10s" placeholder:"DURATION" help:"Minimum interval of a gRPC client's pings (${default})."`
	CallTimeout        string `env:"PHONENUMBER_CALL_TIMEOUT" placeholder:"DURATION" help:"Timeout of a call without a deadline, or with a longer one (the longest send plus 4s)."`
}

// config is the parsed form of settings.
type config struct {
	listen     string
	rules      verify.Rules
	numbers    verify.NumberParser
	smsTimeout time.Duration
	drainDelay time.Duration
	metrics    string // address, "" if not set
	retention  time.Duration
	access     accessConfig
	limits     server.Limits
	log        *slog.Logger
	sampled    telemetry.SamplingHandler // the handler of log
	out        output
}

// configErrors collects all errors of a configuration.
type configErrors []string

// add adds each line as an error, because one error can join several.
func (f *configErrors) add(format string, args ...any) {
	*f = append(*f, strings.Split(fmt.Sprintf(format, args...), "\n")...)
}

// read calls g, which reads files. It adds the error of g, unless g itself has added errors.
func (f *configErrors) read(g func(f *configErrors) error) {
	before := len(*f)
	err := g(f)
	if len(*f) > before || err == nil {
		return
	}
	f.add("%v", err)
}

func (f configErrors) err() error {
	if len(f) == 0 {
		return nil
	}
	return errors.New("the configuration cannot be used:\n  - " + strings.Join(f, "\n  - "))
}

// commandDefaults are the defaults that differ between commands.
type commandDefaults struct{ listen, drainDelay, origins string }

func (s settings) parse(f *configErrors, out output, d commandDefaults) config {
	checkUnknownEnv(f, os.Environ())
	r := config{
		listen:     cmp.Or(s.Listen, d.listen),
		smsTimeout: duration(f, "--sms-timeout (PHONENUMBER_SMS_TIMEOUT)", s.SMSTimeout, 100*time.Millisecond, 20*time.Second),
		drainDelay: duration(f, "--drain-delay (PHONENUMBER_DRAIN_DELAY)", cmp.Or(s.DrainDelay, d.drainDelay), 0, 5*time.Minute),
		metrics:    s.MetricsListen,
		out:        out,
		retention:  duration(f, "--retention (PHONENUMBER_RETENTION)", s.Retention, 24*time.Hour, 10*365*24*time.Hour),
	}
	r.rules, r.numbers = s.ruleSettings.parse(f)
	address(f, "--listen (PHONENUMBER_LISTEN)", r.listen)
	if r.metrics != "" {
		address(f, "--metrics-listen (PHONENUMBER_METRICS_LISTEN)", r.metrics)
	}
	if err := telemetry.CheckTracing(); err != nil {
		f.add("%v", err)
	}
	r.access = s.accessSettings.parse(f, d.origins)
	r.limits = s.limitSettings.parse(f, verify.LongestSend(r.smsTimeout))
	r.sampled = telemetry.NewSampled(telemetry.CallerHandler{Handler: s.logHandler(f, out.stderr)})
	r.log = slog.New(r.sampled)
	out.stderr.OnLoss(func(lost int) { r.log.Warn("dropped log lines", "count", lost) })
	return r
}

func (s limitSettings) parse(f *configErrors, longestSend time.Duration) server.Limits {
	l := server.Limits{
		Connections:  number(f, "--max-connections (PHONENUMBER_MAX_CONNECTIONS)", s.MaxConnections, 1, 1_000_000),
		Streams:      number(f, "--max-streams (PHONENUMBER_MAX_STREAMS)", s.MaxStreams, 1, 100_000),
		Calls:        number(f, "--max-calls (PHONENUMBER_MAX_CALLS)", s.MaxCalls, 1, 1_000_000),
		MessageBytes: number(f, "--max-message-bytes (PHONENUMBER_MAX_MESSAGE_BYTES)", s.MaxMessageBytes, 1024, 4<<20),
		HeaderBytes:  number(f, "--max-header-bytes (PHONENUMBER_MAX_HEADER_BYTES)", s.MaxHeaderBytes, 8<<10, 1<<20),

		ConnectionTimeout: duration(f, "--connection-timeout (PHONENUMBER_CONNECTION_TIMEOUT)", s.ConnectionTimeout, 100*time.Millisecond,
			time.Minute),
		ReadTimeout:   duration(f, "--read-timeout (PHONENUMBER_READ_TIMEOUT)", s.ReadTimeout, 100*time.Millisecond, time.Minute),
		IdleTimeout:   duration(f, "--idle-timeout (PHONENUMBER_IDLE_TIMEOUT)", s.IdleTimeout, time.Second, 24*time.Hour),
		ConnectionAge: duration(f, "--connection-age (PHONENUMBER_CONNECTION_AGE)", s.ConnectionAge, time.Second, 24*time.Hour),
		PingInterval:  duration(f, "--ping-interval (PHONENUMBER_PING_INTERVAL)", s.PingInterval, time.Second, 10*time.Minute),
	}
	// A send continues after its call has ended. The margin is for the other work of a call.
	l.CallTimeout = duration(f, "--call-timeout (PHONENUMBER_CALL_TIMEOUT)", cmp.Or(s.CallTimeout, (longestSend+4*time.Second).String()), 100*time.Millisecond, 10*time.Minute)
	l.ConnectionAgeGrace = duration(f, "--connection-age-grace (PHONENUMBER_CONNECTION_AGE_GRACE)", cmp.Or(s.ConnectionAgeGrace, l.CallTimeout.String()), time.Second, 24*time.Hour)
	return l
}

func (s ruleSettings) parse(f *configErrors) (rules verify.Rules, numbers verify.NumberParser) {
	rules.CodeTTL = duration(f, "--code-ttl (PHONENUMBER_CODE_TTL)", s.CodeTTL, time.Second, verify.MaxCodeTTL)
	rules.AttemptLimit = number(f, "--attempt-limit (PHONENUMBER_ATTEMPT_LIMIT)", s.AttemptLimit, 1, verify.MaxAttemptLimit)
	if !numberplan.KnownRegion(s.Region) {
		f.add("--region (PHONENUMBER_REGION) is %q; it must be an ISO 3166 code in capitals, such as CN or SG", s.Region)
	}
	return rules, verify.NumberParser{Region: s.Region, Plan: numberplan.Mobile}
}

func (s settings) logHandler(f *configErrors, w io.Writer) slog.Handler {
	var level slog.Level
	switch s.LogLevel {
	case "debug", "info", "warn", "error":
		_ = level.UnmarshalText([]byte(s.LogLevel))
	default:
		f.add("--log-level (PHONENUMBER_LOG_LEVEL) is %q; it must be debug, info, warn or error", s.LogLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch s.LogFormat {
	case "json":
		return slog.NewJSONHandler(w, options)
	case "text":
	default:
		f.add("--log-format (PHONENUMBER_LOG_FORMAT) is %q; it must be text or json", s.LogFormat)
	}
	return slog.NewTextHandler(w, options)
}

func duration(f *configErrors, name, text string, minimum, maximum time.Duration) time.Duration {
	d, err := time.ParseDuration(text)
	if err != nil || d < minimum || d > maximum {
		f.add("%s is %q; it must be a duration from %v to %v, such as 5s or 10m", name, text, minimum, maximum)
	}
	return d
}

func number(f *configErrors, name, text string, minimum, maximum int) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < minimum || n > maximum {
		f.add("%s is %q; it must be a whole number from %d to %d", name, text, minimum, maximum)
	}
	return n
}

func address(f *configErrors, name, text string) {
	_, port, err := net.SplitHostPort(text)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n > 65535 {
		f.add("%s is %q; it must be host:port or :port, such as 127.0.0.1:50511", name, text)
	}
}

const (
	envPrefix = "PHONENUMBER_"
	failSends = "PHONENUMBER_FAIL_SENDS"
)

// knownEnv are the valid variables that start with envPrefix.
var knownEnv = []string{
	"PHONENUMBER_LISTEN", "PHONENUMBER_ATTEMPT_LIMIT", "PHONENUMBER_CODE_TTL", "PHONENUMBER_REGION",
	"PHONENUMBER_CODE_KEY", "PHONENUMBER_CODE_KEY_FILE", "PHONENUMBER_SMS_TIMEOUT", "PHONENUMBER_DRAIN_DELAY",
	"PHONENUMBER_LOG_LEVEL", "PHONENUMBER_LOG_FORMAT", "PHONENUMBER_METRICS_LISTEN", "PHONENUMBER_RETENTION", failSends,
	"PHONENUMBER_TLS_CERT", "PHONENUMBER_TLS_KEY", "PHONENUMBER_TLS_CLIENT_CA",
	"PHONENUMBER_CALLERS", "PHONENUMBER_CORS_ORIGINS", "PHONENUMBER_REFLECTION",
	"PHONENUMBER_MAX_CONNECTIONS", "PHONENUMBER_MAX_STREAMS", "PHONENUMBER_MAX_CALLS",
	"PHONENUMBER_MAX_MESSAGE_BYTES", "PHONENUMBER_MAX_HEADER_BYTES",
	"PHONENUMBER_CONNECTION_TIMEOUT", "PHONENUMBER_READ_TIMEOUT", "PHONENUMBER_IDLE_TIMEOUT",
	"PHONENUMBER_CONNECTION_AGE", "PHONENUMBER_CONNECTION_AGE_GRACE",
	"PHONENUMBER_PING_INTERVAL", "PHONENUMBER_CALL_TIMEOUT", "PHONENUMBER_DATABASE_CONNECTIONS",
}

// injectedByKubernetes matches variables that Kubernetes sets in every container of a namespace
// with a Service whose name starts with "phonenumber".
var injectedByKubernetes = regexp.MustCompile(
	`^PHONENUMBER_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)$`)

// checkUnknownEnv reports misspelt variables, which would otherwise be ignored.
func checkUnknownEnv(f *configErrors, environ []string) {
	for _, entry := range environ {
		name, _, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(name, envPrefix) && !slices.Contains(knownEnv, name) && !injectedByKubernetes.MatchString(name) {
			f.add("%s is no setting of this service; there are %s", name, strings.Join(knownEnv, ", "))
		}
	}
}

// unsetEmptyEnv unsets empty variables, because compose files set variables without a value to
// the empty string.
func unsetEmptyEnv() {
	for _, name := range append(knownEnv, "ALIYUN_ENDPOINT") {
		if os.Getenv(name) == "" {
			os.Unsetenv(name)
		}
	}
}
