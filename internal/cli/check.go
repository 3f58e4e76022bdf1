package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

type checkCommand struct {
	serveSettings
	JSON bool `name:"json" help:"Print the results as JSON."`
}

const (
	// checkTimeout is for each system. It ends before MySQL's driver has waited twice for a read (5 s).
	checkTimeout    = 8 * time.Second
	maxClockOffset  = 2 * time.Second
	largeAliyunSkew = time.Minute
	maxAliyunSkew   = 15 * time.Minute    // Aliyun's own limit
	expiresSoon     = 14 * 24 * time.Hour // of a certificate
)

// A finding is one line of the result.
type finding struct {
	Name   string `json:"name"`
	Result string `json:"result"` // ok, warning or failed
	Detail string `json:"detail"`
}

type findings []finding

func (f *findings) add(name, result, format string, args ...any) {
	*f = append(*f, finding{name, result, fmt.Sprintf(format, args...)})
}

// fail adds a finding for each line of err.
func (f *findings) fail(name string, err error) {
	for line := range strings.Lines(err.Error()) {
		f.add(name, "failed", "%s", strings.TrimSuffix(line, "\n"))
	}
}

func (f findings) failed() (n int) {
	for _, one := range f {
		if one.Result == "failed" {
			n++
		}
	}
	return n
}

// Run checks everything that serve needs. It sends no SMS, creates no table and changes no row.
func (c *checkCommand) Run(ctx context.Context, errs []error) error {
	deps, err := c.openDependencies()
	var f findings
	if err := errors.Join(append(errs, c.Complete(), telemetry.CheckTracing(), err)...); err != nil {
		f.fail("settings", err)
	} else {
		f.add("settings", "ok", "all are valid")
	}
	if deps.db != nil {
		defer deps.db.Close()
		f.database(ctx, deps.db)
	}
	if deps.aliyun != nil {
		f.aliyun(ctx, deps.aliyun, deps.role, c.serveSettings)
	}
	f.access(c.Access)

	if c.JSON {
		e := json.NewEncoder(os.Stdout)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		e.Encode(map[string]any{"ok": f.failed() == 0, "checks": f})
	} else {
		f.print(os.Stdout)
	}
	if n := f.failed(); n > 0 {
		return fmt.Errorf("%d of %d checks failed", n, len(f))
	}
	return nil
}

func (f findings) print(w io.Writer) {
	for _, one := range f {
		fmt.Fprintf(w, "%-8s %-12s %s\n", one.Result, one.Name, one.Detail)
	}
}

func (f *findings) database(ctx context.Context, db *store.DB) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	d, err := db.Diagnose(ctx)
	switch {
	case ctx.Err() != nil:
		f.add("database", "failed", "DATA_SOURCE_NAME: no answer within %v; check the host, the port and the network between", checkTimeout)
		return
	case err != nil:
		f.fail("database", fmt.Errorf("DATA_SOURCE_NAME: %w", err))
		return
	case d.TableMissing:
		f.add("database", "warning", "the database can be reached; the table phone_numbers is not there yet, serve creates it if its user may CREATE")
	default:
		f.add("database", "ok", "the table can be read and written, and stores what the service needs")
	}
	for _, w := range d.Warnings {
		f.add("database", "warning", "%s", w)
	}
	if d.ClockOffset.Abs() > maxClockOffset {
		f.add("database", "warning", "its clock differs from this machine's by %v; both need NTP", d.ClockOffset)
	}
}

