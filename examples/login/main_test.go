package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"testing"
	"time"
)

// The address and the URL of phone-number-service dev.
var address, sms string

// TestMain starts phone-number-service for the tests. Outside this repository, use
// exec.Command("phone-number-service", "dev").
func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "login")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	program := dir + "/phone-number-service"
	if out, err := exec.Command("go", "build", "-o", program, "github.com/liulinhuai/phone-number-service").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("%v: %s", err, out))
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	address = free.Addr().String()
	free.Close()
	service := exec.Command(program, "dev", "--listen", address)
	service.Env = []string{} // dev does not start with Aliyun credentials
	if err := service.Start(); err != nil {
		panic(err)
	}
	defer service.Process.Kill()
	sms = "http://" + address
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if res, err := http.Get(sms + "/inbox.json"); err == nil {
			res.Body.Close()
			break
		} else if time.Now().After(deadline) {
			panic(err)
		}
	}
	return m.Run()
}
