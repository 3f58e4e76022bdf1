package server

import (
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/sms"
)

func TestOpenAPI_DescribesEveryPathAndFailure(t *testing.T) {
	var description struct {
		Paths      map[string]map[string]any
		Components struct {
			Schemas struct {
				Failure struct {
					Properties struct{ Kind struct{ Enum []string } }
				}
			}
		}
	}
	text, err := pageFiles.ReadFile("page/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &description); err != nil {
		t.Fatal(err)
	}
	if got := description.Components.Schemas.Failure.Properties.Kind.Enum; !slices.Equal(got, sms.FailureKinds()) {
		t.Errorf("openapi.json has the kinds %v; want %v", got, sms.FailureKinds())
	}
	source, err := os.ReadFile("development.go")
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/testing.md")
	if err != nil {
		t.Fatal(err)
	}
	registered := map[string]bool{}
	for _, m := range regexp.MustCompile(`data\("([A-Z]+) (/[a-z./]+)"`).FindAllStringSubmatch(string(source), -1) {
		registered[m[1]+" "+m[2]] = true
	}
	described := map[string]bool{}
	for path, methods := range description.Paths {
		for method := range methods {
			if !strings.HasPrefix(path, "/phonenumberservice.") {
				described[strings.ToUpper(method)+" "+path] = true
			}
		}
	}
	if len(registered) < 7 || !maps.Equal(registered, described) {
		t.Errorf("openapi.json describes %v; registered are %v", described, registered)
	}
	for _, what := range append(slices.Collect(maps.Keys(registered)), sms.FailureKinds()...) {
		if !strings.Contains(string(page), "`"+what) {
			t.Errorf("docs/testing.md lacks %s", what)
		}
	}
}

func TestErrorTable_EveryReasonIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	all := []publicError{unclassified, overloaded, headersTooLarge, notAllowed, rateLimited, unknownPath}
	for _, a := range errorTable {
		all = append(all, a.publicError)
	}
	for _, a := range sendErrorTable {
		all = append(all, a)
	}
	for _, a := range all {
		documented := strings.Contains(string(page), "| `"+a.reason+"` |")
		// These kinds always come with a code of Aliyun's, which is the reason then.
		always := a.reason == "SMS_LIMITED" || a.reason == "SMS_BAD_NUMBER" || a.reason == "SMS_REFUSED" || a.reason == "SMS_BAD_REQUEST"
		if documented == always {
			t.Errorf("docs/errors.md: reason %s is documented: %v; want %v", a.reason, documented, !always)
		}
	}
}
