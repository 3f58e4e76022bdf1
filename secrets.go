package main

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// secrets come only from environment variables, or from files that NAME_FILE variables name.
// Flags would show them in the process list.
type secrets struct {
	dsn, keyID, keySecret string
	codeKeys              string // "" to derive one from keySecret
}

func readSecrets(f *configErrors) secrets {
	return secrets{
		dsn:       dataSourceName(f),
		keyID:     required(f, "ALIYUN_ACCESS_KEY_ID"),
		keySecret: required(f, "ALIYUN_ACCESS_KEY_SECRET"),
		codeKeys:  secret(f, "PHONENUMBER_CODE_KEY"),
	}
}

func (s secrets) keys(f *configErrors) (keys verify.Keys) {
	var err error
	switch {
	case s.codeKeys != "":
		if keys, err = verify.ParseKeys(s.codeKeys); err != nil {
			f.add("PHONENUMBER_CODE_KEY: %v; it must be a comma-separated list of base64 keys, each made by: openssl rand -base64 32", err)
		}
	case s.keySecret != "":
		if keys, err = verify.DeriveKeys(s.keySecret); err != nil {
			f.add("PHONENUMBER_CODE_KEY is not set and could not be derived: %v", err)
		}
	}
	return keys
}

// changed returns the names of the secrets that differ from before.
func (s secrets) changed(before secrets) (names []string) {
	for name, differs := range map[string]bool{
		"DATA_SOURCE_NAME": s.dsn != before.dsn, "ALIYUN_ACCESS_KEY_ID": s.keyID != before.keyID,
		"ALIYUN_ACCESS_KEY_SECRET": s.keySecret != before.keySecret, "PHONENUMBER_CODE_KEY": s.codeKeys != before.codeKeys,
	} {
		if differs {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// secretsInFiles reports whether any of the secrets comes from a file.
func secretsInFiles() bool {
	for _, name := range []string{
		"DATA_SOURCE_NAME", "Data_SOURCE_NAME", "ALIYUN_ACCESS_KEY_ID", "ALIYUN_ACCESS_KEY_SECRET",
		"PHONENUMBER_CODE_KEY",
	} {
		if os.Getenv(name+"_FILE") != "" {
			return true
		}
	}
	return false
}

// secretFiles describes the secrets for watchFiles.
func secretFiles(apply func(before, now secrets) error) watchedFiles[secrets] {
	return watchedFiles[secrets]{
		kind: "secrets",
		read: func(f *configErrors) secrets {
			s := readSecrets(f)
			s.keys(f)
			return s
		},
		apply: apply,
		stableReads: func(before, now secrets) int {
			if (now.keyID != before.keyID) != (now.keySecret != before.keySecret) {
				const halfKeyStableReads = 15 // the other half may change soon
				return halfKeyStableReads
			}
			return minStableReads
		},
	}
}

// dataSourceName accepts both spellings: the README of the original service has both.
func dataSourceName(f *configErrors) string {
	const name, other = "DATA_SOURCE_NAME", "Data_SOURCE_NAME"
	dsn, otherDSN := secret(f, name), secret(f, other)
	switch {
	case dsn == "" && otherDSN == "" && os.Getenv(name+"_FILE")+os.Getenv(other+"_FILE") == "":
		f.add("%s is missing: user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db", name)
	case dsn != "" && otherDSN != "" && dsn != otherDSN:
		f.add("%s and %s are both set and differ; set one", name, other)
	}
	return cmp.Or(dsn, otherDSN)
}

func required(f *configErrors, name string) string {
	value := secret(f, name)
	if value == "" && os.Getenv(name+"_FILE") == "" {
		f.add("%s is missing (it may also be in a file that %s_FILE names)", name, name)
	}
	return value
}

// endedOnce contains the secrets whose file has ended with a newline. Their later versions must
// too, because a truncated file does not.
var endedOnce = map[string]bool{}

func secret(f *configErrors, name string) string {
	value, file := os.Getenv(name), os.Getenv(name+"_FILE")
	if file == "" {
		return value
	}
	if value != "" {
		f.add("%s and %s_FILE are both set; set one", name, name)
	}
	content, err := os.ReadFile(file)
	// Do not log the path: it could be the secret itself, set in the wrong variable.
	var pathError *fs.PathError
	switch value = strings.TrimSpace(string(content)); {
	case errors.As(err, &pathError):
		f.add("the file that %s_FILE names: %v", name, pathError.Err)
	case err != nil || value == "":
		f.add("the file that %s_FILE names is empty", name)
	case strings.HasSuffix(string(content), "\n"):
		endedOnce[name] = true
	case endedOnce[name]:
		f.add("the file that %s_FILE names must end with a newline, as it did before: it may be cut off", name)
	}
	return value
}
