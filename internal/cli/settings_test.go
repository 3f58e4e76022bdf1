package cli

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
)

// rejection runs a command with only these variables. It returns the error with which the command
// does not start.
func rejection(t *testing.T, env []string, args ...string) string {
	t.Helper()
	defer setEnvironment(os.Environ())
	setEnvironment(env)
	stopped, stop := context.WithCancel(t.Context()) // if it starts, it ends at once
	stop()
	command, errs := config.Parse(&commands{}, args, vars, kong.BindTo(stopped, (*context.Context)(nil)), kong.Bind(newProcess("test")))
	err := command.Run(errs)
	if err == nil {
		t.Fatalf("%v started; want an error", args)
	}
	return err.Error()
}

// setEnvironment replaces all variables.
func setEnvironment(env []string) {
	os.Clearenv()
	for _, entry := range env {
		name, value, _ := strings.Cut(entry, "=")
		os.Setenv(name, value)
	}
}

func TestSettings_EveryErrorIsReportedAtOnce(t *testing.T) {
	for _, c := range []struct {
		name  string
		env   []string
		args  []string
		wants []string
	}{
		{"nothing set", nil, nil, []string{
			"DATA_SOURCE_NAME is missing", "ALIYUN_ACCESS_KEY_ID is missing",
			"ALIYUN_ACCESS_KEY_SECRET is missing",
		}},
		{"everything wrong", []string{
			"DATA_SOURCE_NAME=root:hunter2@nonsense", "ALIYUN_ACCESS_KEY_ID=id", "ALIYUN_ACCESS_KEY_SECRET=hunter3",
			"ALIYUN_ENDPOINT=http://sms.example",
			"PHONENUMBER_LISTEN=nowhere", "PHONENUMBER_ATTEMPT_LIMIT=101", "PHONENUMBER_CODE_TTL=11m", "PHONENUMBER_REGION=XX",
			"PHONENUMBER_CODE_KEY=aHVudGVyNA==", "PHONENUMBER_SMS_TIMEOUT=1h", "PHONENUMBER_DRAIN_DELAY=-1s", "PHONENUMBER_LOG_LEVEL=loud",
			"PHONENUMBER_LOG_FORMAT=xml", "PHONENUMBER_METRICS_LISTEN=x", "PHONENUMBER_RETENTION=23h", "PHONENUMBER_CODE_TLL=5m",
			"PHONENUMBER_DATABASE_CONNECTIONS=0", "PHONENUMBER_DELIVERY_SAMPLE=1.1",
			"OTEL_EXPORTER_OTLP_ENDPOINT=http://hunter5:hunter6@a collector",
		}, nil, []string{
			"DATA_SOURCE_NAME", "ALIYUN_ENDPOINT", "PHONENUMBER_LISTEN", "PHONENUMBER_ATTEMPT_LIMIT", "PHONENUMBER_CODE_TTL", "PHONENUMBER_REGION",
			"PHONENUMBER_CODE_KEY", "PHONENUMBER_SMS_TIMEOUT", "PHONENUMBER_DRAIN_DELAY", "PHONENUMBER_LOG_LEVEL", "PHONENUMBER_LOG_FORMAT",
			"PHONENUMBER_METRICS_LISTEN", `PHONENUMBER_RETENTION) is "23h"; it must be a duration from 24h`, "PHONENUMBER_CODE_TLL is no setting",
			"PHONENUMBER_DATABASE_CONNECTIONS) is \"0\"; it must be a whole number from 1 to 1000",
			"--delivery-sample (PHONENUMBER_DELIVERY_SAMPLE) is \"1.1\"; it must be a number from 0 to 1, such as 0.01",
			"OTEL_EXPORTER_OTLP_ENDPOINT must be http://",
		}},
		{"a secret twice", []string{"ALIYUN_ACCESS_KEY_ID=a", "ALIYUN_ACCESS_KEY_ID_FILE=/dev/null"}, nil, []string{"ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_ID_FILE are both set"}},
		{
			"a secret in place of a file name",
			[]string{"DATA_SOURCE_NAME_FILE=root:hunter2@tcp(db:3306)/x"},
			nil,
			[]string{"the file that DATA_SOURCE_NAME_FILE names: no such file"},
		},
		{
			"an empty secret file",
			[]string{"PHONENUMBER_CODE_KEY_FILE=/dev/null", "ALIYUN_ACCESS_KEY_SECRET_FILE=/dev/null"},
			nil,
			[]string{"the file that PHONENUMBER_CODE_KEY_FILE names is empty", "the file that ALIYUN_ACCESS_KEY_SECRET_FILE names is empty"},
		},
		{"an in-memory database for serve", []string{"DATA_SOURCE_NAME=sqlite::memory:"}, nil, []string{"loses every code at a restart"}},
		{
			"keys with a space",
			[]string{"ALIYUN_ACCESS_KEY_ID=hunter 2", "ALIYUN_ACCESS_KEY_SECRET=hunter 3"},
			nil,
			[]string{"access key ID must be printable", "access key secret must be printable", "DATA_SOURCE_NAME is missing"},
		},
		{
			"an invalid proxy URL",
			[]string{"HTTPS_PROXY=http://user:hunter#2@10.0.0.1:3128"},
			nil,
			[]string{"HTTPS_PROXY must be http://HOST:PORT", "DATA_SOURCE_NAME is missing"},
		},
		{"a proxy in quotes", []string{`https_proxy="http://10.0.0.1:3128"`}, nil, []string{"https_proxy must be http://HOST:PORT", "ALIYUN_ACCESS_KEY_ID is missing"}},
		{
			"wrong endpoints, variable and role",
			[]string{
				"ALIYUN_PNVS_ENDPOINT=http://sms.example", "PHONENUMBER_TEMPLATE_VARIABLE=${code}", "ALIBABA_CLOUD_ECS_METADATA=a/b",
				"ALIYUN_STS_ENDPOINT=sts", "ALIBABA_CLOUD_ROLE_ARN=hunt",
			},
			nil,
			[]string{
				"--aliyun-pnvs-endpoint (ALIYUN_PNVS_ENDPOINT): the Aliyun endpoint must be https://HOST",
				`--template-variable (PHONENUMBER_TEMPLATE_VARIABLE) is "${code}"; it must be the name of the template's variable`,
				`--ecs-role (ALIBABA_CLOUD_ECS_METADATA) is "a/b"; it must be a name of 2 to 64 letters`,
				"--aliyun-sts-endpoint (ALIYUN_STS_ENDPOINT): the Aliyun endpoint must be https://HOST",
				"; the default is https://sts.aliyuncs.com",
				`ALIBABA_CLOUD_ROLE_ARN is "hunt"; it must be acs:ram::ACCOUNT:role/NAME`,
				"ALIBABA_CLOUD_OIDC_PROVIDER_ARN and ALIBABA_CLOUD_OIDC_TOKEN_FILE are missing",
				"PHONENUMBER_CODE_KEY is missing: with temporary credentials",
			},
		},
		{
			"a role for dev",
			[]string{"ALIBABA_CLOUD_ROLE_ARN=acs:ram::1:role/r"},
			[]string{"dev"},
			[]string{"ALIBABA_CLOUD_ROLE_ARN is set, so this may be production"},
		},
		{
			"two data source names",
			[]string{"DATA_SOURCE_NAME=a", "Data_SOURCE_NAME=b"},
			nil,
			[]string{"DATA_SOURCE_NAME and Data_SOURCE_NAME are both set"},
		},
		{
			"credentials for dev",
			[]string{"ALIYUN_ACCESS_KEY_ID=a", "ALIYUN_ACCESS_KEY_SECRET_FILE=b"},
			[]string{"dev"},
			[]string{"ALIYUN_ACCESS_KEY_ID is set", "ALIYUN_ACCESS_KEY_SECRET is set", "--ignore-credentials"},
		},
		{
			"an unknown failure",
			[]string{"PHONENUMBER_FAIL_SENDS=limit:3", "PHONENUMBER_REGION=XX"},
			[]string{"dev"},
			[]string{"PHONENUMBER_FAIL_SENDS", "limit_minute, limit_hour", "PHONENUMBER_REGION"},
		},
		{
			"failures for serve",
			[]string{"PHONENUMBER_FAIL_SENDS=timeout"},
			nil,
			[]string{"PHONENUMBER_FAIL_SENDS is for dev alone", "DATA_SOURCE_NAME is missing"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			out := rejection(t, c.env, c.args...)
			for _, want := range c.wants {
				if !strings.Contains(out, want) {
					t.Errorf("the message lacks %q:\n%s", want, out)
				}
			}
			list, ok := strings.CutPrefix(out, "the configuration cannot be used:\n")
			for line := range strings.Lines(list) {
				if !ok || !strings.HasPrefix(line, "  - ") {
					t.Errorf("a config error without its list mark: %q", line)
				}
			}
			if strings.Contains(out, "hunter") || strings.Contains(out, "aHVudGVyNA") {
				t.Errorf("the message contains a secret:\n%s", out)
			}
		})
	}
}

