// Package config reads flags, environment variables and secrets into plain values, and reports
// all errors of a configuration at once. It is a package so that settings can be tested without
// a process; it opens no connection, and makes no logger and no certificate.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A setting is one field. Parse reads it from its flag or its variable, and checks it by its type and
// by these tags: min and max, oneof, type. If an optional setting is the empty text, it has its default.

// Rules are the settings of serve, dev, check, inspect and forget.
type Rules struct {
	AttemptLimit int           `env:"PHONENUMBER_ATTEMPT_LIMIT" default:"3" min:"1" max:"100" placeholder:"N" help:"Valid calls that can succeed after one successful SendSMS, 1 to 100 (${default})."`
	CodeTTL      time.Duration `env:"PHONENUMBER_CODE_TTL" name:"code-ttl" default:"10m" min:"1s" max:"10m" placeholder:"DURATION" help:"How long a code lives, 1s to 10m (${default})."`
	Region       string        `env:"PHONENUMBER_REGION" default:"CN" type:"region" placeholder:"CC" help:"Region of numbers without a country code, ISO 3166 (${default})."`
}

// ForVerify returns the rules in the form of package verify.
func (r Rules) ForVerify() (verify.Rules, verify.NumberParser) {
	return verify.Rules{AttemptLimit: r.AttemptLimit, CodeTTL: r.CodeTTL}, verify.NumberParser{Region: r.Region, Plan: numberplan.Mobile}
}

// Config are the settings of serve, dev and check.
type Config struct {
	Rules
	Listen        string        `env:"PHONENUMBER_LISTEN" default:"${listen}" optional:"" type:"address" placeholder:"HOST:PORT" help:"Address for gRPC, JSON and gRPC-Web (serve: :50511, dev: 127.0.0.1:50511)."`
	SMSTimeout    time.Duration `env:"PHONENUMBER_SMS_TIMEOUT" name:"sms-timeout" default:"5s" min:"100ms" max:"20s" placeholder:"DURATION" help:"How long Aliyun may take for one SMS, 100ms to 20s (${default})."`
	DrainDelay    time.Duration `env:"PHONENUMBER_DRAIN_DELAY" default:"${drain_delay}" optional:"" min:"0s" max:"5m" placeholder:"DURATION" help:"How long to accept calls after SIGTERM, until load balancers have noticed, up to 5m (serve: 5s, dev: 0s)."`
	LogLevel      string        `env:"PHONENUMBER_LOG_LEVEL" default:"info" oneof:"debug, info, warn or error" placeholder:"LEVEL" help:"debug, info, warn or error (${default})."`
	LogFormat     string        `env:"PHONENUMBER_LOG_FORMAT" default:"text" oneof:"text or json" placeholder:"FORMAT" help:"text or json (${default})."`
	MetricsListen string        `env:"PHONENUMBER_METRICS_LISTEN" optional:"" type:"address" placeholder:"HOST:PORT" help:"Address for /metrics, /healthz and /readyz (127.0.0.1:9090, unless that is taken)."`
	Access
	Limits
	Retention time.Duration `env:"PHONENUMBER_RETENTION" default:"72h" min:"24h" max:"87600h" placeholder:"DURATION" help:"How long a number is kept after its last send, 24h or more (${default})."`
}

// Access are the settings for TLS, authentication and web pages.
type Access struct {
	TLSCert     string   `env:"PHONENUMBER_TLS_CERT" name:"tls-cert" placeholder:"FILE" help:"Certificate chain in PEM. If it is set, the port uses TLS."`
	TLSKey      string   `env:"PHONENUMBER_TLS_KEY" name:"tls-key" placeholder:"FILE" help:"Private key of the certificate, in PEM."`
	TLSClientCA string   `env:"PHONENUMBER_TLS_CLIENT_CA" name:"tls-client-ca" placeholder:"FILE" help:"CAs in PEM. Callers must have a certificate of one of them."`
	Callers     string   `env:"PHONENUMBER_CALLERS" placeholder:"FILE" help:"YAML file with the callers and their permissions (docs/security.md)."`
	CORSOrigins []string `env:"PHONENUMBER_CORS_ORIGINS" name:"cors-origins" optional:"" type:"origins" placeholder:"ORIGINS" help:"Origins of web pages that may call, separated by commas, such as https://app.example.org (serve: none, dev: any)."`
	Reflection  string   `env:"PHONENUMBER_REFLECTION" default:"on" oneof:"on or off" placeholder:"ON" help:"gRPC reflection, on or off (${default})."`
}

