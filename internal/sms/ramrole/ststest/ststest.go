// Package ststest is a fake of the two services that issue temporary credentials for Aliyun, for
// tests: STS, and the metadata service of ECS instances. It checks every request as these do.
package ststest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
)

// The role, the provider and the token that STS knows, and the role of the instance.
const (
	RoleARN     = "acs:ram::1234567890123456:role/phone-number-service"
	ProviderARN = "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123456789abcdef"
	FirstToken  = "eyJhbGciOiJSUzI1NiJ9.FirstServiceAccountToken.c2lnbmF0dXJl"
	ECSRole     = "phone-number-service"
)

// A Server listens on a loopback address for each of the two services until its test ends.
type Server struct {
	STSURL      string
	MetadataURL string

	mu       sync.Mutex
	token    string // of the service account
	lifetime time.Duration
	skew     time.Duration // of Aliyun's clock
	revoked  bool
	broken   http.HandlerFunc // nil unless the services are broken
	issued   map[string]dysmsapitest.Issued
	sessions []string // tokens of the metadata service
	requests int
}

// New starts a Server that issues credentials for an hour.
func New(t testing.TB) *Server {
	s := &Server{token: FirstToken, lifetime: time.Hour, issued: map[string]dysmsapitest.Issued{}}
	listen := func(handler http.HandlerFunc) string {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var broken http.HandlerFunc
			s.set(func() {
				s.requests++
				w.Header().Set("Date", time.Now().Add(s.skew).UTC().Format(http.TimeFormat))
				broken = s.broken
			})
			if broken != nil {
				broken(w, r)
				return
			}
			s.set(func() { handler(w, r) })
		}))
		t.Cleanup(server.Close)
		return server.URL
	}
	s.STSURL, s.MetadataURL = listen(s.sts), listen(s.metadata)
	return s
}

func (s *Server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// SetToken makes STS accept only this token of the service account.
func (s *Server) SetToken(token string) { s.set(func() { s.token = token }) }

// SetLifetime sets the lifetime of credentials that are issued later.
func (s *Server) SetLifetime(d time.Duration) { s.set(func() { s.lifetime = d }) }

// SetSkew sets Aliyun's clock ahead of this machine's.
func (s *Server) SetSkew(d time.Duration) { s.set(func() { s.skew = d }) }

// Revoke takes the role away, or gives it back.
func (s *Server) Revoke(revoked bool) { s.set(func() { s.revoked = revoked }) }

// Break makes both services reply by handler; nil mends them.
func (s *Server) Break(handler http.HandlerFunc) { s.set(func() { s.broken = handler }) }

// Requests counts the requests to both services.
func (s *Server) Requests() (n int) { s.set(func() { n = s.requests }); return n }

// Issued returns the credentials with an access key ID. It is an issuer for dysmsapitest.
func (s *Server) Issued(accessKeyID string) (found dysmsapitest.Issued, ok bool) {
	s.set(func() { found, ok = s.issued[accessKeyID] })
	return found, ok
}

// Secrets returns all secrets that were issued, and the access key IDs.
func (s *Server) Secrets() (all []string) {
	s.set(func() {
		for id, i := range s.issued {
			all = append(all, id, i.AccessKeySecret, i.SecurityToken)
		}
		all = append(all, s.sessions...)
		all = append(all, s.token)
	})
	return all
}

// Hang never replies.
func Hang(_ http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) // net/http notices the end of a connection only after the body
	<-r.Context().Done()
}