// aliyun checks the credentials with both products. A product is needed only if callers have templates of
// it, and a firewall may let only one pass. So if one product works, each failure of the other is a warning.
// It also checks the lifetime of codes, and the right to query deliveries if the service would.
func (f *findings) aliyun(ctx context.Context, aliyun *sms.Aliyun, source ramrole.Source, settings serveSettings) {
	if source != nil {
		set, err := fetchCredentials(ctx, aliyun, source)
		if err != nil {
			f.fail("credentials", err)
			return
		}
		f.add("credentials", "ok", "%s gives credentials until %s", source.Provider(), set.Expires.Format(time.RFC3339))
	} else if aliyun.Ready() != nil {
		return // a finding of the settings has the reason
	}
	var works bool
	probes := map[sms.Product]sms.Probe{}
	products := []sms.Product{sms.SMS, sms.PNVS}
	for _, p := range products {
		probeCtx, cancel := context.WithTimeout(ctx, checkTimeout)
		probes[p] = aliyun.Probe(probeCtx, p)
		cancel()
		works = works || probes[p].Accepted()
	}
	for _, p := range products {
		probe, name := probes[p], "Aliyun "+strings.ToUpper(string(p))
		template := map[sms.Product]string{sms.SMS: "SMS_123456789", sms.PNVS: "100001"}[p]
		way := map[bool]string{true: "through the proxy", false: "without a proxy"}[probe.Proxied]
		if probe.Accepted() {
			f.add(name, "ok", "can be reached %s, and accepts the credentials; no SMS was asked for", way)
			if ttl := settings.CodeTTL; sms.CheckSend(madeUpNumber, template, ttl) != nil {
				f.add(name, "warning", "PHONENUMBER_CODE_TTL is %v, so each send with a template code such as %s fails; set it to 1m or more", ttl, template)
			}
			if settings.DeliverySample > 0 {
				f.deliveries(ctx, aliyun, p, name)
			}
		} else {
			result := map[bool]string{true: "warning", false: "failed"}[works]
			problem := probeProblem(p, probe)
			if probe.RequestID != "" {
				problem += ", RequestId " + probe.RequestID
			}
			f.add(name, result, "%s, %s", problem, way)
			if works {
				f.add(name, "warning", "each send with a template code such as %s fails; no other send needs this product", template)
			}
		}
		if skew := probe.Skew.Abs(); skew > largeAliyunSkew {
			result := map[bool]string{true: "failed", false: "warning"}[skew > maxAliyunSkew]
			f.add(name, result, "its clock differs from this machine's by %v; this machine needs NTP", probe.Skew)
		}
	}
}

const madeUpNumber = "+8613000000000"

// deliveries checks the right to query deliveries, with a query for a made-up number.
func (f *findings) deliveries(ctx context.Context, aliyun *sms.Aliyun, p sms.Product, name string) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if _, err := aliyun.Deliveries(ctx, p, madeUpNumber, time.Now(), ""); err != nil {
		f.add(name, "warning", "does not say if an SMS arrived (PHONENUMBER_DELIVERY_SAMPLE): %s", reasonOf(p, err))
	}
}

// fetchCredentials fetches the credentials of a role and passes them to aliyun. It does not renew them:
// the command ends before they expire.
func fetchCredentials(ctx context.Context, aliyun *sms.Aliyun, source ramrole.Source) (ramrole.Set, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	set, err := source.Fetch(ctx)
	if err == nil {
		err = aliyun.ReplaceCredentials(set.Credentials)
	}
	return set, err
}

// probeProblem returns the cause of a failed probe, and its remedy.
func probeProblem(p sms.Product, probe sms.Probe) string {
	if probe.Failure != "" {
		return probe.Failure
	}
	action := map[sms.Product]string{sms.SMS: "dysms:SendSms", sms.PNVS: "dypns:SendSmsVerifyCode"}[p]
	for _, known := range []struct{ codes, problem string }{
		{"SignatureDoesNotMatch IncompleteSignature", "the access key secret is wrong"},
		{"InvalidAccessKeyId MissingAccessKeyId", "the access key ID does not exist, or is disabled"},
		{"InvalidSecurityToken MissingSecurityToken", "the security token is wrong or has expired"},
		{"InvalidTimeStamp", "this machine's clock is wrong; it needs NTP"},
		{"Forbidden NoPermission isp.RAM_PERMISSION_DENY", "the RAM user or role may not call it: allow the action " + action},
		{"FUNCTION_NOT_OPENED FunctionNotSubscribed isv.PRODUCT_UN isv.OUT_OF_SERVICE", "the product is not opened for this account: open it in the console"},
		{"InvalidAction", "the endpoint is that of another product"},
		{"isv.DENY_IP_RANGE", "Aliyun does not accept the address of this machine"},
	} {
		for code := range strings.FieldsSeq(known.codes) {
			if strings.HasPrefix(probe.Code, code) {
				return known.problem + " (" + probe.Code + ")"
			}
		}
	}
	return "rejected with " + probe.Code
}

func (f *findings) access(settings config.Access) {
	a, err := newAccess(settings)
	if err != nil {
		f.fail("access", err)
		return
	}
	if a.tls != nil {
		expires := a.tls.Expires()
		left, result := time.Until(expires), "ok"
		switch {
		case left <= 0:
			result = "failed"
		case left < expiresSoon:
			result = "warning"
		}
		f.add("certificate", result, "%s ends %s", settings.TLSCert, expires.Format(time.RFC3339))
	}
	_, callers, warnings := a.startupSummary()
	if a.registry != nil {
		f.add("callers", "ok", "%s names %d callers", settings.Callers, len(a.registry.Names()))
	} else if callers == "certificate" {
		f.add("callers", "ok", "clients need a certificate of %s", cmp.Or(settings.TLSClientCA, "a CA"))
	}
	for _, w := range warnings {
		f.add("access", "warning", "%s", w)
	}
}
