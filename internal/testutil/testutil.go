// Package testutil has the functions that tests of several packages share. The directories below it
// have helpers for one subject each.
package testutil

import (
	"testing"
	"time"
)

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
