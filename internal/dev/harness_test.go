package dev

import (
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
)

// startDev runs the service as the command dev does, until the test ends. Each change gets the
// complete configuration before dev does.
func startDev(t *testing.T, change ...func(*server.Config)) (*servertest.Replica, *Inbox) {
	t.Helper()
	inbox := newInbox()
	config := append(change, func(c *server.Config) { Configure(c, inbox) })
	return servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), inbox, config...), inbox
}
