package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// settings are flags with an env name each. They are strings to kong, so that
// every fault can be told in one message, by resolve.
type settings struct {
	Listen        string `env:"PHONENUMBER_LISTEN" placeholder:"HOST:PORT" help:"Address for gRPC, JSON and gRPC-Web (serve: :50511, dev: 127.0.0.1:50511)."`
	AttemptLimit  string `env:"PHONENUMBER_ATTEMPT_LIMIT" default:"3" placeholder:"N" help:"Valid calls that can succeed after one successful SendSMS, 1 to 100 (${default})."`
	CodeTTL       string `env:"PHONENUMBER_CODE_TTL" name:"code-ttl" default:"10m" placeholder:"DURATION" help:"How long a code lives, 1s to 10m (${default})."`
	Region        string `env:"PHONENUMBER_REGION" default:"CN" placeholder:"CC" help:"Region of numbers without a country code, ISO 3166 (${default})."`
	SMSTimeout    string `env:"PHONENUMBER_SMS_TIMEOUT" name:"sms-timeout" default:"5s" placeholder:"DURATION" help:"How long Aliyun may take for one SMS, 100ms to 20s (${default})."`
	DrainDelay    string `env:"PHONENUMBER_DRAIN_DELAY" placeholder:"DURATION" help:"How long to go on accepting after SIGTERM, while load balancers notice, up to 5m (serve: 5s, dev: 0s)."`
	LogLevel      string `env:"PHONENUMBER_LOG_LEVEL" default:"info" placeholder:"LEVEL" help:"debug, info, warn or error (${default})."`
	LogFormat     string `env:"PHONENUMBER_LOG_FORMAT" default:"text" placeholder:"FORMAT" help:"text or json (${default})."`
	MetricsListen string `env:"PHONENUMBER_METRICS_LISTEN" default:"127.0.0.1:9090" placeholder:"HOST:PORT" help:"Reserved for metrics; accepted and not yet served (${default})."`
}

// resolved are settings as the service takes them.
type resolved struct {
	listen     string
	rules      verify.Rules
	numbers    verify.NumberParser
	smsTimeout time.Duration
	drainDelay time.Duration
	log        *slog.Logger
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
		numbers:    verify.NumberParser{Region: s.Region, Plan: numberplan.Mobile},
	}
	r.rules.CodeTTL = duration(f, "--code-ttl (PHONENUMBER_CODE_TTL)", s.CodeTTL, time.Second, verify.MaxCodeTTL)
	var err error
	if r.rules.AttemptLimit, err = strconv.Atoi(s.AttemptLimit); err != nil || r.rules.AttemptLimit < 1 || r.rules.AttemptLimit > verify.MaxAttemptLimit {
		f.add("--attempt-limit (PHONENUMBER_ATTEMPT_LIMIT) is %q; it must be a whole number from 1 to %d", s.AttemptLimit, verify.MaxAttemptLimit)
	}
	if !numberplan.KnownRegion(s.Region) {
		f.add("--region (PHONENUMBER_REGION) is %q; it must be an ISO 3166 code in capitals, such as CN or SG", s.Region)
	}
	address(f, "--listen (PHONENUMBER_LISTEN)", r.listen)
	address(f, "--metrics-listen (PHONENUMBER_METRICS_LISTEN)", s.MetricsListen)
	r.log = s.logger(f)
	return r
}

func (s settings) logger(f *faults) *slog.Logger {
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
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	case "text":
	default:
		f.add("--log-format (PHONENUMBER_LOG_FORMAT) is %q; it must be text or json", s.LogFormat)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}

// secrets come from the environment alone, or from the file that NAME_FILE
// names: a flag would show them to everyone who can list processes.
type secrets struct {
	dsn    string
	keys   verify.Keys
	aliyun sms.AliyunConfig
}

func readSecrets(f *faults, endpoint string) secrets {
	s := secrets{
		dsn: dataSourceName(f),
		aliyun: sms.AliyunConfig{
			AccessKeyID:     required(f, "ALIYUN_ACCESS_KEY_ID"),
			AccessKeySecret: required(f, "ALIYUN_ACCESS_KEY_SECRET"),
			Endpoint:        endpoint,
		},
	}
	if _, err := sms.ParseAliyunEndpoint(endpoint); err != nil {
		f.add("--aliyun-endpoint (ALIYUN_ENDPOINT): %v", err)
		s.aliyun.Endpoint = "" // told; NewAliyun need not tell it again
	}
	if list := secret(f, "PHONENUMBER_CODE_KEY"); list != "" {
		var err error
		if s.keys, err = verify.ParseKeys(list); err != nil {
			f.add("PHONENUMBER_CODE_KEY: %v; it must be a comma-separated list of base64 keys, each made by: openssl rand -base64 32", err)
		}
	} else if s.aliyun.AccessKeySecret != "" {
		var err error
		if s.keys, err = verify.DeriveKeys(s.aliyun.AccessKeySecret); err != nil {
			f.add("PHONENUMBER_CODE_KEY is not set and could not be derived: %v", err)
		}
	}
	return s
}

// dataSourceName accepts both spellings that documents in the field use.
func dataSourceName(f *faults) string {
	const name, other = "DATA_SOURCE_NAME", "Data_SOURCE_NAME"
	dsn, spelt := secret(f, name), secret(f, other)
	switch {
	case dsn == "" && spelt == "" && os.Getenv(name+"_FILE")+os.Getenv(other+"_FILE") == "":
		f.add("%s is missing: user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db", name)
	case dsn != "" && spelt != "" && dsn != spelt:
		f.add("%s and %s are both set and differ; set one", name, other)
	}
	return cmp.Or(dsn, spelt)
}

func required(f *faults, name string) string {
	value := secret(f, name)
	if value == "" && os.Getenv(name+"_FILE") == "" {
		f.add("%s is missing (it may also be in a file that %s_FILE names)", name, name)
	}
	return value
}

func secret(f *faults, name string) string {
	value, file := os.Getenv(name), os.Getenv(name+"_FILE")
	if file == "" {
		return value
	}
	if value != "" {
		f.add("%s and %s_FILE are both set; set one", name, name)
	}
	content, err := os.ReadFile(file)
	// Not the path: where the secret itself was put there, this would show it.
	var pathError *fs.PathError
	switch value = strings.TrimSpace(string(content)); {
	case errors.As(err, &pathError):
		f.add("the file that %s_FILE names: %v", name, pathError.Err)
	case err != nil || value == "":
		f.add("the file that %s_FILE names is empty", name)
	}
	return value
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
	"PHONENUMBER_LOG_LEVEL", "PHONENUMBER_LOG_FORMAT", "PHONENUMBER_METRICS_LISTEN", failSends,
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
