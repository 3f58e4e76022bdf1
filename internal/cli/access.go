package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/connmux"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/reload"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// access has the certificates and the callers, with the files that they come from.
type access struct {
	config.Access
	tls         *connmux.Certificates // nil for plaintext
	tlsFiles    reload.Files
	registry    *auth.Registry // nil without a callers file
	callersFile reload.Files
}

// newAccess reads the files that settings name.
func newAccess(settings config.Access) (access, error) {
	a := access{Access: settings}
	var tlsErr, callersErr error
	if a.TLSCert != "" && a.TLSKey != "" {
		a.tls = &connmux.Certificates{}
		if a.tlsFiles, tlsErr = a.ReadTLS(); tlsErr == nil {
			tlsErr = a.replaceCertificates(a.tlsFiles)
		}
	}
	if a.Callers != "" {
		a.registry = &auth.Registry{}
		if a.callersFile, callersErr = a.ReadCallers(); callersErr == nil {
			_, callersErr = a.replaceCallers(a.callersFile)
		}
	}
	return a, errors.Join(tlsErr, callersErr)
}

// watchFiles starts goroutines that reload the certificates and the callers file when they change, until
// ctx is done.
func (a access) watchFiles(ctx context.Context, metrics *telemetry.Metrics, log *slog.Logger, lastReload *prometheus.GaugeVec) {
	if a.tls != nil {
		go reload.Watcher{Kind: "certificates", Read: a.ReadTLS, Apply: func(_ context.Context, before, now reload.Files) error {
			if err := a.replaceCertificates(now); err != nil {
				return err
			}
			const begin = "-----BEGIN CERTIFICATE-----"
			for _, name := range slices.Sorted(maps.Keys(now)) {
				if had, has := strings.Count(before[name], begin), strings.Count(now[name], begin); has < had {
					log.Warn("reloaded a file with fewer certificates", "file", name, "before", had, "now", has)
				}
			}
			return nil
		}}.Run(ctx, log, lastReload, a.tlsFiles)
	}
	if a.registry != nil {
		go reload.Watcher{Kind: "callers", Read: a.ReadCallers, Apply: func(_ context.Context, before, now reload.Files) error {
			if auth.Whole(before[a.Callers]) && !auth.Whole(now[a.Callers]) {
				return fmt.Errorf("%s: must end with a line ..., as the version in use does: it may be cut off", a.Callers)
			}
			changes, err := a.replaceCallers(now)
			if err != nil {
				return err
			}
			if changes.Removed != nil || changes.Added != nil || changes.Widened != nil {
				log.Warn("reloaded callers with other permissions", "removed", strings.Join(changes.Removed, ", "),
					"added", strings.Join(changes.Added, ", "), "may_do_more", strings.Join(changes.Widened, ", "))
			}
			metrics.KeepCallers(a.registry.Names())
			return nil
		}}.Run(ctx, log, lastReload, a.callersFile)
	}
}

// replaceCertificates replaces the certificates by those in files. After an error, the previous
// certificates stay in use.
func (a access) replaceCertificates(files reload.Files) error {
	file := func(name string) connmux.File { return connmux.File{Name: name, Content: files[name]} }
	return a.tls.Replace(connmux.CertificateFiles{Certificate: file(a.TLSCert), Key: file(a.TLSKey), ClientCA: file(a.TLSClientCA)})
}

// replaceCallers replaces the callers by those in files. After an error, the previous callers stay in use.
func (a access) replaceCallers(files reload.Files) (auth.Changes, error) {
	known := auth.ParseOptions{Countries: numberplan.Countries(), Certificates: a.TLSClientCA != ""}
	for _, method := range pb.PhoneNumberService_ServiceDesc.Methods {
		known.Calls = append(known.Calls, method.MethodName)
	}
	list, err := auth.Parse(a.Callers, []byte(files[a.Callers]), known)
	if err != nil {
		return auth.Changes{}, err
	}
	return a.registry.Replace(list), nil
}

// authenticator returns the authentication function, or nil for no authentication.
func (a access) authenticator() func([]string, *x509.Certificate) (*auth.Caller, error) {
	switch {
	case a.registry != nil:
		return a.registry.Authenticate
	case a.TLSClientCA != "":
		return auth.AnyCertificate
	}
	return nil
}

// startupSummary describes TLS and authentication for the log. It returns a warning for each of the two
// that is off, because the service then relies on a trusted network.
func (a access) startupSummary() (tls, callers string, warnings []string) {
	tls, callers = "on", "file"
	if a.tls == nil {
		tls = "off"
		warnings = append(warnings, "TLS is off: codes and tokens can be read on the network; set PHONENUMBER_TLS_CERT")
	}
	switch {
	case a.registry != nil:
	case a.authenticator() != nil:
		callers = "certificate"
	default:
		callers = "unauthenticated"
		warnings = append(warnings, "callers are not authenticated: anyone who reaches the port can send at your cost and use up attempts; set PHONENUMBER_CALLERS")
	}
	return tls, callers, warnings
}
