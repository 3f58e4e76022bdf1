// Package ramrole fetches temporary credentials of a RAM role and renews them: of a role that
// a Kubernetes service account assumes (RRSA), or of the role of an ECS instance. It is a
// package so that package sms only signs, and asks no other service.
package ramrole

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms"
)

// A Set is temporary credentials.
type Set struct {
	sms.Credentials
	Expires time.Time // by Aliyun's clock
	// From the fetch; a wrong clock of this machine does not change it.
	Lifetime time.Duration
}

// A Source fetches credentials. The texts of its errors are fixed, and hold nothing of a reply but
// Aliyun's code and RequestId.
type Source interface {
	Fetch(ctx context.Context) (Set, error)
	Provider() string // the name of the source in Aliyun's SDK
}

// OIDC assumes a role by the token of a Kubernetes service account, with the API AssumeRoleWithOIDC.
type OIDC struct {
	RoleARN     string
	ProviderARN string
	TokenFile   string   // read for each fetch, because Kubernetes rotates it
	SessionName string   // shown in Aliyun's audit log
	Endpoint    *url.URL // of STS
	Transport   http.RoundTripper
}

// Provider implements Source.
func (o OIDC) Provider() string { return "oidc_role_arn" }

// Fetch implements Source.
func (o OIDC) Fetch(ctx context.Context) (Set, error) {
	content, err := os.ReadFile(o.TokenFile)
	token := strings.TrimSpace(string(content))
	if err != nil || token == "" {
		return Set{}, errors.New("the file that ALIBABA_CLOUD_OIDC_TOKEN_FILE names cannot be read, or is empty")
	}
	u := *o.Endpoint
	u.RawQuery = url.Values{
		"Action": {"AssumeRoleWithOIDC"}, "Version": {"2015-04-01"}, "Format": {"JSON"},
		"Timestamp": {time.Now().UTC().Format("2006-01-02T15:04:05Z")},
	}.Encode()
	form := url.Values{
		"RoleArn": {o.RoleARN}, "OIDCProviderArn": {o.ProviderARN}, "OIDCToken": {token},
		"RoleSessionName": {o.SessionName}, "DurationSeconds": {"3600"}, // the maximum of a role by default
	}.Encode()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form))
	if err != nil {
		return Set{}, errInvalidRequest
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	a, err := ask(o.Transport, r)
	if err != nil {
		return Set{}, fmt.Errorf("STS: %w; ALIYUN_STS_ENDPOINT must be an endpoint of STS that this process can reach", err)
	}
	var reply struct {
		Code, RequestId string //nolint:revive // Aliyun's names
		Credentials     issued
	}
	err = json.Unmarshal(a.body, &reply)
	switch {
	case a.status != http.StatusOK:
		secrets := token + fmt.Sprint(reply.Credentials)
		return Set{}, a.rejection("STS", reply.Code, reply.RequestId, secrets, oidcHint(reply.Code))
	case err != nil:
		return Set{}, fmt.Errorf("STS: %w", errMalformed)
	}
	set, err := reply.Credentials.set(o.Provider(), a.date)
	if err != nil {
		return Set{}, fmt.Errorf("STS: %w", err)
	}
	return set, nil
}

// oidcHint returns the remedy for a code of AssumeRoleWithOIDC.
func oidcHint(code string) string {
	switch {
	case strings.Contains(code, "OIDCToken"):
		return "Aliyun does not accept the token in ALIBABA_CLOUD_OIDC_TOKEN_FILE: its audience must be sts.aliyuncs.com, and its issuer that of ALIBABA_CLOUD_OIDC_PROVIDER_ARN"
	case strings.HasPrefix(code, "InvalidTimeStamp"):
		return "this machine's clock is wrong; it needs NTP"
	case strings.Contains(code, "NotExist"):
		return "ALIBABA_CLOUD_ROLE_ARN or ALIBABA_CLOUD_OIDC_PROVIDER_ARN does not exist"
	case strings.Contains(code, "NoPermission"), strings.Contains(code, "Forbidden"), strings.Contains(code, "Deny"):
		return "the trust policy of ALIBABA_CLOUD_ROLE_ARN must let the provider ALIBABA_CLOUD_OIDC_PROVIDER_ARN assume it, with this service account as oidc:sub"
	}
	return ""
}

// DefaultSTSEndpoint is the public endpoint of STS.
const DefaultSTSEndpoint = "https://sts.aliyuncs.com"

// DefaultMetadataEndpoint is the address of the metadata service on every ECS instance.
const DefaultMetadataEndpoint = "http://100.100.100.200"

// ECS fetches the credentials of an ECS instance's RAM role from the instance's metadata service. It
// uses only version 2 of the service, which prevents server-side request forgery (SSRF) by a session
// token.
type ECS struct {
	Role     string
	Endpoint string // DefaultMetadataEndpoint, except in tests
}

// direct is the transport to the metadata service. It uses no proxy, because the service is on the
// instance itself and a proxy would see the credentials.
var direct = &http.Transport{Proxy: nil, DisableKeepAlives: true, MaxResponseHeaderBytes: maxReplyBytes}

