package mariadbtest

import "syscall"

// dieWithParent has the kernel kill the server with the test process, so that a
// panic leaves none behind.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
