package deploy

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

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

const manifests = deploy + "/kubernetes"

// applied has the objects that kubectl apply -k applies, and the Secret that they need.
type applied struct {
	*apps.Deployment
	*core.Service
	*policy.PodDisruptionBudget
	*autoscaling.HorizontalPodAutoscaler
	*networking.NetworkPolicy
	*core.Secret
}

// build runs kustomize and decodes the result strictly: an unknown kind or field is an error.
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
	texts := []string{testutil.ReadFile(t, manifests+"/secret.example.yaml")}
	for _, r := range built.Resources() {
		texts = append(texts, r.MustYaml())
	}
	for _, text := range texts {
		object, _, err := decoder.Decode([]byte(text), nil, nil)
		if err != nil {
			t.Fatalf("decoding: %v, in\n%s", err, text)
		}
		field := reflect.ValueOf(&a).Elem().FieldByName(reflect.TypeOf(object).Elem().Name())
		if !field.IsValid() || !field.IsNil() {
			t.Fatalf("got an object of an unexpected kind, or a second one:\n%s", text)
		}
		field.Set(reflect.ValueOf(object))
	}
	for i := range reflect.TypeOf(a).NumField() {
		if reflect.ValueOf(a).Field(i).IsNil() {
			t.Fatalf("got no %s; want one", reflect.TypeOf(a).Field(i).Name)
		}
	}
	return a
}

func TestKustomization_ListsEveryManifest(t *testing.T) {
	var kustomization struct{ Resources []string }
	must(t, yaml.Unmarshal([]byte(testutil.ReadFile(t, manifests+"/kustomization.yaml")), &kustomization))
	listed := append(kustomization.Resources, "kustomization.yaml", "secret.example.yaml")
	var present []string
	entries, err := os.ReadDir(manifests)
	must(t, err)
	for _, e := range entries {
		present = append(present, e.Name())
	}
	slices.Sort(listed)
	if !slices.Equal(listed, present) {
		t.Errorf("listed: got %v; want the files %v", listed, present)
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
			t.Errorf("%s: selector: got %v (%v); want one that matches %v", name, s, err, pod.Labels)
		}
	}

	target := a.HorizontalPodAutoscaler.Spec.ScaleTargetRef
	if target.Kind != "Deployment" || target.APIVersion != "apps/v1" || target.Name != a.Deployment.Name {
		t.Errorf("target of the autoscaler: got %v; want the Deployment %s", target, a.Deployment.Name)
	}
	if a.Deployment.Spec.Replicas != nil {
		t.Error("Deployment: got replicas, which override the autoscaler; want none")
	}
	if minReplicas := *a.HorizontalPodAutoscaler.Spec.MinReplicas; int(minReplicas) <= a.PodDisruptionBudget.Spec.MaxUnavailable.IntValue() {
		t.Errorf("replicas: got %d; want more than maxUnavailable, so that node drains leave one", minReplicas)
	}
	update := a.Deployment.Spec.Strategy.RollingUpdate
	if update.MaxUnavailable.IntValue() != 0 || update.MaxSurge.IntValue() != 1 {
		t.Errorf("roll-out: got %v; want maxUnavailable 0, maxSurge 1", update)
	}

	if p := a.Service.Spec.Ports; len(p) != 1 || p[0].Port != ports["grpc"] || p[0].TargetPort.StrVal != "grpc" {
		t.Errorf("ports of the Service: got %v; want only grpc of %v", p, ports)
	}
	var open []int32
	for _, rule := range a.NetworkPolicy.Spec.Ingress {
		if len(rule.From) == 0 {
			t.Error("NetworkPolicy: got a rule that allows every source; want limited sources")
		}
		for _, p := range rule.Ports {
			open = append(open, p.Port.IntVal)
		}
	}
	if want := []int32{ports["grpc"], ports["metrics"]}; !slices.Equal(open, want) {
		t.Errorf("ports of the NetworkPolicy: got %v; want %v", open, want)
	}
	if got := pod.Annotations["prometheus.io/port"]; got != strconv.Itoa(int(ports["metrics"])) {
		t.Errorf("prometheus.io/port: got %s; want %d", got, ports["metrics"])
	}
	if image := c.Image; !strings.Contains(image, "/phone-number-service:") {
		t.Errorf("image: got %s; want the one that kustomization.yaml sets", image)
	}
}

