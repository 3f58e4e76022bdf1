// Package monitortest tests the dashboard and the alerts of deploy/ with promtool, with a real
// Prometheus, and with the metrics of the running program.
package monitortest

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	_ "github.com/liulinhuai/phone-number-service/internal/cli" // go test repeats these tests after a change
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole/ststest"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const (
	dashboardFile = "../../deploy/grafana/dashboard.json"
	alertsFile    = "../../deploy/prometheus/alerts.yaml"
	alertTests    = "../../deploy/prometheus/alerts_test.yaml"
	runbookFile   = "../../docs/runbook.md"
	runbookURL    = "https://github.com/liulinhuai/phone-number-service/blob/main/docs/runbook.md"
	timeout       = time.Minute
)

func TestMain(m *testing.M) { os.Exit(mysqltest.Run(m)) }

// findProgram returns the path of a program in Debian's package prometheus. Without it the test is
// skipped; under CI it fails.
func findProgram(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if path, err = filepath.Abs("../../.bin/prometheus/usr/bin/" + name); err == nil { // installed by make
		if _, err = os.Stat(path); err == nil {
			return path
		}
	}
	reason := "no " + name + ": apt-get install prometheus, or make test"
	if os.Getenv("CI") != "" {
		t.Fatal(reason)
	}
	fmt.Fprintln(os.Stderr, "skipped", t.Name()+":", reason)
	t.Skip(reason)
	return ""
}

