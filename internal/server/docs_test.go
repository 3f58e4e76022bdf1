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
		t.Errorf("kinds in openapi.json: got %v; want %v", got, sms.FailureKinds())
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
		t.Errorf("paths in openapi.json: got %v; want the registered ones, %v", described, registered)
	}
	for _, name := range append(slices.Collect(maps.Keys(registered)), sms.FailureKinds()...) {
		if !strings.Contains(string(page), "`"+name) {
			t.Errorf("docs/testing.md lacks %s", name)
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
		// These errors always come with Aliyun's code, which replaces the reason.
		isReplaced := a.reason == "SMS_LIMITED" || a.reason == "SMS_BAD_NUMBER" || a.reason == "SMS_REFUSED" || a.reason == "SMS_BAD_REQUEST"
		if documented == isReplaced {
			t.Errorf("docs/errors.md has the reason %s: got %v; want %v", a.reason, documented, !isReplaced)
		}
	}
}
