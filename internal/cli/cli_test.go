package cli

import (
	"os"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/store"
)

func TestSettings_AreAllInTheDocumentation(t *testing.T) {
	page, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	wants := []string{}
	for _, secret := range []string{config.DataSourceName, config.AccessKeyID, config.AccessKeySecret, config.CodeKey} {
		wants = append(wants, "`"+secret+"` †")
	}
	for _, command := range kong.Must(&commands{}, vars).Model.Children {
		for _, flag := range command.Flags {
			for _, name := range flag.Envs {
				wants = append(wants, "`"+name+"`")
			}
		}
	}
	if len(wants) < 30 {
		t.Fatalf("got the settings %v; want all of them", wants)
	}
	for _, want := range wants {
		if !strings.Contains(string(page), want) {
			t.Errorf("docs/configuration.md lacks %s", want)
		}
	}
}

func TestSettings_DefaultsAreThoseOfTheirPackages(t *testing.T) {
	var c commands
	command, errs := config.Parse(&c, nil, vars)
	if err := config.Join(append(errs, c.Serve.Complete())...); err != nil || command.Command() != "serve" {
		t.Fatalf("no arguments: got the command %s, %v; want serve", command.Command(), err)
	}
	if got, want := c.Serve.DatabaseConnections, store.DefaultConnections; got != want {
		t.Errorf("connections to the database: got %d; want %d", got, want)
	}
}
