package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/idna"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// accessSettings are the settings for TLS, authentication and web pages.
type accessSettings struct {
	TLSCert     string `env:"PHONENUMBER_TLS_CERT" name:"tls-cert" placeholder:"FILE" help:"Certificate chain in PEM. If it is set, the port uses TLS."`
	TLSKey      string `env:"PHONENUMBER_TLS_KEY" name:"tls-key" placeholder:"FILE" help:"Private key of the certificate, in PEM."`
	TLSClientCA string `env:"PHONENUMBER_TLS_CLIENT_CA" name:"tls-client-ca" placeholder:"FILE" help:"CAs in PEM. Callers must have a certificate of one of them."`
	Callers     string `env:"PHONENUMBER_CALLERS" placeholder:"FILE" help:"YAML file with the callers and their permissions (docs/security.md)."`
	CORSOrigins string `env:"PHONENUMBER_CORS_ORIGINS" name:"cors-origins" placeholder:"ORIGINS" help:"Origins of web pages that may call, separated by commas, such as https://app.example.org (serve: none, dev: any)."`
	Reflection  string `env:"PHONENUMBER_REFLECTION" default:"on" placeholder:"ON" help:"gRPC reflection, on or off (${default})."`
}

// accessConfig is the parsed form of accessSettings.
type accessConfig struct {
	settings   accessSettings
	tls        *server.Certificates // nil for plaintext
	tlsFiles   tlsFiles
	set        *auth.Registry // nil without a callers file
	file       callersFile
	origins    []string
	reflects   bool
	lastReload *prometheus.GaugeVec
}

func (s accessSettings) parse(f *configErrors, origins string) accessConfig {
	a := accessConfig{settings: s, lastReload: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "phonenumber_config_last_reload_successful", Help: "1 if the last reload of the files succeeded, 0 while the service keeps a previous version.",
	}, []string{"files"})}
	for _, kind := range []string{"callers", "certificates", "secrets"} {
		a.lastReload.WithLabelValues(kind).Set(1) // also without files
	}
	if (s.TLSCert == "") != (s.TLSKey == "") {
		f.add("--tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY) must be set both, or none")
	} else if s.TLSClientCA != "" && s.TLSCert == "" {
		f.add("--tls-client-ca (PHONENUMBER_TLS_CLIENT_CA) needs --tls-cert (PHONENUMBER_TLS_CERT) and --tls-key (PHONENUMBER_TLS_KEY)")
	} else if s.TLSCert != "" {
		a.tls = &server.Certificates{}
		f.read(func(f *configErrors) error {
			a.tlsFiles = s.readTLS(f)
			return a.tls.Replace(server.CertificateFiles(a.tlsFiles))
		})
	}
	if s.Callers != "" {
		a.set = &auth.Registry{}
		f.read(func(f *configErrors) error {
			a.file = s.readCallers(f)
			_, err := s.applyCallers(a.set, a.file)
			return err
		})
	}
	a.origins = strings.FieldsFunc(cmp.Or(s.CORSOrigins, origins), func(r rune) bool { return r == ',' || r == ' ' })
	if s.CORSOrigins != "" && len(a.origins) == 0 {
		f.add("--cors-origins (PHONENUMBER_CORS_ORIGINS) holds no origin; leave it unset for none")
	}
	for i, o := range a.origins {
		if s.CORSOrigins == "" {
			break // dev's default is "*"
		}
		var ok bool
		if a.origins[i], ok = browserOrigin(o); !ok { // not quoted: it could contain a password
			f.add("--cors-origins (PHONENUMBER_CORS_ORIGINS): origin %d cannot match a web page; it must be such as https://app.example.org, http://localhost:3000 or http://[::1]:3000: "+
				"http or https, a host name or an IP address in full, a port from 1 to 65535 if it is not the scheme's own; no user, path, %% or *", i+1)
		}
	}
	switch s.Reflection {
	case "on", "off":
		a.reflects = s.Reflection == "on"
	default:
		f.add("--reflection (PHONENUMBER_REFLECTION) is %q; it must be on or off", s.Reflection)
	}
	return a
}

var (
	// hostNames maps names as browsers do: UTS 46, without transitional processing.
	hostNames = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.StrictDomainName(false), idna.CheckHyphens(false))
	hostName  = regexp.MustCompile(`^([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?$`)
	// numericEnd matches names that browsers parse as an IPv4 address.
	numericEnd = regexp.MustCompile(`(^|\.)([0-9]+|0x[0-9a-f]*)\.?$`)
)

// browserOrigin returns an origin in the form of the header Origin, and false if no page can
// have this origin. In another form, it would never match.
func browserOrigin(given string) (string, bool) {
	scheme, authority, _ := strings.Cut(given, "://")
	scheme = strings.ToLower(scheme)
	defaultPort, known := map[string]string{"http": "80", "https": "443"}[scheme]
	u, err := url.Parse("//" + authority)
	if !known || err != nil || strings.ContainsAny(authority, `/\?#@%*`) {
		return "", false
	}
	host, port := u.Hostname(), u.Port()
	if strings.HasPrefix(authority, "[") {
		addr, err := netip.ParseAddr(host)
		if err != nil || addr.Is4In6() { // netip has another form for it
			return "", false
		}
		host = "[" + addr.String() + "]"
	} else {
		if host, err = hostNames.ToASCII(host); err != nil || !hostName.MatchString(host) {
			return "", false
		}
		if addr, err := netip.ParseAddr(host); numericEnd.MatchString(host) && (err != nil || addr.String() != host) {
			return "", false
		}
	}
	if port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return "", false
		}
		port = strconv.FormatUint(n, 10)
	}
	if port == "" || port == defaultPort {
		return scheme + "://" + host, true
	}
	return scheme + "://" + host + ":" + port, true
}

