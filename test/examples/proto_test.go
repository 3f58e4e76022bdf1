package examples

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// protoc itself generates for the languages whose examples do not use generated code.
func TestProto_NamesGeneratedCode(t *testing.T) {
	for _, command := range []string{"protoc", "php"} {
		if _, err := exec.LookPath(command); err != nil && os.Getenv("CI") == "" {
			t.Skipf("no %s: make deps-examples", command)
		}
	}
	dir := t.TempDir()
	cmd := exec.Command("protoc", "-I", "../../phonenumberservice", "phonenumberservice.proto",
		"--csharp_out="+dir, "--objc_out="+dir, "--php_out="+dir)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("protoc: got %v, %s; want no error and no warning", err, out)
	}
	for file, want := range map[string]string{
		"Phonenumberservice.cs":                                      "namespace Liulinhuai.PhoneNumbers {",
		"Phonenumberservice.pbobjc.h":                                "@interface PNSSendSMSRequest :",
		"Liulinhuai/PhoneNumbers/SendSMSRequest.php":                 `namespace Liulinhuai\PhoneNumbers;`,
		"Liulinhuai/PhoneNumbers/GPBMetadata/Phonenumberservice.php": `namespace Liulinhuai\PhoneNumbers\GPBMetadata;`,
	} {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || !strings.Contains(string(text), want) {
			t.Errorf("%s: got %v, %s; want %q", file, err, text, want)
		}
		if filepath.Ext(file) == ".php" {
			if out, err := exec.Command("php", "-l", filepath.Join(dir, file)).CombinedOutput(); err != nil {
				t.Errorf("php -l %s: %v\n%s", file, err, out)
			}
		}
	}
}
