package cli

import (
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole"
)

func TestOpenDependencies_UsesTheFirstCredentials(t *testing.T) {
	const roleARN, providerARN = "acs:ram::1:role/r", "acs:ram::1:oidc-provider/p"
	oidc := config.Role{ARN: roleARN, ProviderARN: providerARN, TokenFile: "token", STSEndpoint: ramrole.DefaultSTSEndpoint}
	both := oidc
	both.InstanceRole = "r"
	key := map[string]string{"ALIYUN_ACCESS_KEY_ID": "id", "ALIYUN_ACCESS_KEY_SECRET": "secret"}
	temporary := map[string]string{"ALIYUN_ACCESS_KEY_ID": "id", "ALIYUN_ACCESS_KEY_SECRET": "secret", "ALIYUN_SECURITY_TOKEN": "token"}
	const codeKey = "PHONENUMBER_CODE_KEY is missing: with temporary credentials"
	for _, c := range []struct {
		name     string
		env      map[string]string
		role     config.Role
		codeKey  bool
		provider string // of the role; "" for an access key
		err      string
	}{
		{"a key", key, config.Role{}, false, "", ""},
		{"a key before roles", key, both, false, "", ""},
		{"a key before half a role", key, config.Role{ARN: roleARN}, false, "", ""},
		{"a temporary key", temporary, both, true, "", ""},
		{"a temporary key without a code key", temporary, config.Role{}, false, "", codeKey},
		{"a role by OIDC", nil, oidc, true, "oidc_role_arn", ""},
		{"OIDC before the instance's role", nil, both, true, "oidc_role_arn", ""},
		{"a role by OIDC without a code key", nil, oidc, false, "oidc_role_arn", codeKey},
		{"the instance's role", nil, config.Role{InstanceRole: "r"}, true, "ecs_ram_role", ""},
		{"the instance's role without a code key", nil, config.Role{InstanceRole: "r"}, false, "ecs_ram_role", codeKey},
		{"half a role before the instance's", nil, config.Role{ARN: roleARN, InstanceRole: "r"}, true, "", "ALIBABA_CLOUD_OIDC_PROVIDER_ARN and ALIBABA_CLOUD_OIDC_TOKEN_FILE are missing"},
		{"half a key", map[string]string{"ALIYUN_ACCESS_KEY_ID": "id"}, oidc, true, "", "ALIYUN_ACCESS_KEY_SECRET is missing"},
		{"a token alone", map[string]string{"ALIYUN_SECURITY_TOKEN": "token"}, oidc, true, "", "ALIYUN_ACCESS_KEY_ID is missing"},
		{"nothing", nil, config.Role{}, true, "", "ALIYUN_ACCESS_KEY_ID is missing"},
		{"no ARN of a role", nil, config.Role{ARN: "role", ProviderARN: providerARN, TokenFile: "t"}, true, "", `ALIBABA_CLOUD_ROLE_ARN is "role"; it must be acs:ram::ACCOUNT:role/NAME`},
		{"no ARN of a provider", nil, config.Role{ARN: roleARN, ProviderARN: roleARN, TokenFile: "t"}, true, "", `ALIBABA_CLOUD_OIDC_PROVIDER_ARN is "acs:ram::1:role/r"; it must be acs:ram::ACCOUNT:oidc-provider/NAME`},
		{"no STS endpoint", nil, config.Role{ARN: roleARN, ProviderARN: providerARN, TokenFile: "t", STSEndpoint: "sts"}, true, "", "--aliyun-sts-endpoint (ALIYUN_STS_ENDPOINT): the Aliyun endpoint must be https://HOST"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, name := range []string{"ALIYUN_ACCESS_KEY_ID", "ALIYUN_ACCESS_KEY_SECRET", "ALIYUN_SECURITY_TOKEN", "PHONENUMBER_CODE_KEY"} {
				t.Setenv(name, c.env[name])
			}
			if c.codeKey {
				t.Setenv("PHONENUMBER_CODE_KEY", strings.Repeat("A", 43)+"=")
			}
			t.Setenv("DATA_SOURCE_NAME", "sqlite:"+t.TempDir()+"/codes.db")
			settings := serveSettings{
				Config: config.Config{Rules: config.Rules{CodeTTL: time.Minute}},
				Aliyun: config.Aliyun{Endpoint: sms.DefaultEndpoint, PNVSEndpoint: sms.DefaultPNVSEndpoint, Role: c.role}, DatabaseConnections: 1,
			}
			if settings.Role.STSEndpoint == "" {
				settings.Role.STSEndpoint = ramrole.DefaultSTSEndpoint
			}
			s, err := settings.openDependencies()
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Fatalf("got the error %v; want %q", err, c.err)
			}
			got := ""
			if s.role != nil {
				got = s.role.Provider()
			}
			if got != c.provider {
				t.Errorf("got the role %q; want %q", got, c.provider)
			}
			if err == nil {
				if ready := s.aliyun.Ready() == nil; ready != (c.provider == "") {
					t.Errorf("got the sender ready: %t; want it only with an access key", ready)
				}
			}
			if s.db != nil {
				s.db.Close()
			}
		})
	}
}

// An agent that rotates a temporary access key writes three files.
func TestStableSecretReads_WaitForTheWholeKey(t *testing.T) {
	secrets := func(id, secret, token string) map[string]string {
		return map[string]string{config.AccessKeyID: id, config.AccessKeySecret: secret, config.SecurityToken: token}
	}
	for _, c := range []struct {
		before, now map[string]string
		want        int
	}{
		{secrets("a", "a", ""), secrets("b", "b", ""), 0},
		{secrets("a", "a", ""), secrets("b", "a", ""), 15},
		{secrets("a", "a", ""), secrets("a", "a", ""), 0},
		{secrets("a", "a", "a"), secrets("b", "b", "b"), 0},
		{secrets("a", "a", "a"), secrets("b", "b", "a"), 15},
		{secrets("a", "a", "a"), secrets("a", "a", "b"), 15},
		{secrets("a", "a", ""), secrets("b", "b", "b"), 0},
	} {
		if got := stableSecretReads(c.before, c.now); got != c.want {
			t.Errorf("%v to %v: got %d; want %d", c.before, c.now, got, c.want)
		}
	}
}
