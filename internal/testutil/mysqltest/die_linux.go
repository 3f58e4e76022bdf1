package mysqltest

import "syscall"

// dieWithParent makes the kernel kill the server when the test process ends. So no server remains
// after a panic.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
