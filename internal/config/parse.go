package config

import (
	"fmt"
	"net"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
)

// Parse reads args and the environment into commands, a struct of kong. It returns the selected command,
// an error for each invalid setting of this command, and an error for each unknown variable. If args are
// not a command and its flags, Parse ends the process.
func Parse(commands any, args []string, options ...kong.Option) (command *kong.Context, errs []error) {
	wrong := settingErrors{}
	parser := kong.Must(commands, append(options, kong.KindMapper(reflect.String, wrong), kong.TypeMapper(reflect.TypeFor[int](), wrong),
		kong.TypeMapper(reflect.TypeFor[float64](), wrong),
		kong.TypeMapper(reflect.TypeFor[time.Duration](), wrong), kong.TypeMapper(reflect.TypeFor[[]string](), wrong))...)
	known := knownEnv(parser.Model)
	for _, name := range known {
		if os.Getenv(name) == "" {
			os.Unsetenv(name) // compose files set variables without a value to the empty string
		}
	}
	command, err := parser.Parse(args)
	parser.FatalIfErrorf(err)
	errs = unknownEnv(known)
	for _, flag := range command.Selected().Flags {
		errs = append(errs, wrong[flag.Value])
	}
	return command, errs
}

// settingErrors is a kong.Mapper that collects the errors of settings, because kong stops at the
// first one.
type settingErrors map[*kong.Value]error

// Decode implements kong.Mapper.
func (e settingErrors) Decode(ctx *kong.DecodeContext, target reflect.Value) error {
	setting := ctx.Value
	// kong decodes the flags of the command line first, into copies of their targets. Then it
	// decodes the variables and defaults of all settings.
	field := target.Addr().Interface()
	if setting.Set && field == setting.Target.Addr().Interface() {
		return nil
	}
	var text string
	if err := ctx.Scan.PopValueInto("string", &text); err != nil {
		return err
	}
	if text == "" && setting.Tag.Optional {
		if text = setting.Default; text == "" {
			return nil
		}
	}
	e[setting] = decode(text, setting, field)
	return nil
}

// decode parses text into field, and checks it by the tags of setting.
func decode(text string, setting *kong.Value, field any) error {
	tag, valid, want := setting.Tag, true, ""
	name := fmt.Sprintf("--%s (%s)", setting.Name, strings.Join(tag.Envs, ", "))
	switch field := field.(type) {
	case *int:
		minimum, _ := tag.GetInt("min")
		maximum, _ := tag.GetInt("max")
		n, err := strconv.Atoi(text)
		*field, valid = n, err == nil && int64(n) >= minimum && int64(n) <= maximum
		want = fmt.Sprintf("a whole number from %d to %d", minimum, maximum)
	case *float64:
		minimum, _ := tag.GetFloat("min")
		maximum, _ := tag.GetFloat("max")
		n, err := strconv.ParseFloat(text, 64)
		*field, valid = n, err == nil && n >= minimum && n <= maximum
		want = fmt.Sprintf("a number from %v to %v, such as 0.01", minimum, maximum)
	case *time.Duration:
		minimum, _ := time.ParseDuration(tag.Get("min"))
		maximum, _ := time.ParseDuration(tag.Get("max"))
		d, err := time.ParseDuration(text)
		*field, valid = d, err == nil && d >= minimum && d <= maximum
		want = fmt.Sprintf("a duration from %v to %v, such as 5s or 10m", minimum, maximum)
	case *[]string:
		origins, err := browserOrigins(name, text)
		*field = origins
		return err
	case *string:
		*field = text
		switch oneof := tag.Get("oneof"); {
		case oneof != "":
			valid, want = slices.Contains(strings.Split(strings.Replace(oneof, " or ", ", ", 1), ", "), text), oneof
		case tag.Type == "region":
			valid, want = numberplan.KnownRegion(text), "an ISO 3166 code in capitals, such as CN or SG"
		case tag.Type == "variable":
			valid, want = variableName.MatchString(text), "the name of the template's variable, letters, digits and underscores, such as code"
		case tag.Type == "session":
			valid, want = sessionName.MatchString(text), "a name of 2 to 64 letters, digits and . @ _ -"
		case tag.Type == "address":
			_, port, err := net.SplitHostPort(text)
			_, portErr := strconv.ParseUint(port, 10, 16)
			valid, want = err == nil && portErr == nil, "host:port or :port, such as 127.0.0.1:50511"
		}
	}
	if valid {
		return nil
	}
	return fmt.Errorf("%s is %q; it must be %s", name, text, want)
}

var (
	variableName = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)
	sessionName  = regexp.MustCompile(`^[A-Za-z0-9.@_-]{2,64}$`)
)

const envPrefix = "PHONENUMBER_"

// knownEnv returns the variables of the settings, and the secrets that start with envPrefix.
func knownEnv(app *kong.Application) []string {
	known := []string{CodeKey, CodeKey + "_FILE"}
	for _, command := range app.Children {
		for _, flag := range command.Flags {
			known = append(known, flag.Envs...)
		}
	}
	slices.Sort(known)
	return slices.Compact(known)
}

// injectedByKubernetes matches variables that Kubernetes sets in every container of a namespace
// with a Service whose name starts with "phonenumber".
var injectedByKubernetes = regexp.MustCompile(
	`^PHONENUMBER_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)$`)

// unknownEnv returns an error for each misspelt variable, which would otherwise be ignored.
func unknownEnv(known []string) (errs []error) {
	own := slices.DeleteFunc(slices.Clone(known), func(name string) bool { return !strings.HasPrefix(name, envPrefix) })
	for _, entry := range os.Environ() {
		name, _, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(name, envPrefix) && !slices.Contains(own, name) && !injectedByKubernetes.MatchString(name) {
			errs = append(errs, fmt.Errorf("%s is no setting of this service; there are %s", name, strings.Join(own, ", ")))
		}
	}
	return errs
}