// Provider implements Source.
func (e ECS) Provider() string { return "ecs_ram_role" }

// Fetch implements Source.
func (e ECS) Fetch(ctx context.Context) (Set, error) {
	const service = "ECS metadata"
	request := func(method, path, header, value string) (answer, error) {
		r, err := http.NewRequestWithContext(ctx, method, e.Endpoint+"/latest/"+path, nil)
		if err != nil {
			return answer{}, errInvalidRequest
		}
		r.Header.Set(header, value)
		return ask(direct, r)
	}
	session, err := request(http.MethodPut, "api/token", "X-aliyun-ecs-metadata-token-ttl-seconds", "60")
	if err != nil {
		return Set{}, fmt.Errorf("%s: %w; ALIBABA_CLOUD_ECS_METADATA needs an ECS instance whose metadata service this process can reach", service, err)
	}
	sessionToken := strings.TrimSpace(string(session.body))
	if session.status != http.StatusOK || !headerValue.MatchString(sessionToken) {
		return Set{}, session.rejection(service, "", "", "", "no session token: the instance must offer version 2 of the metadata service")
	}
	a, err := request(http.MethodGet, "meta-data/ram/security-credentials/"+e.Role, "X-aliyun-ecs-metadata-token", sessionToken)
	if err != nil {
		return Set{}, fmt.Errorf("%s: %w", service, err)
	}
	if a.status == http.StatusNotFound {
		return Set{}, a.rejection(service, "", "", "", "the RAM role that ALIBABA_CLOUD_ECS_METADATA names is not attached to this instance")
	}
	var reply struct {
		Code string
		issued
	}
	err = json.Unmarshal(a.body, &reply)
	switch {
	case a.status == http.StatusOK && err != nil:
		return Set{}, fmt.Errorf("%s: %w", service, errMalformed)
	case a.status != http.StatusOK, reply.Code != "Success":
		return Set{}, a.rejection(service, reply.Code, "", sessionToken+fmt.Sprint(reply.issued), "")
	}
	set, err := reply.set(e.Provider(), a.date)
	if err != nil {
		return Set{}, fmt.Errorf("%s: %w", service, err)
	}
	return set, nil
}

// headerValue matches the session token of the metadata service.
var headerValue = regexp.MustCompile(`^[!-~]{1,999}$`)

var (
	errInvalidRequest = errors.New("the request cannot be made")
	errMalformed      = errors.New("the reply is no JSON object")
)

// issued is the form in which Aliyun returns credentials.
type issued struct {
	AccessKeyId, AccessKeySecret, SecurityToken, Expiration string //nolint:revive // Aliyun's names
}

// set returns the credentials as a Set. now is the time by Aliyun's clock.
func (i issued) set(provider string, now time.Time) (Set, error) {
	set := Set{Credentials: sms.Credentials{
		AccessKeyID: i.AccessKeyId, AccessKeySecret: i.AccessKeySecret, SecurityToken: i.SecurityToken, Provider: provider,
	}}
	expires, err := time.Parse(time.RFC3339, i.Expiration)
	if err != nil || i.SecurityToken == "" || set.Check() != nil {
		return Set{}, errors.New("the reply has no usable credentials")
	}
	set.Expires, set.Lifetime = expires, expires.Sub(now)
	if set.Lifetime <= 0 {
		return Set{}, errors.New("the reply has credentials that have ended; a clock is wrong")
	}
	return set, nil
}

const maxReplyBytes = 64 << 10

// An answer is a whole reply.
type answer struct {
	status int
	body   []byte
	date   time.Time // by the clock of the server that replied
}

// ask makes one request. It follows no redirect, because the request has a token.
func ask(transport http.RoundTripper, r *http.Request) (answer, error) {
	response, err := transport.RoundTrip(r)
	switch {
	case r.Context().Err() != nil:
		return answer{}, errors.New("no reply in time")
	case err != nil:
		return answer{}, errors.New(sms.ConnectFailure(r.Context(), err))
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusSwitchingProtocols { // the body has no deadline
		return answer{}, errors.New("protocol switched instead of a reply")
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxReplyBytes+1))
	if err != nil || len(body) > maxReplyBytes {
		return answer{}, errors.New("the reply was cut off, or has over 64 KiB")
	}
	date, err := http.ParseTime(response.Header.Get("Date"))
	if err != nil {
		date = time.Now()
	}
	return answer{response.StatusCode, body, date}, nil
}

var idShape = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// rejection returns the error for a reply without credentials. It leaves out a code and a request ID
// that could be a part of a secret.
func (a answer) rejection(service, code, requestID, secrets, hint string) error {
	text := fmt.Sprintf("%s: HTTP %d", service, a.status)
	for _, id := range []string{code, requestID} {
		if idShape.MatchString(id) && !strings.Contains(secrets, id) {
			text += ", " + id
		}
	}
	if hint != "" {
		text += ": " + hint
	}
	return errors.New(text)
}