func TestSettings_BadFilesAndLimitsStopTheStart(t *testing.T) {
	ca, dir := catest.New(t), t.TempDir()
	certificate, key := ca.Issue("login.example.org")
	_, another := ca.Issue("login.example.org")
	crt, pkey := testutil.WriteFile(t, dir, "tls.crt", certificate), testutil.WriteFile(t, dir, "tls.key", key)
	tlsWith := func(name, content string) []string {
		env := map[string]string{"PHONENUMBER_TLS_CERT": crt, "PHONENUMBER_TLS_KEY": pkey}
		env[name] = testutil.WriteFile(t, t.TempDir(), "file", content)
		list := []string{}
		for name, path := range env {
			list = append(list, name+"="+path)
		}
		return list
	}
	callersFile := func(content string) []string {
		return []string{"PHONENUMBER_CALLERS=" + testutil.WriteFile(t, t.TempDir(), "callers.yaml", content)}
	}
	for name, c := range map[string]struct {
		env   []string
		wants []string
	}{
		"only a certificate":     {[]string{"PHONENUMBER_TLS_CERT=" + crt}, []string{"--tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY) must be set both"}},
		"only a client CA":       {[]string{"PHONENUMBER_TLS_CLIENT_CA=" + crt}, []string{"--tls-client-ca (PHONENUMBER_TLS_CLIENT_CA) needs --tls-cert"}},
		"no such file":           {[]string{"PHONENUMBER_TLS_CERT=" + crt, "PHONENUMBER_TLS_KEY=/nowhere/tls.key"}, []string{"--tls-key (PHONENUMBER_TLS_KEY): /nowhere/tls.key: no such file"}},
		"a key as the file name": {[]string{"PHONENUMBER_TLS_CERT=" + crt, "PHONENUMBER_TLS_KEY=" + key}, []string{"--tls-key (PHONENUMBER_TLS_KEY): its value is not a file name"}},
		"another certificate's key": {
			tlsWith("PHONENUMBER_TLS_KEY", another),
			[]string{"/file: line 1: must be the key of the first certificate in " + crt},
		},
		"an invalid key":     {tlsWith("PHONENUMBER_TLS_KEY", "hunter2"), []string{"/file: line 1: must be a private key in PEM"}},
		"an empty client CA": {tlsWith("PHONENUMBER_TLS_CLIENT_CA", ""), []string{"/file: line 1: must hold a certificate in PEM"}},
		"a plaintext token": {callersFile("callers:\n  - name: a\n    token_sha256: hunter2\n    quota: 3"), []string{
			"/callers.yaml: line 3: token_sha256 must be the SHA-256", "/callers.yaml: line 4: is no field here",
		}},
		"no client CA is set": {callersFile("callers:\n  - name: a\n    dns_san: a.example.org"), []string{"/callers.yaml: line 3: certificates are asked for with PHONENUMBER_TLS_CLIENT_CA"}},
		"a directory": {
			[]string{"PHONENUMBER_CALLERS=" + dir},
			[]string{"--callers (PHONENUMBER_CALLERS): " + dir + ": is a directory"},
		},
		"origins and reflection": {[]string{"PHONENUMBER_CORS_ORIGINS=*", "PHONENUMBER_REFLECTION=maybe"}, []string{`PHONENUMBER_CORS_ORIGINS): origin 1 cannot match a web page`, `PHONENUMBER_REFLECTION) is "maybe"; it must be on or off`}},
		"an origin with a path":  {[]string{"PHONENUMBER_CORS_ORIGINS=https://a.example.org,https://b.example.org/x"}, []string{"PHONENUMBER_CORS_ORIGINS): origin 2 cannot"}},
		"an origin with a user":  {[]string{"PHONENUMBER_CORS_ORIGINS=https://login:hunter2@a.example.org"}, []string{"PHONENUMBER_CORS_ORIGINS): origin 1 cannot"}},
		"no origin at all":       {[]string{"PHONENUMBER_CORS_ORIGINS=, "}, []string{"PHONENUMBER_CORS_ORIGINS) holds no origin"}},
		"limits": {
			[]string{
				"PHONENUMBER_MAX_CONNECTIONS=0", "PHONENUMBER_MAX_STREAMS=x", "PHONENUMBER_MAX_CALLS=-1", "PHONENUMBER_MAX_MESSAGE_BYTES=9999999",
				"PHONENUMBER_MAX_HEADER_BYTES=1",
				"PHONENUMBER_CONNECTION_TIMEOUT=1h", "PHONENUMBER_READ_TIMEOUT=0s", "PHONENUMBER_IDLE_TIMEOUT=1ms", "PHONENUMBER_CONNECTION_AGE=x",
				"PHONENUMBER_CONNECTION_AGE_GRACE=x", "PHONENUMBER_PING_INTERVAL=1ms", "PHONENUMBER_CALL_TIMEOUT=1h",
			},
			[]string{
				`PHONENUMBER_MAX_CONNECTIONS) is "0"; it must be a whole number from 1`, "PHONENUMBER_MAX_STREAMS", "PHONENUMBER_MAX_CALLS", "PHONENUMBER_MAX_MESSAGE_BYTES", "PHONENUMBER_MAX_HEADER_BYTES",
				`PHONENUMBER_CONNECTION_TIMEOUT) is "1h"; it must be a duration from 100ms to 1m`, "PHONENUMBER_READ_TIMEOUT", "PHONENUMBER_IDLE_TIMEOUT", "PHONENUMBER_CONNECTION_AGE)", "PHONENUMBER_CONNECTION_AGE_GRACE", "PHONENUMBER_PING_INTERVAL", "PHONENUMBER_CALL_TIMEOUT",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, subcommand := range []string{"serve", "dev"} {
				out := rejection(t, c.env, subcommand)
				for _, want := range c.wants {
					if !strings.Contains(out, want) {
						t.Errorf("%s: the message lacks %q:\n%s", subcommand, want, out)
					}
				}
				if strings.Contains(out, "hunter2") || strings.Contains(out, strings.Split(key, "\n")[1]) {
					t.Errorf("%s: the message contains a secret:\n%s", subcommand, out)
				}
			}
		})
	}
}
