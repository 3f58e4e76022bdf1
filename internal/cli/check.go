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
	checkTimeout   = 10 * time.Second // for each system
	maxClockOffset = 2 * time.Second
	maxAliyunSkew  = 15 * time.Minute // Aliyun's own limit
	endsSoon       = 14 * 24 * time.Hour
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

// Run checks everything that serve needs. It sends no SMS, and creates and changes nothing.
func (c *checkCommand) Run(ctx context.Context, errs []error) error {
	up, err := c.setUp()
	var f findings
	if err := errors.Join(append(errs, c.Complete(), telemetry.CheckTracing(), err)...); err != nil {
		f.fail("settings", err)
	} else {
		f.add("settings", "ok", "all are valid")
	}
	if up.db != nil {
		defer up.db.Close()
		f.database(ctx, up.db)
	}
	if up.aliyun != nil {
		f.aliyun(ctx, up.aliyun, up.role, c.DeliverySample > 0)
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
	f.clock("database", d.ClockOffset, maxClockOffset, "warning")
}

// clock adds a finding if another clock differs from this machine's by more than limit.
func (f *findings) clock(name string, ahead, limit time.Duration, result string) {
	if ahead.Abs() > limit {
		f.add(name, result, "its clock differs from this machine's by %v; both need NTP", ahead)
	}
}

// aliyun checks the credentials with both products. A product is needed only if callers have templates
// of it, so the failure of one is a warning if the other works. It checks the right to ask for deliveries
// if the service would ask.
func (f *findings) aliyun(ctx context.Context, aliyun *sms.Aliyun, source ramrole.Source, asksDeliveries bool) {
	if source != nil {
		set, err := fetchCredentials(ctx, aliyun, source)
		if err != nil {
			f.fail("credentials", err)
			return
		}
		f.add("credentials", "ok", "%s gives credentials until %s", source.Provider(), set.Expires.Format(time.RFC3339))
	} else if aliyun.Ready() != nil {
		return // a finding of the settings says why
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
		way := map[bool]string{true: "through the proxy", false: "without a proxy"}[probe.Proxied]
		if probe.Accepted() {
			f.add(name, "ok", "can be reached %s, and accepts the credentials; no SMS was asked for", way)
			if asksDeliveries {
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
				template := map[sms.Product]string{sms.SMS: "SMS_123456789", sms.PNVS: "100001"}[p]
				f.add(name, "warning", "needed only for template codes such as %s", template)
			}
		}
		f.clock(name, probe.Skew, maxAliyunSkew, "failed")
	}
}

// deliveries asks for the SMS to a made-up number.
func (f *findings) deliveries(ctx context.Context, aliyun *sms.Aliyun, p sms.Product, name string) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if _, err := aliyun.Deliveries(ctx, p, "+8613000000000", time.Now(), ""); err != nil {
		f.add(name, "warning", "does not say if an SMS arrived (PHONENUMBER_DELIVERY_SAMPLE): %s", reasonOf(p, err))
	}
}

// fetchCredentials gives aliyun the credentials of a role, for a command that ends before they do.
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
		return "no reply: " + probe.Failure
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
		case left < endsSoon:
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