// HangUp closes the connection without a reply.
func HangUp(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// Body replies with the given status and body.
func Body(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

type credentials struct{ AccessKeyId, AccessKeySecret, SecurityToken, Expiration string } //nolint:revive // Aliyun's names

func (s *Server) issue() credentials {
	n := len(s.issued) + 1
	c := credentials{
		fmt.Sprintf("STS.NTestKey%06d", n), fmt.Sprintf("IssuedSecretNumber%06dXyZ", n), fmt.Sprintf("CAIS/IssuedToken+Number%06d==", n),
		time.Now().Add(s.skew + s.lifetime).UTC().Format(time.RFC3339),
	}
	s.issued[c.AccessKeyId] = dysmsapitest.Issued{
		AccessKeySecret: c.AccessKeySecret, SecurityToken: c.SecurityToken, Expires: time.Now().Add(s.lifetime),
	}
	return c
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json;charset=utf-8")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body)
}

var (
	stsNames = []string{
		"Action", "DurationSeconds", "Format", "OIDCProviderArn", "OIDCToken", "RoleArn", "RoleSessionName", "Timestamp", "Version",
	}
	sessionName = regexp.MustCompile(`^[A-Za-z0-9.@_-]{2,64}$`)
)

// sts is AssumeRoleWithOIDC. The token is in the body, never in the URL, which proxies log.
func (s *Server) sts(w http.ResponseWriter, r *http.Request) {
	fail := func(status int, code string) {
		// Aliyun's texts may quote a request.
		reply(w, status, map[string]string{
			"Code": code, "Message": "quoted: " + r.PostForm.Encode(), "RequestId": "964E0EC5-575B-4FF5-8FD0-D4BD8025602A",
		})
	}
	if err := r.ParseForm(); err != nil {
		fail(400, "InvalidParameter")
		return
	}
	names := []string{}
	for name, values := range r.Form {
		if len(values) != 1 {
			fail(400, "InvalidParameter."+name)
			return
		}
		names = append(names, name)
	}
	slices.Sort(names)
	seconds, err := strconv.Atoi(r.PostForm.Get("DurationSeconds"))
	date, dateErr := time.Parse("2006-01-02T15:04:05Z", r.Form.Get("Timestamp"))
	switch {
	case r.Method != http.MethodPost || r.URL.Path != "/" || r.Header.Get("Authorization") != "":
		fail(400, "UnsupportedHTTPMethod")
	case r.Form.Get("Action") != "AssumeRoleWithOIDC" || r.Form.Get("Version") != "2015-04-01" || r.Form.Get("Format") != "JSON":
		fail(404, "InvalidAction.NotFound")
	case !slices.Equal(names, stsNames) || dateErr != nil || r.URL.Query().Has("OIDCToken"):
		fail(400, "InvalidParameter")
	case time.Now().Add(s.skew).Sub(date).Abs() > 15*time.Minute:
		fail(400, "InvalidTimeStamp.Expired")
	case err != nil || seconds < 900 || seconds > 3600:
		fail(400, "InvalidParameter.DurationSeconds")
	case !sessionName.MatchString(r.PostForm.Get("RoleSessionName")):
		fail(400, "InvalidParameter.RoleSessionName")
	case r.PostForm.Get("OIDCProviderArn") != ProviderARN:
		fail(404, "EntityNotExist.OIDCProvider")
	case r.PostForm.Get("OIDCToken") != s.token:
		fail(400, "AuthenticationFail.OIDCToken.Invalid")
	case r.PostForm.Get("RoleArn") != RoleARN:
		fail(404, "EntityNotExist.Role")
	case s.revoked:
		fail(403, "AuthenticationFail.NoPermission")
	default:
		reply(w, 200, map[string]any{
			"RequestId": "3D57EAD2-8723-1F26-B69C-F8707D8B565D", "Credentials": s.issue(),
			"AssumedRoleUser": map[string]string{"Arn": RoleARN}, "OIDCTokenInfo": map[string]string{"Issuer": "https://oidc.example"},
		})
	}
}

const sessionTTL = "X-aliyun-ecs-metadata-token-ttl-seconds"

// metadata is the metadata service in its hardened mode, which accepts only version 2.
func (s *Server) metadata(w http.ResponseWriter, r *http.Request) {
	ttl, err := strconv.Atoi(r.Header.Get(sessionTTL))
	role, isRole := strings.CutPrefix(r.URL.Path, "/latest/meta-data/ram/security-credentials/")
	switch {
	case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" && err == nil && ttl >= 1 && ttl <= 21600 &&
		r.Header.Get("X-Forwarded-For") == "":
		s.sessions = append(s.sessions, fmt.Sprintf("SessionToken%06d==", len(s.sessions)))
		fmt.Fprint(w, s.sessions[len(s.sessions)-1])
	case r.Method != http.MethodGet || !slices.Contains(s.sessions, r.Header.Get("X-aliyun-ecs-metadata-token")):
		w.WriteHeader(http.StatusForbidden)
	case !isRole || s.revoked || role != url.PathEscape(ECSRole):
		w.WriteHeader(http.StatusNotFound)
	default:
		c := s.issue()
		reply(w, 200, map[string]string{
			"AccessKeyId": c.AccessKeyId, "AccessKeySecret": c.AccessKeySecret, "SecurityToken": c.SecurityToken,
			"Expiration": c.Expiration, "LastUpdated": time.Now().UTC().Format(time.RFC3339), "Code": "Success",
		})
	}
}
