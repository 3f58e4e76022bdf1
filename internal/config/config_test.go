package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

type testCommands struct {
	Run struct{ Config } `kong:"cmd,default='withargs',set='listen=:50511',set='drain_delay=5s'"`
}

// parse returns the settings of args and the environment, and all errors.
func parse(args ...string) (Config, error) {
	var c testCommands
	_, errs := Parse(&c, args)
	err := c.Run.Complete()
	return c.Run.Config, Join(append(errs, err)...)
}

func TestParse_ReportsAllErrorsInTheOrderOfTheSettings(t *testing.T) {
	for name, value := range map[string]string{
		"PHONENUMBER_CODE_TLL": "5m", "PHONENUMBER_ATTEMPT_LIMIT": "101", "PHONENUMBER_CODE_TTL": "11m", "PHONENUMBER_REGION": "XX",
		"PHONENUMBER_LISTEN": "nowhere", "PHONENUMBER_LOG_LEVEL": "loud", "PHONENUMBER_CORS_ORIGINS": "https://a.example.org *",
		"PHONENUMBER_MAX_CALLS": "many", "PHONENUMBER_TLS_CERT": "tls.crt",
	} {
		t.Setenv(name, value)
	}
	_, err := parse("--retention", "23h")
	want := []string{
		"the configuration cannot be used:",
		"  - PHONENUMBER_CODE_TLL is no setting of this service; there are PHONENUMBER_ATTEMPT_LIMIT, PHONENUMBER_CALLERS, ",
		`  - --attempt-limit (PHONENUMBER_ATTEMPT_LIMIT) is "101"; it must be a whole number from 1 to 100`,
		`  - --code-ttl (PHONENUMBER_CODE_TTL) is "11m"; it must be a duration from 1s to 10m0s, such as 5s or 10m`,
		`  - --region (PHONENUMBER_REGION) is "XX"; it must be an ISO 3166 code in capitals, such as CN or SG`,
		`  - --listen (PHONENUMBER_LISTEN) is "nowhere"; it must be host:port or :port, such as 127.0.0.1:50511`,
		`  - --log-level (PHONENUMBER_LOG_LEVEL) is "loud"; it must be debug, info, warn or error`,
		"  - --cors-origins (PHONENUMBER_CORS_ORIGINS): origin 2 cannot match a web page; it must be such as https://app.example.org",
		`  - --max-calls (PHONENUMBER_MAX_CALLS) is "many"; it must be a whole number from 1 to 1000000`,
		`  - --retention (PHONENUMBER_RETENTION) is "23h"; it must be a duration from 24h0m0s to 87600h0m0s, such as 5s or 10m`,
		"  - --tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY) must be set both, or none",
	}
	if err == nil {
		t.Fatal("got no error")
	}
	got := strings.Split(err.Error(), "\n")
	if len(got) != len(want) {
		t.Fatalf("got %d lines; want %d:\n%v", len(got), len(want), err)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("line %d: got %q; want %q", i, got[i], want[i])
		}
	}
}

// A flag overrides its variable, right or wrong, and the last of two flags counts.
func TestParse_FlagsOverrideVariables(t *testing.T) {
	for _, c := range []struct {
		variable string
		args     []string
		want     time.Duration // 0 for an error
	}{
		{"1m", nil, time.Minute},
		{"", nil, 10 * time.Minute},
		{"x", nil, 0},
		{"1m", []string{"--code-ttl", "2m"}, 2 * time.Minute},
		{"x", []string{"--code-ttl", "2m"}, 2 * time.Minute},
		{"1m", []string{"--code-ttl", "x"}, 0},
		{"x", []string{"--code-ttl", "x", "--code-ttl", "3m"}, 3 * time.Minute},
		{"1m", []string{"--code-ttl", "3m", "--code-ttl", "x"}, 0},
		{"1m", []string{"--code-ttl", ""}, 0},
	} {
		t.Setenv("PHONENUMBER_CODE_TTL", c.variable)
		got, err := parse(c.args...)
		if (err != nil) != (c.want == 0) {
			t.Errorf("variable %q, %q: got %v; want an error: %v", c.variable, c.args, err, c.want == 0)
		}
		if err == nil && got.CodeTTL != c.want {
			t.Errorf("variable %q, %q: got %v; want %v", c.variable, c.args, got.CodeTTL, c.want)
		}
	}
}

func TestParse_AnEmptyOptionalSettingIsItsDefault(t *testing.T) {
	got, err := parse("--listen=", "--drain-delay=", "--metrics-listen=", "--cors-origins=",
		"--call-timeout=", "--connection-age-grace=", "--sms-timeout=10s")
	if err != nil {
		t.Fatal(err)
	}
	if got.Listen != ":50511" || got.DrainDelay != 5*time.Second || got.MetricsListen != "" || len(got.CORSOrigins) != 0 {
		t.Errorf("got %+v; want the command's defaults", got)
	}
	if got.CallTimeout != 20*time.Second || got.ConnectionAgeGrace != 20*time.Second {
		t.Errorf("got the call timeout %v and the grace %v; want 20s, the longest send plus 4s", got.CallTimeout, got.ConnectionAgeGrace)
	}
}

