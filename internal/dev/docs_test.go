package dev

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

func TestOpenAPI_DescribesEveryPathAndFailure(t *testing.T) {
	var description struct {
		Paths map[string]map[string]struct {
			Parameters []struct{ Name string }
		}
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
	if got := description.Components.Schemas.Failure.Properties.Kind.Enum; !slices.Equal(got, FailureKinds()) {
		t.Errorf("kinds in openapi.json: got %v; want %v", got, FailureKinds())
	}
	page := testutil.ReadFile(t, "../../docs/testing.md")
	registered := map[string]string{} // the parameters of each method and path
	for _, e := range routes {
		registered[e.method+" "+e.path] = strings.Join(e.parameters, ", ")
	}
	described := map[string]string{}
	for path, methods := range description.Paths {
		for method, operation := range methods {
			var parameters []string
			for _, p := range operation.Parameters {
				parameters = append(parameters, p.Name)
			}
			if !strings.HasPrefix(path, "/phonenumberservice.") {
				described[strings.ToUpper(method)+" "+path] = strings.Join(parameters, ", ")
			}
		}
	}
	if len(registered) < 7 || !maps.Equal(registered, described) {
		t.Errorf("paths and parameters in openapi.json: got %v; want the registered ones, %v", described, registered)
	}
	for _, name := range append(slices.Collect(maps.Keys(registered)), FailureKinds()...) {
		if !strings.Contains(page, "`"+name) {
			t.Errorf("docs/testing.md lacks %s", name)
		}
	}
}
