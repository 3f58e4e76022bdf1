package config

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// The secrets come only from these variables, or from files: the variable NAME_FILE has the path of the
// file for NAME. Flags would show the secrets in the process list.
const (
	DataSourceName  = "DATA_SOURCE_NAME"
	AccessKeyID     = "ALIYUN_ACCESS_KEY_ID"
	AccessKeySecret = "ALIYUN_ACCESS_KEY_SECRET" //nolint:gosec // a name
	SecurityToken   = "ALIYUN_SECURITY_TOKEN"    //nolint:gosec // a name; of a temporary access key
	CodeKey         = "PHONENUMBER_CODE_KEY"     // unset to derive one from AccessKeySecret

	// otherDataSourceName is the second spelling in the README of the original service (docs/moving.md).
	otherDataSourceName = "Data_SOURCE_NAME"
)

// SecretReader reads secrets. Its zero value is ready for use.
type SecretReader struct {
	Role bool // a role gives the credentials if there is no access key
	// hadNewline contains the secrets that were read from a file with a newline at its end. Their later
	// versions must also end with a newline, because a truncated file does not.
	hadNewline map[string]bool
}

// Read returns all secrets by their variables. Keys accepts them if there is no error.
func (r *SecretReader) Read() (map[string]string, error) {
	dsn, dsnErr := r.DataSourceName()
	secrets, accessKeyErr := r.AccessKey()
	codeKey, codeKeyErr := r.read(CodeKey)
	if (r.byRole() || secrets[SecurityToken] != "") && codeKey == "" && codeKeyErr == nil {
		codeKeyErr = fmt.Errorf("%s is missing: with temporary credentials it cannot be derived from them, because each renewal would invalidate the codes that were sent; make one by: openssl rand -base64 32", CodeKey)
	}
	secrets[DataSourceName], secrets[CodeKey] = dsn, codeKey
	_, keysErr := Keys(secrets)
	return secrets, errors.Join(dsnErr, accessKeyErr, codeKeyErr, keysErr)
}

// AccessKey returns the secrets of the access key by their variables. They are empty if a role gives the
// credentials.
func (r *SecretReader) AccessKey() (map[string]string, error) {
	readKey := r.required
	if r.byRole() {
		readKey = r.read
	}
	keyID, idErr := readKey(AccessKeyID)
	keySecret, secretErr := readKey(AccessKeySecret)
	token, tokenErr := r.read(SecurityToken)
	secrets := map[string]string{AccessKeyID: keyID, AccessKeySecret: keySecret, SecurityToken: token}
	err := errors.Join(idErr, secretErr, tokenErr)
	if err == nil {
		return secrets, nil
	}
	switch set := accessKeyVariables(); {
	case len(set) == 0:
		err = fmt.Errorf("%w; or use a RAM role: set %s", err, RoleVariables)
	case r.Role:
		err = fmt.Errorf("%w; to use the role, unset %s", err, strings.Join(set, ", "))
	}
	return secrets, err
}

func (r *SecretReader) byRole() bool { return r.Role && !HasAccessKey() }

// HasAccessKey reports whether any part of an access key is set, in a variable or a file. Then no role
// is used.
func HasAccessKey() bool { return len(accessKeyVariables()) > 0 }

// accessKeyVariables returns the variables of an access key that are set.
func accessKeyVariables() (set []string) {
	for _, name := range []string{AccessKeyID, AccessKeySecret, SecurityToken} {
		for _, variable := range []string{name, name + "_FILE"} {
			if os.Getenv(variable) != "" {
				set = append(set, variable)
			}
		}
	}
	return set
}

// Keys returns the HMAC keys for stored codes: the keys in CodeKey, or a key that is derived from
// AccessKeySecret.
func Keys(secrets map[string]string) (keys verify.Keys, err error) {
	switch {
	case secrets[CodeKey] != "":
		if keys, err = verify.ParseKeys(secrets[CodeKey]); err != nil {
			err = fmt.Errorf("%s: %w; it must be a comma-separated list of base64 keys, each made by: openssl rand -base64 32", CodeKey, err)
		}
	case secrets[AccessKeySecret] != "":
		if keys, err = verify.DeriveKeys(secrets[AccessKeySecret]); err != nil {
			err = fmt.Errorf("%s is not set and could not be derived: %w", CodeKey, err)
		}
	}
	return keys, err
}

// SecretsInFiles reports whether any of the secrets comes from a file.
func SecretsInFiles() bool {
	all := []string{DataSourceName, otherDataSourceName, AccessKeyID, AccessKeySecret, SecurityToken, CodeKey}
	return slices.ContainsFunc(all, func(secret string) bool { return fileOf(secret) != "" })
}

// fileOf returns the file that a secret comes from, "" if it comes from its variable.
func fileOf(secret string) string { return os.Getenv(secret + "_FILE") }

// DataSourceName returns the data source name, in either spelling.
func (r *SecretReader) DataSourceName() (string, error) {
	dsn, err := r.read(DataSourceName)
	other, otherErr := r.read(otherDataSourceName)
	err = errors.Join(err, otherErr)
	switch {
	case dsn == "" && other == "" && fileOf(DataSourceName)+fileOf(otherDataSourceName) == "":
		err = fmt.Errorf("%s is missing: user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db", DataSourceName)
	case dsn != "" && other != "" && dsn != other:
		err = errors.Join(err, fmt.Errorf("%s and %s are both set and differ; set one", DataSourceName, otherDataSourceName))
	}
	return cmp.Or(dsn, other), err
}

func (r *SecretReader) required(name string) (string, error) {
	value, err := r.read(name)
	if value == "" && fileOf(name) == "" {
		err = fmt.Errorf("%s is missing (it may also be in a file that %s_FILE names)", name, name)
	}
	return value, err
}

// read returns a secret, "" if it is not set.
func (r *SecretReader) read(name string) (string, error) {
	value, file := os.Getenv(name), fileOf(name)
	if file == "" {
		return value, nil
	}
	var errs []error
	if value != "" {
		errs = append(errs, fmt.Errorf("%s and %s_FILE are both set; set one", name, name))
	}
	content, err := os.ReadFile(file)
	// Do not log the path: it could be the secret itself, set in the wrong variable.
	var pathError *fs.PathError
	switch value = strings.TrimSpace(string(content)); {
	case errors.As(err, &pathError):
		errs = append(errs, fmt.Errorf("the file that %s_FILE names: %w", name, pathError.Err))
	case err != nil || value == "":
		errs = append(errs, fmt.Errorf("the file that %s_FILE names is empty", name))
	case strings.HasSuffix(string(content), "\n"):
		if r.hadNewline == nil {
			r.hadNewline = map[string]bool{}
		}
		r.hadNewline[name] = true
	case r.hadNewline[name]:
		errs = append(errs, fmt.Errorf("the file that %s_FILE names must end with a newline, as it did before: it may be cut off", name))
	}
	return value, errors.Join(errs...)
}
