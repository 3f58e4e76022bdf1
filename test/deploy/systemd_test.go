package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

const (
	unit = "phone-number-service.service"

	// Of systemd-analyze security; without any protection it is 10. The rest is the network access.
	maxExposure = 1.5

	howToGetSystemd = "no systemd-analyze: apt-get install systemd, or make deploy"
)

func TestSystemdUnit_IsValidAndConfined(t *testing.T) {
	text := testutil.ReadFile(t, filepath.Join(deploy, "systemd", unit))
	env := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^Environment=(\w+)=(.*)$`).FindAllStringSubmatch(text, -1) {
		env[m[1]] = m[2]
	}
	if len(env) != 4 {
		t.Errorf("environment: got %v; want four variables", env)
	}
	mustAccept(t, env)
	stop := regexp.MustCompile(`(?m)^TimeoutStopSec=(\w+)$`).FindStringSubmatch(text)
	if grace, err := time.ParseDuration(stop[1]); err != nil || grace < 5*time.Second+longestCall {
		t.Errorf("TimeoutStopSec: got %v, %v; want at least %v", grace, err, 5*time.Second+longestCall)
	}

	if _, err := exec.LookPath("systemd-analyze"); err != nil && os.Getenv("CI") != "" {
		t.Fatal(howToGetSystemd)
	} else if err != nil {
		t.Skip(howToGetSystemd)
	}
	// systemd-analyze requires that the file of ExecStart exists.
	unitFile := filepath.Join(t.TempDir(), unit)
	built := strings.Replace(text, "ExecStart=/usr/local/bin/phone-number-service", "ExecStart="+servicetest.Program(), 1)
	must(t, os.WriteFile(unitFile, []byte(built), 0o600))
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", unitFile).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: got %v; want no error and no output\n%s", err, out)
	}
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", unitFile).CombinedOutput()
	must(t, err)
	level := regexp.MustCompile(`exposure level .*: ([0-9.]+)`).FindStringSubmatch(string(out))
	if level == nil {
		t.Fatalf("systemd-analyze security: got no exposure level:\n%s", out)
	}
	if exposure, err := strconv.ParseFloat(level[1], 64); err != nil || exposure > maxExposure {
		t.Errorf("exposure: got %s; want at most %v\n%s", level[1], maxExposure, out)
	}
}