// The pod's ports, probes, times, files and user fit the settings and the image.
func TestPod_FitsTheProgram(t *testing.T) {
	a := build(t)
	pod := a.Deployment.Spec.Template
	c := pod.Spec.Containers[0]
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
	}
	settings := documented(t)

	// The probes use PHONENUMBER_LISTEN, which must have its default.
	if _, set := env["PHONENUMBER_LISTEN"]; set || !strings.HasPrefix(settings["PHONENUMBER_LISTEN"].fallback,
		"`:"+strconv.Itoa(int(c.Ports[0].ContainerPort))+"`") {
		t.Errorf("gRPC port: got %v; want the default", c.Ports)
	}
	if env["PHONENUMBER_METRICS_LISTEN"] != ":"+strconv.Itoa(int(c.Ports[1].ContainerPort)) {
		t.Errorf("PHONENUMBER_METRICS_LISTEN: got %s; want the metrics port of %v", env["PHONENUMBER_METRICS_LISTEN"], c.Ports)
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
			t.Errorf("%s probe: got %v; want %v", name, p.Exec.Command, p.command)
		}
		if p.TimeoutSeconds <= 3 {
			t.Errorf("%s probe: timeout: got %d s; want more than the 3 s of healthcheck", name, p.TimeoutSeconds)
		}
	}
	if timeout := c.StartupProbe.PeriodSeconds * c.StartupProbe.FailureThreshold; timeout < 75 {
		t.Errorf("startup probe: time to failure: got %d s; want at least 75, since the program waits 60 for its database", timeout)
	}
	drainDelay, err := time.ParseDuration(env["PHONENUMBER_DRAIN_DELAY"])
	must(t, err)
	if grace := time.Duration(*pod.Spec.TerminationGracePeriodSeconds) * time.Second; grace < drainDelay+longestCall {
		t.Errorf("termination grace period: got %v; want at least %v + %v", grace, drainDelay, longestCall)
	}

	var files []string
	for name, value := range env {
		if strings.HasSuffix(name, "_FILE") {
			files = append(files, path.Base(value))
			if path.Dir(value) != c.VolumeMounts[0].MountPath {
				t.Errorf("%s: got %s; want a file in %s, where the Secret is", name, value, c.VolumeMounts[0].MountPath)
			}
		}
	}
	slices.Sort(files)
	if keys := slices.Sorted(maps.Keys(a.StringData)); !slices.Equal(files, keys) {
		t.Errorf("secret files: got %v; want the keys of the Secret, %v", files, keys)
	}
	if v := pod.Spec.Volumes[0]; v.Name != c.VolumeMounts[0].Name || v.Secret.SecretName != a.Secret.Name || c.VolumeMounts[0].SubPath != "" {
		t.Errorf("mount of the Secret %s: got %v of %v; want the whole Secret", a.Secret.Name, c.VolumeMounts[0], v)
	}

	evaluator, err := podsecurity.NewEvaluator(podsecurity.DefaultChecks(), nil)
	must(t, err)
	restricted := podsecurityapi.LevelVersion{Level: podsecurityapi.LevelRestricted, Version: podsecurityapi.LatestVersion()}
	for _, result := range evaluator.EvaluatePod(restricted, &pod.ObjectMeta, &pod.Spec) {
		if !result.Allowed {
			t.Errorf("Pod Security Standard %q: got %s: %s; want it allowed", restricted.Level, result.ForbiddenReason, result.ForbiddenDetail)
		}
	}
	if !*c.SecurityContext.ReadOnlyRootFilesystem || *pod.Spec.AutomountServiceAccountToken ||
		*pod.Spec.SecurityContext.RunAsUser != imageUser(t) {
		t.Errorf("pod: want a read-only root, no service account token, and the image's user %d", imageUser(t))
	}
	mustAccept(t, env)
}

// imageUser returns the user of the Dockerfile.
func imageUser(t *testing.T) int64 {
	t.Helper()
	_, after, _ := strings.Cut(testutil.ReadFile(t, filepath.Join(root, "Dockerfile")), "\nUSER ")
	user, _, _ := strings.Cut(after, ":")
	uid, err := strconv.ParseInt(user, 10, 64)
	must(t, err)
	return uid
}
