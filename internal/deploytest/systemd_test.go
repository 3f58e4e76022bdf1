package deploytest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	unit = "phone-number-service.service"

	// By systemd-analyze security: 10 is bare. What is left is that it talks to the network.
	mostExposure = 1.5

	howToGetSystemd = "no systemd-analyze: apt-get install systemd, or make deploy"
)

func TestSystemdUnit_IsValidAndConfined(t *testing.T) {
	text := read(t, filepath.Join(deploy, "systemd", unit))
	env := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^Environment=(\w+)=(.*)$`).FindAllStringSubmatch(text, -1) {
		env[m[1]] = m[2]
	}
	if len(env) != 4 {
		t.Errorf("the environment: %v", env)
	}
	accepts(t, env)
	stop := regexp.MustCompile(`(?m)^TimeoutStopSec=(\w+)$`).FindStringSubmatch(text)
	if grace, err := time.ParseDuration(stop[1]); err != nil || grace < 5*time.Second+longestCall {
		t.Errorf("killed after %v (%v)", grace, err)
	}

	if _, err := exec.LookPath("systemd-analyze"); err != nil && os.Getenv("CI") != "" {
		t.Fatal(howToGetSystemd)
	} else if err != nil {
		t.Skip(howToGetSystemd)
	}
	// It wants the program where ExecStart says.
	binary, err := program()
	must(t, err)
	here := filepath.Join(t.TempDir(), unit)
	must(t, os.WriteFile(here, []byte(strings.Replace(text, "ExecStart=/usr/local/bin/phone-number-service", "ExecStart="+binary, 1)), 0o600))
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", here).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", here).CombinedOutput()
	must(t, err)
	level := regexp.MustCompile(`exposure level .*: ([0-9.]+)`).FindStringSubmatch(string(out))
	if level == nil {
		t.Fatalf("systemd-analyze security:\n%s", out)
	}
	if exposure, err := strconv.ParseFloat(level[1], 64); err != nil || exposure > mostExposure {
		t.Errorf("exposure %s; want %v at most\n%s", level[1], mostExposure, out)
	}
}
