package e2e

import (
	"bytes"
	"testing"
)

// The tests of internal/cli and internal/config have every other error.
func TestStart_WrongArgumentOrSettingIsNamed(t *testing.T) {
	for want, args := range map[string][]string{
		"unexpected argument serv":        {"serv"},
		"unknown flag --prot":             {"--prot", "1"},
		"unknown flag --yaml":             {"check", "--yaml"},
		"  - DATA_SOURCE_NAME is missing": {"serve"},
	} {
		cmd := command(nil, args...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != 1 || !bytes.Contains(stderr.Bytes(), []byte(want)) {
			t.Errorf("%v: got %v and the message %q; want exit code 1 and %q", args, err, &stderr, want)
		}
	}
}
