package deploytest

import (
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	apps "k8s.io/api/apps/v1"
	autoscaling "k8s.io/api/autoscaling/v2"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	podsecurityapi "k8s.io/pod-security-admission/api"
	podsecurity "k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const manifests = deploy + "/kubernetes"

// applied is what kubectl apply -k applies, and the Secret that it needs.
type applied struct {
	*apps.Deployment
	*core.Service
	*policy.PodDisruptionBudget
	*autoscaling.HorizontalPodAutoscaler
	*networking.NetworkPolicy
	*core.Secret
}

// build runs kustomize and reads what it makes strictly: a kind or a field that
// Kubernetes does not know is an error.
func build(t *testing.T) (a applied) {
	t.Helper()
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), manifests)
	must(t, err)
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		apps.AddToScheme, autoscaling.AddToScheme, core.AddToScheme, networking.AddToScheme, policy.AddToScheme,
	} {
		must(t, add(scheme))
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	texts := []string{read(t, manifests+"/secret.example.yaml")}
	for _, r := range built.Resources() {
		texts = append(texts, r.MustYaml())
	}
	for _, text := range texts {
		object, _, err := decoder.Decode([]byte(text), nil, nil)
		if err != nil {
			t.Fatalf("%v, in\n%s", err, text)
		}
		field := reflect.ValueOf(&a).Elem().FieldByName(reflect.TypeOf(object).Elem().Name())
		if !field.IsValid() || !field.IsNil() {
			t.Fatalf("there are no rules for this, or it is there twice:\n%s", text)
		}
		field.Set(reflect.ValueOf(object))
	}
	for i := range reflect.TypeOf(a).NumField() {
		if reflect.ValueOf(a).Field(i).IsNil() {
			t.Fatalf("no %s", reflect.TypeOf(a).Field(i).Name)
		}
	}
	return a
}

func TestKustomization_ListsEveryManifest(t *testing.T) {
	var kustomization struct{ Resources []string }
	must(t, yaml.Unmarshal([]byte(read(t, manifests+"/kustomization.yaml")), &kustomization))
	listed := append(kustomization.Resources, "kustomization.yaml", "secret.example.yaml")
	var there []string
	entries, err := os.ReadDir(manifests)
	must(t, err)
	for _, e := range entries {
		there = append(there, e.Name())
	}
	slices.Sort(listed)
	if !slices.Equal(listed, there) {
		t.Errorf("listed: %v\nthere:  %v", listed, there)
	}
}

func TestManifests_FitTogether(t *testing.T) {
	a := build(t)
	pod := a.Deployment.Spec.Template
	c := pod.Spec.Containers[0]
	ports := map[string]int32{}
	for _, p := range c.Ports {
		ports[p.Name] = p.ContainerPort
	}

	selectors := map[string]*meta.LabelSelector{
		"Deployment":          a.Deployment.Spec.Selector,
		"Service":             {MatchLabels: a.Service.Spec.Selector},
		"PodDisruptionBudget": a.PodDisruptionBudget.Spec.Selector,
		"NetworkPolicy":       &a.NetworkPolicy.Spec.PodSelector,
	}
	for _, s := range pod.Spec.TopologySpreadConstraints {
		selectors[s.TopologyKey] = s.LabelSelector
	}
	for name, s := range selectors {
		selector, err := meta.LabelSelectorAsSelector(s)
		if err != nil || selector.Empty() || !selector.Matches(labels.Set(pod.Labels)) {
			t.Errorf("%s selects %v (%v); the pods are %v", name, s, err, pod.Labels)
		}
	}

	target := a.HorizontalPodAutoscaler.Spec.ScaleTargetRef
	if target.Kind != "Deployment" || target.APIVersion != "apps/v1" || target.Name != a.Deployment.Name {
		t.Errorf("the autoscaler scales %v", target)
	}
	if a.Deployment.Spec.Replicas != nil {
		t.Error("the Deployment undoes what the autoscaler did: it has replicas")
	}
	if least := *a.HorizontalPodAutoscaler.Spec.MinReplicas; int(least) <= a.PodDisruptionBudget.Spec.MaxUnavailable.IntValue() {
		t.Errorf("a drained node can take all of %d replicas", least)
	}
	update := a.Deployment.Spec.Strategy.RollingUpdate
	if update.MaxUnavailable.IntValue() != 0 || update.MaxSurge.IntValue() != 1 {
		t.Errorf("roll-out: %v", update)
	}

	if p := a.Service.Spec.Ports; len(p) != 1 || p[0].Port != ports["grpc"] || p[0].TargetPort.StrVal != "grpc" {
		t.Errorf("Service: %v; container: %v", p, ports)
	}
	var open []int32
	for _, rule := range a.NetworkPolicy.Spec.Ingress {
		if len(rule.From) == 0 {
			t.Error("the NetworkPolicy lets everyone in")
		}
		for _, p := range rule.Ports {
			open = append(open, p.Port.IntVal)
		}
	}
	if want := []int32{ports["grpc"], ports["metrics"]}; !slices.Equal(open, want) {
		t.Errorf("the NetworkPolicy opens %v; want %v", open, want)
	}
	if got := pod.Annotations["prometheus.io/port"]; got != strconv.Itoa(int(ports["metrics"])) {
		t.Errorf("Prometheus is sent to port %s", got)
	}
	if image := c.Image; !strings.Contains(image, "/phone-number-service:") {
		t.Errorf("the image is %s: kustomization.yaml does not set it", image)
	}
}

