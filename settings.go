package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/observe"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Settings are flags with an env name each. They are strings to kong, so that
// every fault can be told in one message, by resolve.

// ruleSettings are those by which a number and its state are read.
type ruleSettings struct {
	AttemptLimit string `env:"PHONENUMBER_ATTEMPT_LIMIT" default:"3" placeholder:"N" help:"Valid calls that can succeed after one successful SendSMS, 1 to 100 (${default})."`
	CodeTTL      string `env:"PHONENUMBER_CODE_TTL" name:"code-ttl" default:"10m" placeholder:"DURATION" help:"How long a code lives, 1s to 10m (${default})."`
	Region       string `env:"PHONENUMBER_REGION" default:"CN" placeholder:"CC" help:"Region of numbers without a country code, ISO 3166 (${default})."`
}

// settings are those of serve and dev.
type settings struct {
	ruleSettings
	Listen        string `env:"PHONENUMBER_LISTEN" placeholder:"HOST:PORT" help:"Address for gRPC, JSON and gRPC-Web (serve: :50511, dev: 127.0.0.1:50511)."`
	SMSTimeout    string `env:"PHONENUMBER_SMS_TIMEOUT" name:"sms-timeout" default:"5s" placeholder:"DURATION" help:"How long Aliyun may take for one SMS, 100ms to 20s (${default})."`
	DrainDelay    string `env:"PHONENUMBER_DRAIN_DELAY" placeholder:"DURATION" help:"How long to go on accepting after SIGTERM, while load balancers notice, up to 5m (serve: 5s, dev: 0s)."`
	LogLevel      string `env:"PHONENUMBER_LOG_LEVEL" default:"info" placeholder:"LEVEL" help:"debug, info, warn or error (${default})."`
	LogFormat     string `env:"PHONENUMBER_LOG_FORMAT" default:"text" placeholder:"FORMAT" help:"text or json (${default})."`
	MetricsListen string `env:"PHONENUMBER_METRICS_LISTEN" placeholder:"HOST:PORT" help:"Address for /metrics, /healthz and /readyz (127.0.0.1:9090, unless that is taken)."`
	Retention     string `env:"PHONENUMBER_RETENTION" default:"72h" placeholder:"DURATION" help:"How long a number is kept after its last send, 24h or more (${default})."`
}

// resolved are settings as the service takes them.
type resolved struct {
	listen     string
	rules      verify.Rules
	numbers    verify.NumberParser
	smsTimeout time.Duration
	drainDelay time.Duration
	metrics    string // address, "" where none was set
	retention  time.Duration
	log        *slog.Logger
	sampled    observe.Sampled // what log writes to
}

// faults collects everything that is wrong with a configuration.
type faults []string

func (f *faults) add(format string, args ...any) { *f = append(*f, fmt.Sprintf(format, args...)) }

func (f faults) err() error {
	if len(f) == 0 {
		return nil
	}
	return errors.New("the configuration cannot be used:\n  - " + strings.Join(f, "\n  - "))
}

// resolve checks all settings, with the listen address and drain delay that the
// command takes where none is set.
func (s settings) resolve(f *faults, listen, drainDelay string) resolved {
	unknownVariables(f, os.Environ())
	r := resolved{
		listen:     cmp.Or(s.Listen, listen),
		smsTimeout: duration(f, "--sms-timeout (PHONENUMBER_SMS_TIMEOUT)", s.SMSTimeout, 100*time.Millisecond, 20*time.Second),
		drainDelay: duration(f, "--drain-delay (PHONENUMBER_DRAIN_DELAY)", cmp.Or(s.DrainDelay, drainDelay), 0, 5*time.Minute),
		metrics:    s.MetricsListen,
		retention:  duration(f, "--retention (PHONENUMBER_RETENTION)", s.Retention, 24*time.Hour, 10*365*24*time.Hour),
	}
	r.rules, r.numbers = s.ruleSettings.resolve(f)
	address(f, "--listen (PHONENUMBER_LISTEN)", r.listen)
	if r.metrics != "" {
		address(f, "--metrics-listen (PHONENUMBER_METRICS_LISTEN)", r.metrics)
	}
	if err := observe.CheckTracing(); err != nil {
		f.add("%v", err)
	}
	r.sampled = observe.NewSampled(s.logHandler(f))
	r.log = slog.New(r.sampled)
	return r
}

