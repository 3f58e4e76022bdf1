package config

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Aliyun are the settings of serve, check and inspect for requests to Aliyun. The access key is a secret
// (secrets.go).
type Aliyun struct {
	Endpoint         string `env:"ALIYUN_ENDPOINT" name:"aliyun-endpoint" default:"${aliyun_endpoint}" placeholder:"URL" help:"URL of Aliyun's product SMS, for template codes such as SMS_123456789 (${default})."`
	PNVSEndpoint     string `env:"ALIYUN_PNVS_ENDPOINT" name:"aliyun-pnvs-endpoint" default:"${aliyun_pnvs_endpoint}" placeholder:"URL" help:"URL of Aliyun's product PNVS, for template codes of six digits (${default})."`
	TemplateVariable string `env:"PHONENUMBER_TEMPLATE_VARIABLE" default:"${template_variable}" type:"variable" placeholder:"NAME" help:"Name of the variable in templates of the product SMS (${default})."`
	Role             Role   `embed:""`
}

// Role are the settings of temporary credentials. Their variables have the names that Aliyun's SDK
// reads and that ACK's RRSA sets.
type Role struct {
	STSEndpoint  string `env:"ALIYUN_STS_ENDPOINT" name:"aliyun-sts-endpoint" default:"${aliyun_sts_endpoint}" placeholder:"URL" help:"URL of Aliyun STS, for a role by OIDC (${default})."`
	ARN          string `env:"ALIBABA_CLOUD_ROLE_ARN" name:"role-arn" placeholder:"ARN" help:"RAM role that the service assumes by OIDC, if there is no access key. RRSA sets it and the next two."`
	ProviderARN  string `env:"ALIBABA_CLOUD_OIDC_PROVIDER_ARN" name:"oidc-provider-arn" placeholder:"ARN" help:"OIDC provider of the role."`
	TokenFile    string `env:"ALIBABA_CLOUD_OIDC_TOKEN_FILE" name:"oidc-token-file" placeholder:"FILE" help:"File with the token of the service account."`
	SessionName  string `env:"ALIBABA_CLOUD_ROLE_SESSION_NAME" name:"role-session-name" default:"phone-number-service" type:"session" placeholder:"NAME" help:"Name of the role's sessions in Aliyun's audit log (${default})."`
	InstanceRole string `env:"ALIBABA_CLOUD_ECS_METADATA" name:"ecs-role" type:"session" optional:"" placeholder:"NAME" help:"RAM role of this ECS instance, if there is neither an access key nor a role by OIDC."`
}

// RoleVariables are the variables of the two kinds of roles, for texts.
const RoleVariables = "ALIBABA_CLOUD_ROLE_ARN, ALIBABA_CLOUD_OIDC_PROVIDER_ARN and ALIBABA_CLOUD_OIDC_TOKEN_FILE, which RRSA sets together, or ALIBABA_CLOUD_ECS_METADATA"

// Wanted reports whether a role is set, so that no access key is needed.
func (r Role) Wanted() bool { return r.ByOIDC() || r.InstanceRole != "" }

// ByOIDC reports whether the role is assumed by OIDC, and is not the role of the ECS instance.
func (r Role) ByOIDC() bool { return r.ARN+r.ProviderARN+r.TokenFile != "" }

var (
	roleARN     = regexp.MustCompile(`^acs:ram::[0-9]+:role/[A-Za-z0-9.@_/-]+$`)
	providerARN = regexp.MustCompile(`^acs:ram::[0-9]+:oidc-provider/[A-Za-z0-9.@_/-]+$`)
)

// Check returns an error if the settings of a role by OIDC are incomplete or malformed.
func (r Role) Check() error {
	var errs []error
	var missing []string
	for _, s := range []struct {
		name, value, want string
		pattern           *regexp.Regexp
	}{
		{"ALIBABA_CLOUD_ROLE_ARN", r.ARN, "acs:ram::ACCOUNT:role/NAME", roleARN},
		{"ALIBABA_CLOUD_OIDC_PROVIDER_ARN", r.ProviderARN, "acs:ram::ACCOUNT:oidc-provider/NAME", providerARN},
		{"ALIBABA_CLOUD_OIDC_TOKEN_FILE", r.TokenFile, "", regexp.MustCompile(``)},
	} {
		if s.value == "" {
			missing = append(missing, s.name)
		} else if !s.pattern.MatchString(s.value) {
			errs = append(errs, fmt.Errorf("%s is %q; it must be %s", s.name, s.value, s.want))
		}
	}
	if missing != nil {
		errs = append(errs, fmt.Errorf("%s missing: a role by OIDC needs ALIBABA_CLOUD_ROLE_ARN, ALIBABA_CLOUD_OIDC_PROVIDER_ARN and ALIBABA_CLOUD_OIDC_TOKEN_FILE, which RRSA sets together",
			strings.Join(missing, " and ")+map[bool]string{true: " is", false: " are"}[len(missing) == 1]))
	}
	return errors.Join(errs...)
}