// watchFiles reloads the certificates and the callers file when they change, until ctx is done.
func (a accessConfig) watchFiles(ctx context.Context, metrics *telemetry.Metrics, log *slog.Logger) {
	if a.tls != nil {
		go watchFiles(ctx, log, a.lastReload, a.tlsFiles, watchedFiles[tlsFiles]{kind: "certificates", read: a.settings.readTLS, apply: func(before, now tlsFiles) error {
			if err := a.tls.Replace(server.CertificateFiles(now)); err != nil {
				return err
			}
			for _, pair := range now.pairs(before) {
				if had, has := strings.Count(pair[0].Content, certificateBegin), strings.Count(pair[1].Content, certificateBegin); has < had {
					log.Warn("reloaded a file with fewer certificates", "file", pair[1].Name, "before", had, "now", has)
				}
			}
			return nil
		}})
	}
	if a.set != nil {
		go watchFiles(ctx, log, a.lastReload, a.file, watchedFiles[callersFile]{kind: "callers", read: a.settings.readCallers, apply: func(before, now callersFile) error {
			if auth.Whole(before.Content) && !auth.Whole(now.Content) {
				return fmt.Errorf("%s: must end with a line ..., as the version in use does: it may be cut off", now.Name)
			}
			changes, err := a.settings.applyCallers(a.set, now)
			if err != nil {
				return err
			}
			if changes.Removed != nil || changes.Added != nil || changes.Widened != nil {
				log.Warn("reloaded callers with other permissions", "removed", strings.Join(changes.Removed, ", "),
					"added", strings.Join(changes.Added, ", "), "may_do_more", strings.Join(changes.Widened, ", "))
			}
			metrics.KeepCallers(a.set.Names())
			return nil
		}})
	}
}

// certificateBegin is the first line of each certificate in a PEM file.
const certificateBegin = "-----BEGIN CERTIFICATE-----"

// tlsFiles are the files of the port's certificates.
type tlsFiles server.CertificateFiles

// pairs returns each file after its previous version.
func (t tlsFiles) pairs(before tlsFiles) [][2]server.File {
	return [][2]server.File{{before.Certificate, t.Certificate}, {before.Key, t.Key}, {before.ClientCA, t.ClientCA}}
}

// changed returns the names of the files that differ from before.
func (t tlsFiles) changed(before tlsFiles) (names []string) {
	for _, pair := range t.pairs(before) {
		if pair[0] != pair[1] {
			names = append(names, pair[1].Name)
		}
	}
	return names
}

func (s accessSettings) readTLS(f *configErrors) tlsFiles {
	return tlsFiles{
		Certificate: readFile(f, "--tls-cert (PHONENUMBER_TLS_CERT)", s.TLSCert),
		Key:         readFile(f, "--tls-key (PHONENUMBER_TLS_KEY)", s.TLSKey),
		ClientCA:    readFile(f, "--tls-client-ca (PHONENUMBER_TLS_CLIENT_CA)", s.TLSClientCA),
	}
}

// callersFile is the callers file.
type callersFile server.File

func (c callersFile) changed(callersFile) []string { return []string{c.Name} }

func (s accessSettings) readCallers(f *configErrors) callersFile {
	return callersFile(readFile(f, "--callers (PHONENUMBER_CALLERS)", s.Callers))
}

// applyCallers replaces the callers in set by those of a file. After an error, set is unchanged.
func (s accessSettings) applyCallers(set *auth.Registry, c callersFile) (auth.Changes, error) {
	known := auth.ParseOptions{Countries: numberplan.Countries(), Certificates: s.TLSClientCA != ""}
	for _, method := range pb.PhoneNumberService_ServiceDesc.Methods {
		known.Calls = append(known.Calls, method.MethodName)
	}
	list, err := auth.Parse(c.Name, []byte(c.Content), known)
	if err != nil {
		return auth.Changes{}, err
	}
	return set.Replace(list), nil
}

// readFile reads the file that a setting names. It returns the zero File if name is "".
func readFile(f *configErrors, setting, name string) server.File {
	if name == "" {
		return server.File{}
	}
	content, err := os.ReadFile(name)
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		if strings.Contains(name, "-----BEGIN") { // probably the key itself
			name = "what it holds is no file's name"
		}
		f.add("%s: %s: %v", setting, name, pathError.Err)
	}
	return server.File{Name: name, Content: string(content)}
}

// authenticator returns the authentication function, or nil for no authentication.
func (a accessConfig) authenticator() func([]string, *x509.Certificate) (*auth.Caller, error) {
	switch {
	case a.set != nil:
		return a.set.Authenticate
	case a.tls != nil && a.tls.AsksClients():
		return auth.AnyCertificate
	}
	return nil
}

// startupSummary describes TLS and authentication for the log, with a warning for each of the
// two that is missing: then the network must be trusted.
func (a accessConfig) startupSummary() (tls, callers string, warnings []string) {
	tls, callers = "on", "file"
	if a.tls == nil {
		tls = "off"
		warnings = append(warnings, "TLS is off: codes and tokens can be read on the network; set PHONENUMBER_TLS_CERT")
	}
	switch {
	case a.set != nil:
	case a.authenticator() != nil:
		callers = "certificate"
	default:
		callers = "unauthenticated"
		warnings = append(warnings, "callers are not authenticated: anyone who reaches the port can send at your cost and use up attempts; set PHONENUMBER_CALLERS")
	}
	return tls, callers, warnings
}
