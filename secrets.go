package main

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// secrets come from the environment alone, or from the file that NAME_FILE
// names: a flag would show them to everyone who can list processes.
type secrets struct {
	dsn, keyID, keySecret string
	codeKeys              string // "" derives one from keySecret
}

func readSecrets(f *faults) secrets {
	return secrets{
		dsn:       dataSourceName(f),
		keyID:     required(f, "ALIYUN_ACCESS_KEY_ID"),
		keySecret: required(f, "ALIYUN_ACCESS_KEY_SECRET"),
		codeKeys:  secret(f, "PHONENUMBER_CODE_KEY"),
	}
}

func (s secrets) keys(f *faults) (keys verify.Keys) {
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

const secretsReadEvery = 2 * time.Second

// watchSecrets reads the files that secrets came from again and again until ctx ends,
// and has takeOver take what changed. A change counts once it was read twice alike:
// files change one after the other.
func watchSecrets(ctx context.Context, log *slog.Logger, current secrets, takeOver func(before, now secrets) error) {
	files := false
	for _, name := range []string{"DATA_SOURCE_NAME", "Data_SOURCE_NAME", "ALIYUN_ACCESS_KEY_ID", "ALIYUN_ACCESS_KEY_SECRET", "PHONENUMBER_CODE_KEY"} {
		files = files || os.Getenv(name+"_FILE") != ""
	}
	if !files {
		return
	}
	tick := time.NewTicker(secretsReadEvery)
	defer tick.Stop()
	seen, judged := current, current
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		var f faults
		now := readSecrets(&f)
		now.keys(&f)
		if now == judged || now != seen {
			seen = now
			continue
		}
		judged = now
		err := f.err()
		if err == nil {
			err = takeOver(current, now)
		}
		if err != nil {
			log.Error("secrets changed and cannot be used; the old ones stay", "error", err)
			continue
		}
		current = now
		log.Info("took over secrets that changed")
	}
}

// dataSourceName accepts both spellings that documents in the field use.
func dataSourceName(f *faults) string {
	const name, other = "DATA_SOURCE_NAME", "Data_SOURCE_NAME"
	dsn, spelt := secret(f, name), secret(f, other)
	switch {
	case dsn == "" && spelt == "" && os.Getenv(name+"_FILE")+os.Getenv(other+"_FILE") == "":
		f.add("%s is missing: user:password@tcp(host:3306)/PhoneNumberService or sqlite:/path/to/file.db", name)
	case dsn != "" && spelt != "" && dsn != spelt:
		f.add("%s and %s are both set and differ; set one", name, other)
	}
	return cmp.Or(dsn, spelt)
}

func required(f *faults, name string) string {
	value := secret(f, name)
	if value == "" && os.Getenv(name+"_FILE") == "" {
		f.add("%s is missing (it may also be in a file that %s_FILE names)", name, name)
	}
	return value
}

func secret(f *faults, name string) string {
	value, file := os.Getenv(name), os.Getenv(name+"_FILE")
	if file == "" {
		return value
	}
	if value != "" {
		f.add("%s and %s_FILE are both set; set one", name, name)
	}
	content, err := os.ReadFile(file)
	// Not the path: where the secret itself was put there, this would show it.
	var pathError *fs.PathError
	switch value = strings.TrimSpace(string(content)); {
	case errors.As(err, &pathError):
		f.add("the file that %s_FILE names: %v", name, pathError.Err)
	case err != nil || value == "":
		f.add("the file that %s_FILE names is empty", name)
	}
	return value
}
