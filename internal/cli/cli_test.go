package cli

import (
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// secrets are the variables of secrets. They have no flags, so kong does not know them.
var secrets = []string{config.DataSourceName, config.AccessKeyID, config.AccessKeySecret, config.SecurityToken, config.CodeKey}

func TestSettings_AreAllInTheDocumentation(t *testing.T) {
	page := testutil.ReadFile(t, "../../docs/configuration.md")
	wants := []string{}
	for _, secret := range secrets {
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
		if !strings.Contains(page, want) {
			t.Errorf("docs/configuration.md lacks %s", want)
		}
	}
}

func TestHelp_NamesTheSecretsAndTheRole(t *testing.T) {
	model := kong.Must(&commands{}, vars, kong.Description(description)).Model
	role := []string{"RAM role"}
	for _, flag := range kong.Must(&config.Role{}, vars).Model.Flags {
		if len(flag.Envs) > 0 && !flag.HasDefault {
			role = append(role, flag.Envs...)
		}
	}
	if len(role) != 5 {
		t.Fatalf("got the variables %v; want the four of a role that have no default", role)
	}
	for _, want := range slices.Concat(secrets, role) {
		if !strings.Contains(model.Help, want) {
			t.Errorf("the help lacks %s:\n%s", want, model.Help)
		}
	}
	if want := "PHONENUMBER_CODE_KEY (required with temporary credentials)"; !strings.Contains(model.Help, want) {
		t.Errorf("the help lacks %q:\n%s", want, model.Help)
	}
	if got, want := model.Children[0].Help, "ALIYUN_ACCESS_KEY_ID and ALIYUN_ACCESS_KEY_SECRET or a RAM role"; !strings.Contains(got, want) {
		t.Errorf("serve: got the help %q; want %q in it", got, want)
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