// The rule tests of alerts_test.yaml pass. For each alert they have a case in which it fires and
// one in which it stays silent.
func TestAlerts_FireAndStaySilentAsTested(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", alertsFile}, {"test", "rules", alertTests}} {
		if out, err := exec.Command(findProgram(t, "promtool"), args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
	for _, a := range alertNames(t) {
		if !regexp.MustCompile(`- alertname: ` + a + `\b[^\n]*\n\s*eval_time: .*\n\s*exp_alerts:`).MatchString(testutil.ReadFile(t, alertTests)) {
			t.Errorf("%s: alerts_test.yaml lacks a case in which it fires", a)
		}
		if !strings.Contains(testutil.ReadFile(t, alertTests), "- {alertname: "+a+", eval_time:") {
			t.Errorf("%s: alerts_test.yaml lacks a case in which it stays silent", a)
		}
	}
}

func alertNames(t *testing.T) (names []string) {
	t.Helper()
	for _, m := range regexp.MustCompile(`(?m)^ *- alert: (\w+)$`).FindAllStringSubmatch(testutil.ReadFile(t, alertsFile), -1) {
		names = append(names, m[1])
	}
	if names = slices.Compact(names); len(names) < 10 {
		t.Fatalf("alerts: got %d; want at least 10", len(names))
	}
	return names
}

func TestRunbook_HasExactlyTheAlerts(t *testing.T) {
	var headings []string
	for _, m := range regexp.MustCompile(`(?m)^### (\w+)$`).FindAllStringSubmatch(testutil.ReadFile(t, runbookFile), -1) {
		headings = append(headings, m[1])
	}
	names := alertNames(t)
	if slices.Sort(headings); !slices.Equal(headings, slices.Sorted(slices.Values(names))) {
		t.Errorf("alert headings in the runbook: got %v; want %v", headings, names)
	}
}

type dashboard struct {
	SchemaVersion int
	Panels        []struct {
		ID                       int
		Type, Title, Description string
		Datasource               struct{ UID string }
		GridPos                  struct{ X, Y, W, H int }
		FieldConfig              struct{ Defaults struct{ Unit string } }
		Targets                  []struct{ Expr, LegendFormat string }
	}
	Templating struct {
		List []struct{ Name, Definition string }
	}
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(testutil.ReadFile(t, dashboardFile)), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDashboard_IsWellFormed(t *testing.T) {
	var anything any
	text := testutil.ReadFile(t, dashboardFile)
	if err := json.Unmarshal([]byte(text), &anything); err != nil {
		t.Fatal(err)
	}
	var sorted bytes.Buffer
	e := json.NewEncoder(&sorted)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if e.Encode(anything); sorted.String() != text {
		t.Error("dashboard.json: want sorted keys and an indent of two spaces")
	}
	d := readDashboard(t)
	ids, occupied, panels := map[int]bool{}, map[[2]int]string{}, 0
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("%s: got the id %d twice; want it once", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := occupied[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%s: got a position over %q or outside; want a free one in 24 columns", p.Title, other)
				}
				occupied[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if panels++; p.Type != "timeseries" && p.Type != "stat" || p.Datasource.UID != "${datasource}" || p.FieldConfig.Defaults.Unit == "" ||
			len(p.Targets) == 0 {
			t.Errorf("%s: got type %q, data source %q, unit %q, %d queries; want timeseries or stat, ${datasource}, a unit, a query", p.Title, p.Type, p.Datasource.UID, p.FieldConfig.Defaults.Unit, len(p.Targets))
		}
		if strings.Count(p.Description, ".")-strings.Count(p.Description, "PHONENUMBER_SMS_TIMEOUT.") < 1 ||
			!strings.HasSuffix(p.Description, ".") {
			t.Errorf("%s: description: got %q; want a sentence", p.Title, p.Description)
		}
	}
	if panels == 0 || panels > 25 || d.SchemaVersion < 39 {
		t.Errorf("got %d panels of schema %d; want 1 to 25 of schema 39 or later", panels, d.SchemaVersion)
	}
}

// An alert with a misspelled label value fires in its rule test, but never in production.
func TestQueries_LabelValuesExistInTheProgram(t *testing.T) {
	known := map[string][]string{
		"result": {"accepted", "ok", "conflict", "error", "unknown", "new", "replayed"}, "method": {"SendSMS", "Valid"},
	}
	for k := range verify.SendBadRequest + 1 {
		known["result"] = append(known["result"], k.String())
	}
	for o := range verify.OtherContext + 1 {
		known["outcome"] = append(known["outcome"], o.String())
	}
	for s := sms.Waiting; s <= sms.Delivered; s++ {
		known["outcome"] = append(known["outcome"], s.String())
	}
	known["outcome"] = append(known["outcome"], telemetry.UnknownDelivery)
	for c := range codes.Unauthenticated + 1 {
		known["status"] = append(known["status"], c.String())
	}
	found := 0
	for _, m := range regexp.MustCompile(`\b(result|outcome|status|method)[!=]=?~?\\?"([^"\\]*)`).FindAllStringSubmatch(testutil.ReadFile(t, alertsFile)+testutil.ReadFile(t, dashboardFile), -1) {
		for _, value := range strings.Split(m[2], "|") {
			if found++; !slices.Contains(known[m[1]], value) {
				t.Errorf("label %s: got the value %q; want one of %v", m[1], value, known[m[1]])
			}
		}
	}
	if found < 10 {
		t.Errorf("label values: got %d; want at least 10", found)
	}
}

func TestQueries_FindTheProgramsMetrics(t *testing.T) {
	program := findProgram(t, "prometheus")
	targets := startServices(t)
	p := startPrometheus(t, program, targets...)
	t.Run("dashboard", func(t *testing.T) {
		d := readDashboard(t)
		queries := 0
		for _, panel := range d.Panels {
			for _, target := range panel.Targets {
				queries++
				// The test has no values of a day ago.
				q := strings.NewReplacer("$__rate_interval", "15s", `"$instance"`, `".*"`, `"$country"`, `".*"`, " offset 24h", "").Replace(target.Expr)
				series := p.mustFind(t, panel.Title, q)
				for _, label := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(target.LegendFormat, -1) {
					if len(series) > 0 && series[0].Metric[label[1]] == "" {
						t.Errorf("%s: got no label %s in the result of %s; want it for the legend", panel.Title, label[0], q)
					}
				}
			}
		}
		if queries < 20 {
			t.Errorf("queries: got %d; want at least 20", queries)
		}
		for _, v := range d.Templating.List {
			if m := regexp.MustCompile(`^label_values\((\w+), (\w+)\)$`).FindStringSubmatch(v.Definition); m != nil {
				p.mustFind(t, "the variable "+v.Name, m[1]+"{"+m[2]+`!=""}`)
			}
		}
	})
	t.Run("alerts", func(t *testing.T) {
		rules := p.rules(t)
		for _, r := range rules {
			if r.Health != "ok" {
				t.Errorf("%s: got the health %s, %s; want ok", r.Name, r.Health, r.LastError)
			}
			if r.Type == "alerting" {
				if want := runbookURL + "#" + strings.ToLower(r.Name); r.Annotations["runbook_url"] != want {
					t.Errorf("%s: got the runbook %q; want %q", r.Name, r.Annotations["runbook_url"], want)
				}
				if s := r.Labels["severity"]; s != "page" && s != "ticket" || r.Annotations["summary"] == "" ||
					!strings.HasSuffix(r.Annotations["description"], ".") {
					t.Errorf("%s: got severity %q, annotations %v; want page or ticket, a summary, a sentence", r.Name, s, r.Annotations)
				}
			}
			selectors := selectorsOf(r.Query)
			if len(selectors) == 0 {
				t.Errorf("%s: metrics in %s: got none; want at least one", r.Name, r.Query)
			}
			for _, s := range selectors {
				p.mustFind(t, r.Name, s)
			}
		}
		if len(rules) < 20 {
			t.Errorf("rules: got %d; want at least 20", len(rules))
		}
	})
	// After the others: by now every metric has a value.
	t.Run("names", func(t *testing.T) {
		check := exec.Command(findProgram(t, "promtool"), "check", "metrics")
		check.Stdin = strings.NewReader(testutil.Get(t, targets[0], "/metrics", 200))
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("promtool check metrics: got %v and\n%s\nwant no finding", err, out)
		}
	})
}

var (
	quotes    = regexp.MustCompile(`"[^"]*"`)
	grouping  = regexp.MustCompile(`\b(by|on|without|ignoring) *\([^)]*\)`)
	selector  = regexp.MustCompile(`\b([a-zA-Z_][\w:]*)( *\(|{[^}]*}|)`)
	labelName = regexp.MustCompile(`(\w+) *[!=]`)
	keywords  = []string{"and", "or", "unless", "offset", "group_left", "group_right", "bool", "by", "on", "ALERTS"}
)

// selectorsOf returns a selector for each metric of a query: the metric with the labels that the
// query selects, each with any value. It leaves out metrics that Prometheus itself creates.
func selectorsOf(query string) (all []string) {
	query = grouping.ReplaceAllString(quotes.ReplaceAllString(query, `""`), " ")
	query = regexp.MustCompile(`\[[^\]]*\]`).ReplaceAllString(query, "")
	for _, m := range selector.FindAllStringSubmatch(query, -1) {
		if slices.Contains(keywords, m[1]) || strings.HasSuffix(m[2], "(") {
			continue
		}
		var labels []string
		for _, l := range labelName.FindAllStringSubmatch(m[2], -1) {
			labels = append(labels, l[1]+`!=""`)
		}
		all = append(all, m[1]+"{"+strings.Join(labels, ", ")+"}")
	}
	return all
}

// startServices starts two replicas on one database and makes calls of every kind until the test
// ends. It returns the addresses of their metrics.
func startServices(t *testing.T) (metrics []string) {
	t.Helper()
	dsn, fake := mysqltest.DSN(t), dysmsapitest.New(t)
	gateway := httptest.NewTLSServer(fake)
	t.Cleanup(gateway.Close)
	trusted := filepath.Join(t.TempDir(), "gateway.pem")
	if err := os.WriteFile(trusted, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: gateway.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	program, err := servicetest.Build("../..")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(program)) })
	sts, token := ststest.New(t), filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(ststest.FirstToken), 0o600); err != nil {
		t.Fatal(err)
	}
	fake.SetIssuer(func(id string) (dysmsapitest.Issued, bool) {
		if id == fake.AccessKeyID {
			return dysmsapitest.Issued{AccessKeySecret: fake.AccessKeySecret}, true
		}
		return sts.Issued(id)
	})
	// One replica has an access key, the other one a role.
	credentials := [][]string{nil, {
		"ALIYUN_ACCESS_KEY_ID=", "ALIYUN_ACCESS_KEY_SECRET=", "ALIYUN_STS_ENDPOINT=" + sts.STSURL, "ALIBABA_CLOUD_ROLE_ARN=" + ststest.RoleARN,
		"ALIBABA_CLOUD_OIDC_PROVIDER_ARN=" + ststest.ProviderARN, "ALIBABA_CLOUD_OIDC_TOKEN_FILE=" + token,
	}}
	var replicas []*servicetest.Process
	for i := range 2 {
		address := servicetest.FreeAddress(t)
		metrics = append(metrics, address)
		env := append(servicetest.Environment(fake, dsn), "ALIYUN_ENDPOINT="+gateway.URL, "SSL_CERT_FILE="+trusted,
			"PHONENUMBER_METRICS_LISTEN="+address, "PHONENUMBER_DELIVERY_SAMPLE=1",
			"PHONENUMBER_CODE_KEY="+base64.StdEncoding.EncodeToString(make([]byte, 32)))
		env = append(env, credentials[i]...)
		replicas = append(replicas, servicetest.Start(t, program, servicetest.FreeAddress(t), env).Serving(t))
	}
	var mu sync.Mutex
	sent := map[string]string{} // code by Aliyun's form of the number
	fake.OnAccepted(func(m dysmsapitest.Accepted) {
		mu.Lock()
		defer mu.Unlock()
		sent[m.PhoneNumber] = m.Code
	})
	fake.SetReceipts(func(m dysmsapitest.Accepted) dysmsapitest.Receipt {
		if strings.HasPrefix(m.PhoneNumber, "65") {
			return dysmsapitest.Receipt{Code: "NO_ROUTE"}
		}
		return dysmsapitest.Receipt{}
	})
	ctx := t.Context()
	sendBy := func(p *servicetest.Process, number, signature, template string) {
		p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: number, Signature: signature, TemplateCode: template})
	}
	send := func(p *servicetest.Process, number, signature string) { sendBy(p, number, signature, "SMS_1") }
	valid := func(p *servicetest.Process, number, code string) {
		p.Valid(ctx, &pb.ValidRequest{PhoneNumber: number, Code: code})
	}
	var calling sync.WaitGroup
	t.Cleanup(calling.Wait) // t.Context ends before
	calling.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			number := func(prefix, digits int) string { return strconv.Itoa(prefix) + fmt.Sprintf("%0*d", digits, i) }
			// Both replicas at once, so that one has a conflict.
			var both sync.WaitGroup
			for _, p := range replicas {
				both.Go(func() { send(p, number(186, 8), "Acme") })
			}
			both.Wait()
			mu.Lock()
			code := sent[number(186, 8)]
			mu.Unlock()
			valid(replicas[0], number(186, 8), "wrong")
			valid(replicas[1], number(186, 8), code)
			send(replicas[0], "+659"+number(1, 6), "Acme") // abroad; no check matches, until the attempts are used up
			for range 4 {
				valid(replicas[1], "+659"+number(1, 6), "wrong")
			}
			valid(replicas[0], number(187, 8), "never sent")
			login := metadata.AppendToOutgoingContext(ctx, "verification-context", "login", "idempotency-key", "of-this-number")
			for range 2 {
				replicas[0].SendSMS(login, &pb.SendSMSRequest{PhoneNumber: number(187, 8), Signature: "Acme", TemplateCode: "SMS_1"})
			}
			valid(replicas[0], number(187, 8), "sent in another context")
			sendBy(replicas[1], number(189, 8), "Acme", "100001")
			for code, fault := range map[string]dysmsapitest.Fault{
				"limit":   dysmsapitest.Reply(200, "isv.BUSINESS_LIMIT_CONTROL", "触发分钟级流控Permits:1"),
				"balance": dysmsapitest.Reply(200, "isv.AMOUNT_NOT_ENOUGH", "账户余额不足"),
				"lost":    dysmsapitest.BadGateway(),
			} {
				fake.For(code, fault)
				send(replicas[0], number(188, 8), code)
			}
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond): // leaves CPU time for other processes
			}
		}
	})
	return metrics
}