// Kubernetes injects variables for each Service, such as PHONENUMBER_PORT if the Service is
// named phonenumber. They are no error. A setting whose value is empty counts as unset.
func TestParse_KubernetesVariablesAreNoError(t *testing.T) {
	for name, value := range map[string]string{
		"PHONENUMBER_SERVICE_HOST": "10.0.0.1", "PHONENUMBER_SERVICE_PORT": "50511", "PHONENUMBER_SERVICE_PORT_GRPC": "50511",
		"PHONENUMBER_PORT": "tcp://10.0.0.1:50511", "PHONENUMBER_PORT_50511_TCP": "tcp://10.0.0.1:50511",
		"PHONENUMBER_PORT_50511_TCP_ADDR": "10.0.0.1", "PHONENUMBER_GRPC_SERVICE_HOST": "10.0.0.1",
		"PHONENUMBER_SERVICE_SERVICE_HOST": "10.0.0.1", "PHONENUMBER_CODE_TTL": "", "PHONENUMBER_REGION": "",
	} {
		t.Setenv(name, value)
	}
	if got, err := parse(); err != nil || got.CodeTTL != 10*time.Minute {
		t.Errorf("got the lifetime %v, %v; want the default of 10m", got.CodeTTL, err)
	}
}

func TestSettings_HaveARangeThatCanBeParsed(t *testing.T) {
	for _, flag := range kong.Must(&testCommands{}).Model.Children[0].Flags {
		switch minimum, maximum := flag.Tag.Get("min"), flag.Tag.Get("max"); flag.Target.Interface().(type) {
		case int:
			least, err := flag.Tag.GetInt("min")
			if most, maxErr := flag.Tag.GetInt("max"); err != nil || maxErr != nil || least >= most {
				t.Errorf("--%s: got the range %q to %q", flag.Name, minimum, maximum)
			}
		case time.Duration:
			least, err := time.ParseDuration(minimum)
			if most, maxErr := time.ParseDuration(maximum); err != nil || maxErr != nil || least >= most {
				t.Errorf("--%s: got the range %q to %q", flag.Name, minimum, maximum)
			}
		}
	}
}

func TestRules_RangeIsThatOfVerify(t *testing.T) {
	got, err := parse("--attempt-limit=100", "--code-ttl=10m")
	if err != nil || got.AttemptLimit != verify.MaxAttemptLimit || got.CodeTTL != verify.MaxCodeTTL {
		t.Errorf("got %d and %v, %v; want %d and %v", got.AttemptLimit, got.CodeTTL, err, verify.MaxAttemptLimit, verify.MaxCodeTTL)
	}
}

func TestSecretReader_RejectsATruncatedFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	t.Setenv("ALIYUN_ACCESS_KEY_SECRET_FILE", file)
	t.Setenv("DATA_SOURCE_NAME", "sqlite:codes.db")
	t.Setenv("ALIYUN_ACCESS_KEY_ID", "id")
	var reader SecretReader
	for _, c := range []struct {
		content, want string
	}{
		{"hunter2", ""},
		{"hunter2\n", ""},
		{"hunter", "ALIYUN_ACCESS_KEY_SECRET_FILE names must end with a newline, as it did before"},
		{"", "the file that ALIYUN_ACCESS_KEY_SECRET_FILE names is empty"},
		{"hunter3\n", ""},
	} {
		if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := reader.Read()
		if err != nil != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got the error %v; want %q", c.content, err, c.want)
		}
		if want := strings.TrimSpace(c.content); got[AccessKeySecret] != want {
			t.Errorf("%q: got %q; want %q", c.content, got[AccessKeySecret], want)
		}
	}
}

func TestSecretReader_ErrorNamesTheRole(t *testing.T) {
	const file = "/nowhere/secret"
	const missing = "the file that ALIYUN_ACCESS_KEY_SECRET_FILE names: no such file or directory"
	for _, c := range []struct {
		name string
		env  map[string]string
		role bool
		want string // the end of the error; "" for none
	}{
		{"nothing", nil, false, "; or use a RAM role: set " + RoleVariables},
		{"a role", nil, true, ""},
		{
			"files of an access key beside a role",
			map[string]string{"ALIYUN_ACCESS_KEY_ID_FILE": file, "ALIYUN_ACCESS_KEY_SECRET_FILE": file},
			true,
			missing + "; to use the role, unset ALIYUN_ACCESS_KEY_ID_FILE, ALIYUN_ACCESS_KEY_SECRET_FILE",
		},
		{
			"a part of an access key beside a role",
			map[string]string{"ALIYUN_ACCESS_KEY_ID": "id"},
			true,
			"ALIYUN_ACCESS_KEY_SECRET_FILE names); to use the role, unset ALIYUN_ACCESS_KEY_ID",
		},
		{"files without a role", map[string]string{"ALIYUN_ACCESS_KEY_ID": "id", "ALIYUN_ACCESS_KEY_SECRET_FILE": file}, false, missing},
		{"an access key beside a role", map[string]string{"ALIYUN_ACCESS_KEY_ID": "id", "ALIYUN_ACCESS_KEY_SECRET": "secret"}, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, name := range []string{AccessKeyID, AccessKeySecret, SecurityToken} {
				t.Setenv(name, c.env[name])
				t.Setenv(name+"_FILE", c.env[name+"_FILE"])
			}
			_, err := (&SecretReader{Role: c.role}).AccessKey()
			if (err == nil) != (c.want == "") || err != nil && !strings.HasSuffix(err.Error(), c.want) {
				t.Errorf("got the error %v; want …%s", err, c.want)
			}
		})
	}
}
