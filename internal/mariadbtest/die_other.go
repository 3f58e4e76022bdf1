//go:build !linux

package mariadbtest

import "syscall"

func dieWithParent() *syscall.SysProcAttr { return nil }