// A server is a running Prometheus.
type server struct{ address string }

// startPrometheus starts a Prometheus with the alerts. It scrapes the targets each second.
func startPrometheus(t *testing.T, program string, targets ...string) server {
	t.Helper()
	rules, err := filepath.Abs(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	dir, s := t.TempDir(), server{servicetest.FreeAddress(t)}
	config := filepath.Join(dir, "prometheus.yaml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `{global: {scrape_interval: 1s, evaluation_interval: 1s}, rule_files: [%q],
scrape_configs: [{job_name: phone-number-service, static_configs: [{targets: [%s]}]}]}`,
		rules, strings.Join(targets, ", ")), 0o600); err != nil {
		t.Fatal(err)
	}
	var output testutil.Output
	cmd := exec.Command(program, "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+s.address,
		"--log.level=warn")
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("output of Prometheus:\n%s", &output)
		}
	})
	testutil.Eventually(t, "Prometheus is ready", func() bool {
		res, err := http.Get("http://" + s.address + "/-/ready")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return s
}

// ask requests path from the API and decodes the response into data.
func (s server) ask(t *testing.T, path string, data any) {
	t.Helper()
	body := testutil.Get(t, s.address, path, 200)
	if err := json.Unmarshal([]byte(body), &struct{ Data any }{data}); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
}

type series struct {
	Metric map[string]string
	Value  [2]any
}

// mustFind waits until the query has a result that is a number, and returns it.
func (s server) mustFind(t *testing.T, source, query string) []series {
	t.Helper()
	var response struct{ Result []series }
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		s.ask(t, "/api/v1/query?query="+url.QueryEscape(query), &response)
		for _, found := range response.Result {
			if v, err := strconv.ParseFloat(found.Value[1].(string), 64); err == nil && !math.IsNaN(v) {
				return response.Result
			}
		}
	}
	t.Errorf("%s: %s: got %v; want a number", source, query, response.Result)
	return nil
}

type rule struct {
	Name, Query, Type, Health, LastError string
	Labels, Annotations                  map[string]string
}

// rules returns all rules after their first evaluation.
func (s server) rules(t *testing.T) (all []rule) {
	t.Helper()
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		var response struct{ Groups []struct{ Rules []rule } }
		s.ask(t, "/api/v1/rules", &response)
		all = nil
		for _, g := range response.Groups {
			all = append(all, g.Rules...)
		}
		if len(all) > 0 && !slices.ContainsFunc(all, func(r rule) bool { return r.Health == "unknown" }) {
			return all
		}
	}
	t.Fatalf("rules: got %v; want all evaluated within a minute", all)
	return nil
}
