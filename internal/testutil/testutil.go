// Package testutil has the functions that tests of several packages share. The directories below it
// have helpers for one subject each.
package testutil

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// RefusingAddress refuses connections: no process listens on port 1. The port of a closed listener is no
// substitute, because another listener can get it.
const RefusingAddress = "127.0.0.1:1"

// timeout is longer than any condition takes on a busy machine.
const timeout = 90 * time.Second

// Eventually waits until condition returns true, and fails the test after a timeout. description
// names the condition.
func Eventually(t testing.TB, description string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(timeout); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", timeout, description)
		}
	}
}

// Get requests path from the server at addr, and returns the body. The test fails unless the status
// code is want.
func Get(t testing.TB, addr, path string, want int) (body string) {
	t.Helper()
	res, err := http.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != want {
		t.Fatalf("GET %s: got %d, %v, %s; want %d", path, res.StatusCode, err, b, want)
	}
	return string(b)
}

// ReadFile returns the content of a file.
func ReadFile(t testing.TB, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// WriteFile writes a file into dir and returns its path.
func WriteFile(t testing.TB, dir, name, content string) (path string) {
	t.Helper()
	path = filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