// Limits bound the resources that peers can use. Complete sets CallTimeout and ConnectionAgeGrace if they
// are 0.
type Limits struct {
	Connections        int           `env:"PHONENUMBER_MAX_CONNECTIONS" name:"max-connections" default:"2000" min:"1" max:"1000000" placeholder:"N" help:"Maximum of open connections (${default})."`
	Streams            int           `env:"PHONENUMBER_MAX_STREAMS" name:"max-streams" default:"128" min:"1" max:"100000" placeholder:"N" help:"Maximum of calls in flight on one connection (${default})."`
	Calls              int           `env:"PHONENUMBER_MAX_CALLS" name:"max-calls" default:"1000" min:"1" max:"1000000" placeholder:"N" help:"Maximum of calls in flight; further calls get UNAVAILABLE (${default})."`
	MessageBytes       int           `env:"PHONENUMBER_MAX_MESSAGE_BYTES" name:"max-message-bytes" default:"4096" min:"1024" max:"4194304" placeholder:"N" help:"Maximum size of a message (${default})."`
	HeaderBytes        int           `env:"PHONENUMBER_MAX_HEADER_BYTES" name:"max-header-bytes" default:"8192" min:"8192" max:"1048576" placeholder:"N" help:"Maximum size of a call's headers (${default})."`
	ConnectionTimeout  time.Duration `env:"PHONENUMBER_CONNECTION_TIMEOUT" default:"2s" min:"100ms" max:"1m" placeholder:"DURATION" help:"Timeout for the first bytes of a connection, with TLS, and for the headers of a call (${default})."`
	ReadTimeout        time.Duration `env:"PHONENUMBER_READ_TIMEOUT" default:"5s" min:"100ms" max:"1m" placeholder:"DURATION" help:"Timeout for a whole request over HTTP/1.1 (${default})."`
	IdleTimeout        time.Duration `env:"PHONENUMBER_IDLE_TIMEOUT" default:"5m" min:"1s" max:"24h" placeholder:"DURATION" help:"How long a connection stays open without a call (${default})."`
	ConnectionAge      time.Duration `env:"PHONENUMBER_CONNECTION_AGE" default:"10m" min:"1s" max:"24h" placeholder:"DURATION" help:"Age of a connection at which its client is asked to reconnect; over gRPC it varies by 10 % (${default})."`
	ConnectionAgeGrace time.Duration `env:"PHONENUMBER_CONNECTION_AGE_GRACE" optional:"" min:"1s" max:"24h" placeholder:"DURATION" help:"How long calls on such a connection may continue (the call timeout)."`
	PingInterval       time.Duration `env:"PHONENUMBER_PING_INTERVAL" default:"10s" min:"1s" max:"10m" placeholder:"DURATION" help:"Minimum interval of a gRPC client's pings (${default})."`
	CallTimeout        time.Duration `env:"PHONENUMBER_CALL_TIMEOUT" optional:"" min:"100ms" max:"10m" placeholder:"DURATION" help:"Timeout of a call without a deadline, or with a longer one (the longest send plus 4s)."`
}

// DefaultLimits returns the limits of serve without settings, for tests.
func DefaultLimits() Limits {
	var c Config
	if err := errors.Join(kong.ApplyDefaults(&c, kong.Vars{"listen": "", "drain_delay": "0s"}), c.Complete()); err != nil {
		panic(err)
	}
	return c.Limits
}

// Complete sets the defaults that depend on other settings, and returns an error if settings do
// not fit together.
func (c *Config) Complete() error {
	var errs []error
	if c.CallTimeout == 0 {
		// A send continues after its call has ended. The margin is for the other work of a call.
		c.CallTimeout = verify.LongestSend(c.SMSTimeout) + 4*time.Second
	}
	if c.ConnectionAgeGrace == 0 {
		if c.ConnectionAgeGrace = c.CallTimeout; c.ConnectionAgeGrace < time.Second {
			errs = append(errs, fmt.Errorf("--connection-age-grace (PHONENUMBER_CONNECTION_AGE_GRACE) is %q; it must be a duration from 1s to 24h0m0s, such as 5s or 10m", c.CallTimeout))
		}
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		errs = append(errs, errors.New("--tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY) must be set both, or none"))
	} else if c.TLSClientCA != "" && c.TLSCert == "" {
		errs = append(errs, errors.New("--tls-client-ca (PHONENUMBER_TLS_CLIENT_CA) needs --tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY)"))
	}
	return errors.Join(errs...)
}

// Join returns one error with a line for each line of errs, because an error of errs can join several. It
// returns nil if all of errs are nil.
func Join(errs ...error) error {
	err := errors.Join(errs...)
	if err == nil {
		return nil
	}
	return errors.New("the configuration cannot be used:\n  - " + strings.ReplaceAll(err.Error(), "\n", "\n  - "))
}

// ReadTLS returns the contents of the files of the port's certificates, by name.
func (a Access) ReadTLS() (map[string]string, error) {
	return readFiles(
		[2]string{"--tls-cert (PHONENUMBER_TLS_CERT)", a.TLSCert},
		[2]string{"--tls-key (PHONENUMBER_TLS_KEY)", a.TLSKey},
		[2]string{"--tls-client-ca (PHONENUMBER_TLS_CLIENT_CA)", a.TLSClientCA},
	)
}

// ReadCallers returns the content of the callers file, by its name.
func (a Access) ReadCallers() (map[string]string, error) {
	return readFiles([2]string{"--callers (PHONENUMBER_CALLERS)", a.Callers})
}

// readFiles reads the files that settings name. A setting without a file's name is skipped.
func readFiles(settings ...[2]string) (map[string]string, error) {
	contents := map[string]string{}
	var errs []error
	for _, setting := range settings {
		name := setting[1]
		if name == "" {
			continue
		}
		content, err := os.ReadFile(name)
		contents[name] = string(content)
		var pathError *fs.PathError
		if errors.As(err, &pathError) {
			if strings.Contains(name, "-----BEGIN") { // probably the key itself
				name = "its value is not a file name"
			}
			errs = append(errs, fmt.Errorf("%s: %s: %w", setting[0], name, pathError.Err))
		}
	}
	return contents, errors.Join(errs...)
}
