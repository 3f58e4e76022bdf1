package deploy

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"sigs.k8s.io/yaml"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

var composeVariables = []string{"MYSQL_PASSWORD", "GRAFANA_PASSWORD", "ALIYUN_ACCESS_KEY_ID", "ALIYUN_ACCESS_KEY_SECRET"}

// load loads compose.yaml with a value for each of these variables.
func load(t *testing.T, variables []string) (*types.Project, error) {
	t.Helper()
	var env []string
	for _, name := range variables {
		env = append(env, name+"=value-of-"+name)
	}
	options, err := cli.NewProjectOptions([]string{deploy + "/compose.yaml"}, cli.WithEnv(env))
	must(t, err)
	return options.LoadProject(t.Context())
}

func TestCompose_FitsTheProgram(t *testing.T) {
	project, err := load(t, composeVariables)
	must(t, err)
	for _, name := range slices.Sorted(maps.Keys(project.Services)) {
		s := project.Services[name]
		for _, p := range s.Ports {
			if p.HostIP != "127.0.0.1" {
				t.Errorf("%s: port %d: got the address %q; want 127.0.0.1", name, p.Target, p.HostIP)
			}
		}
		for _, v := range s.Volumes {
			if _, err := os.Stat(v.Source); v.Type == types.VolumeTypeBind && err != nil {
				t.Errorf("%s: a mounted file: got %v; want it present", name, err)
			}
		}
		if s.Build == nil && !strings.Contains(s.Image, ":") {
			t.Errorf("%s: image: got %s; want one with a version", name, s.Image)
		}
	}
	service := project.Services["phone-number-service"]
	if _, err := os.Stat(filepath.Join(service.Build.Context, service.Build.Dockerfile)); err != nil {
		t.Error(err)
	}
	if service.DependsOn["mysql"].Condition != types.ServiceConditionHealthy || project.Services["mysql"].HealthCheck == nil {
		t.Error("the service: got no dependency on a healthy MySQL; want one")
	}
	if got, want := *service.Environment["DATA_SOURCE_NAME"], "phone:value-of-MYSQL_PASSWORD@tcp(mysql:3306)/PhoneNumberService"; got != want {
		t.Errorf("DATA_SOURCE_NAME=%s; want %s", got, want)
	}
	for _, part := range []string{
		"CREATE DATABASE PhoneNumberService DEFAULT CHARACTER SET ascii COLLATE ascii_bin;",
		"CREATE USER phone@'%' IDENTIFIED BY 'value-of-MYSQL_PASSWORD';",
		"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON PhoneNumberService.* TO phone@'%';",
	} {
		if content := project.Configs["database"].Content; !strings.Contains(content, part) {
			t.Errorf("setup of MySQL: got\n%s\nwant in it\n%s", content, part)
		}
	}
	if grace := time.Duration(*service.StopGracePeriod); grace < 5*time.Second+longestCall {
		t.Errorf("stop_grace_period: got %v; want at least %v", grace, 5*time.Second+longestCall)
	}
	env := map[string]string{}
	for name, value := range service.Environment {
		env[name] = *value
	}
	mustAccept(t, env)
}

func TestCompose_RequiresItsVariables(t *testing.T) {
	for i, name := range composeVariables {
		without := slices.Concat(composeVariables[:i], composeVariables[i+1:])
		if _, err := load(t, without); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: got %v; want an error that names it", name, err)
		}
	}
}

func TestPrometheus_ScrapesTheService(t *testing.T) {
	var config struct {
		RuleFiles     []string `json:"rule_files"`
		ScrapeConfigs []struct {
			StaticConfigs []struct{ Targets []string } `json:"static_configs"`
		} `json:"scrape_configs"`
	}
	must(t, yaml.Unmarshal([]byte(testutil.ReadFile(t, deploy+"/prometheus/prometheus.yaml")), &config))
	project, err := load(t, composeVariables)
	must(t, err)
	target := "phone-number-service" + *project.Services["phone-number-service"].Environment["PHONENUMBER_METRICS_LISTEN"]
	if got := config.ScrapeConfigs[0].StaticConfigs[0].Targets; !slices.Equal(got, []string{target}) {
		t.Errorf("targets: got %v; want %s", got, target)
	}
	// Paths of rule files are relative to the configuration, here and in the container.
	for _, file := range config.RuleFiles {
		found := slices.ContainsFunc(project.Services["prometheus"].Volumes, func(v types.ServiceVolumeConfig) bool {
			return v.Target == "/etc/prometheus/"+file
		})
		if !found {
			t.Errorf("%s: got no mount in the container; want one", file)
		}
	}
}

func TestGrafana_FindsDashboardAndDataSource(t *testing.T) {
	var sources struct {
		Datasources []struct{ UID, URL string }
	}
	must(t, yaml.Unmarshal([]byte(testutil.ReadFile(t, deploy+"/grafana/provisioning/datasources/prometheus.yaml")), &sources))
	var dashboards struct {
		Providers []struct{ Options struct{ Path string } }
	}
	must(t, yaml.Unmarshal([]byte(testutil.ReadFile(t, deploy+"/grafana/provisioning/dashboards/dashboards.yaml")), &dashboards))
	project, err := load(t, composeVariables)
	must(t, err)
	folder := dashboards.Providers[0].Options.Path
	if !slices.ContainsFunc(project.Services["grafana"].Volumes, func(v types.ServiceVolumeConfig) bool {
		return v.Target == folder+"/dashboard.json"
	}) {
		t.Errorf("%s: got no mounted dashboard.json; want one", folder)
	}
	if url := sources.Datasources[0].URL; url != "http://prometheus:9090" {
		t.Errorf("URL of Prometheus: got %s; want http://prometheus:9090", url)
	}
	var dashboard any
	must(t, json.Unmarshal([]byte(testutil.ReadFile(t, deploy+"/grafana/dashboard.json")), &dashboard))
	for _, uid := range sourcesOf(dashboard) {
		if uid != sources.Datasources[0].UID && !strings.HasPrefix(uid, "$") && !strings.HasPrefix(uid, "--") {
			t.Errorf("data source of the dashboard: got %q; want %q", uid, sources.Datasources[0].UID)
		}
	}
}

// sourcesOf returns the ids of all data sources in a dashboard, with variables and Grafana's
// built-in ones.
func sourcesOf(node any) (uids []string) {
	switch n := node.(type) {
	case []any:
		for _, child := range n {
			uids = append(uids, sourcesOf(child)...)
		}
	case map[string]any:
		if source, ok := n["datasource"].(map[string]any); ok {
			uid, _ := source["uid"].(string)
			uids = append(uids, uid)
		}
		for _, child := range n {
			uids = append(uids, sourcesOf(child)...)
		}
	}
	return uids
}