func TestPod_FitsTheProgram(t *testing.T) {
	a := build(t)
	pod := a.Deployment.Spec.Template
	c := pod.Spec.Containers[0]
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
	}
	settings := documented(t)

	// The probes ask the port at PHONENUMBER_LISTEN, which is the default.
	if _, set := env["PHONENUMBER_LISTEN"]; set || !strings.HasPrefix(settings["PHONENUMBER_LISTEN"].fallback, "`:"+strconv.Itoa(int(c.Ports[0].ContainerPort))+"`") {
		t.Errorf("the port of gRPC is not the default: %v", c.Ports)
	}
	if env["PHONENUMBER_METRICS_LISTEN"] != ":"+strconv.Itoa(int(c.Ports[1].ContainerPort)) {
		t.Errorf("PHONENUMBER_METRICS_LISTEN=%s; ports: %v", env["PHONENUMBER_METRICS_LISTEN"], c.Ports)
	}
	for name, p := range map[string]struct {
		*core.Probe
		command []string
	}{
		"startup":   {c.StartupProbe, []string{"/phone-number-service", "healthcheck", "--liveness"}},
		"readiness": {c.ReadinessProbe, []string{"/phone-number-service", "healthcheck"}},
		"liveness":  {c.LivenessProbe, []string{"/phone-number-service", "healthcheck", "--liveness"}},
	} {
		if !slices.Equal(p.Exec.Command, p.command) {
			t.Errorf("%s probe: %v; want %v", name, p.Exec.Command, p.command)
		}
		if p.TimeoutSeconds <= 3 {
			t.Errorf("%s probe: given up after %d s, healthcheck gives up after 3", name, p.TimeoutSeconds)
		}
	}
	if patience := c.StartupProbe.PeriodSeconds * c.StartupProbe.FailureThreshold; patience < 75 {
		t.Errorf("the startup probe gives up after %d s; the program waits 60 for its database", patience)
	}
	drainDelay, err := time.ParseDuration(env["PHONENUMBER_DRAIN_DELAY"])
	must(t, err)
	if grace := time.Duration(*pod.Spec.TerminationGracePeriodSeconds) * time.Second; grace < drainDelay+longestCall {
		t.Errorf("killed after %v; stopping takes up to %v + %v", grace, drainDelay, longestCall)
	}

	var files []string
	for name, value := range env {
		if strings.HasSuffix(name, "_FILE") {
			files = append(files, path.Base(value))
			if path.Dir(value) != c.VolumeMounts[0].MountPath {
				t.Errorf("%s=%s is not where the Secret is", name, value)
			}
		}
	}
	slices.Sort(files)
	if keys := slices.Sorted(maps.Keys(a.StringData)); !slices.Equal(files, keys) {
		t.Errorf("the files %v are not the Secret's %v", files, keys)
	}
	if v := pod.Spec.Volumes[0]; v.Name != c.VolumeMounts[0].Name || v.Secret.SecretName != a.Secret.Name || c.VolumeMounts[0].SubPath != "" {
		t.Errorf("the Secret %s is mounted as %v from %v", a.Secret.Name, c.VolumeMounts[0], v)
	}

	evaluator, err := podsecurity.NewEvaluator(podsecurity.DefaultChecks(), nil)
	must(t, err)
	restricted := podsecurityapi.LevelVersion{Level: podsecurityapi.LevelRestricted, Version: podsecurityapi.LatestVersion()}
	for _, result := range evaluator.EvaluatePod(restricted, &pod.ObjectMeta, &pod.Spec) {
		if !result.Allowed {
			t.Errorf("against the Pod Security Standard %q: %s: %s", restricted.Level, result.ForbiddenReason, result.ForbiddenDetail)
		}
	}
	if !*c.SecurityContext.ReadOnlyRootFilesystem || *pod.Spec.AutomountServiceAccountToken || *pod.Spec.SecurityContext.RunAsUser != imageUser(t) {
		t.Error("the pod's files can be written, it has a token, or its user is not the image's")
	}
	accepts(t, env)
}

func imageUser(t *testing.T) int64 {
	t.Helper()
	_, after, _ := strings.Cut(read(t, filepath.Join(root, "Dockerfile")), "\nUSER ")
	user, _, _ := strings.Cut(after, ":")
	uid, err := strconv.ParseInt(user, 10, 64)
	must(t, err)
	return uid
}