func (s ruleSettings) resolve(f *faults) (rules verify.Rules, numbers verify.NumberParser) {
	rules.CodeTTL = duration(f, "--code-ttl (PHONENUMBER_CODE_TTL)", s.CodeTTL, time.Second, verify.MaxCodeTTL)
	var err error
	if rules.AttemptLimit, err = strconv.Atoi(s.AttemptLimit); err != nil || rules.AttemptLimit < 1 || rules.AttemptLimit > verify.MaxAttemptLimit {
		f.add("--attempt-limit (PHONENUMBER_ATTEMPT_LIMIT) is %q; it must be a whole number from 1 to %d", s.AttemptLimit, verify.MaxAttemptLimit)
	}
	if !numberplan.KnownRegion(s.Region) {
		f.add("--region (PHONENUMBER_REGION) is %q; it must be an ISO 3166 code in capitals, such as CN or SG", s.Region)
	}
	return rules, verify.NumberParser{Region: s.Region, Plan: numberplan.Mobile}
}

func (s settings) logHandler(f *faults) slog.Handler {
	var level slog.Level
	switch s.LogLevel {
	case "debug", "info", "warn", "error":
		level.UnmarshalText([]byte(s.LogLevel))
	default:
		f.add("--log-level (PHONENUMBER_LOG_LEVEL) is %q; it must be debug, info, warn or error", s.LogLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch s.LogFormat {
	case "json":
		return slog.NewJSONHandler(os.Stderr, options)
	case "text":
	default:
		f.add("--log-format (PHONENUMBER_LOG_FORMAT) is %q; it must be text or json", s.LogFormat)
	}
	return slog.NewTextHandler(os.Stderr, options)
}

func duration(f *faults, name, text string, least, most time.Duration) time.Duration {
	d, err := time.ParseDuration(text)
	if err != nil || d < least || d > most {
		f.add("%s is %q; it must be a duration from %v to %v, such as 5s or 10m", name, text, least, most)
	}
	return d
}

func address(f *faults, name, text string) {
	_, port, err := net.SplitHostPort(text)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n > 65535 {
		f.add("%s is %q; it must be host:port or :port, such as 127.0.0.1:50511", name, text)
	}
}

const (
	ownPrefix = "PHONENUMBER_"
	failSends = "PHONENUMBER_FAIL_SENDS"
)

// ownVariables are the names with our prefix that mean something.
var ownVariables = []string{
	"PHONENUMBER_LISTEN", "PHONENUMBER_ATTEMPT_LIMIT", "PHONENUMBER_CODE_TTL", "PHONENUMBER_REGION",
	"PHONENUMBER_CODE_KEY", "PHONENUMBER_CODE_KEY_FILE", "PHONENUMBER_SMS_TIMEOUT", "PHONENUMBER_DRAIN_DELAY",
	"PHONENUMBER_LOG_LEVEL", "PHONENUMBER_LOG_FORMAT", "PHONENUMBER_METRICS_LISTEN", "PHONENUMBER_RETENTION", failSends,
}

// Kubernetes puts such names into every container beside a Service whose name
// begins with "phonenumber".
var injectedByKubernetes = regexp.MustCompile(
	`^PHONENUMBER_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)$`)

// unknownVariables finds misspelt settings, which would otherwise be ignored.
func unknownVariables(f *faults, environ []string) {
	for _, entry := range environ {
		name, _, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(name, ownPrefix) && !slices.Contains(ownVariables, name) && !injectedByKubernetes.MatchString(name) {
			f.add("%s is no setting of this service; there are %s", name, strings.Join(ownVariables, ", "))
		}
	}
}

// dropEmptyVariables makes a variable that is set to nothing mean "not set", as
// compose files pass it.
func dropEmptyVariables() {
	for _, name := range append(ownVariables, "ALIYUN_ENDPOINT") {
		if os.Getenv(name) == "" {
			os.Unsetenv(name)
		}
	}
}
