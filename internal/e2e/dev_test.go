package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestDev_NeedsOnlyTheProgram(t *testing.T) {
	servicetest.Program() // so that the build is not measured
	began := time.Now()
	p := run(t, nil, "dev").serving(t)
	t.Logf("start to first response: %v", time.Since(began))
	call := func(method, body string) string {
		res, err := http.Post("http://"+p.Addr+"/phonenumberservice.PhoneNumberService/"+method, "application/x-www-form-urlencoded",
			strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return string(b)
	}
	if got := call("SendSMS", `{"phone_number":"18600000000"}`); got != "{}" {
		t.Fatalf("SendSMS: got %s; want {}", got)
	}
	var messages []struct{ Code string }
	if err := json.Unmarshal([]byte(testutil.Get(t, p.Addr, "/inbox.json?phone_number=+8618600000000", 200)), &messages); err != nil ||
		len(messages) != 1 {
		t.Fatalf("inbox: got %v, %v; want one message", messages, err)
	}
	code := messages[0].Code
	if got := call("Valid", `{"phone_number":"18600000000","code":"`+code+`"}`); got != `{"valid":true}` {
		t.Errorf("Valid: got %s; want true", got)
	}
	for _, want := range []string{p.Addr, "curl -d", "grpcurl -plaintext", code} { // written in the background
		testutil.Eventually(t, "the terminal output has "+want, func() bool { return p.Output.Contains(want) })
	}
	if command(nil, "healthcheck", "--address", p.Addr).Run() != nil {
		t.Error("healthcheck while dev runs: got a failure; want exit code 0")
	}
	p.Kill()
	if command(nil, "healthcheck", "--address", p.Addr).Run() == nil {
		t.Error("healthcheck after kill -9: got exit code 0; want a failure")
	}
}

func TestDev_IgnoreCredentialsUsesNone(t *testing.T) {
	run(t, []string{"ALIYUN_ACCESS_KEY_ID=a", "ALIYUN_ACCESS_KEY_SECRET=b", "DATA_SOURCE_NAME=ignored"}, "dev",
		"--ignore-credentials").serving(t)
}

// The reader of stdout closes the pipe, as head -3 does, or stops reading, as a paused
// terminal does.
func TestDev_NeedsNoReaderOfItsStdout(t *testing.T) {
	for _, closes := range []bool{true, false} {
		t.Run(fmt.Sprint("reader closes ", closes), func(t *testing.T) {
			r, w := smallPipe(t)
			stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
			if err != nil {
				t.Fatal(err)
			}
			defer stderr.Close()
			p := runWithStreams(t, w, stderr, nil, "dev").serving(t)
			if closes {
				if !bufio.NewScanner(r).Scan() {
					t.Error("stdout: got no line; want the banner")
				}
				r.Close()
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			for i := range 200 {
				if _, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("186%08d", i)}); err != nil {
					t.Fatalf("SendSMS %d: %v", i, err)
				}
			}
			p.mustStop(t)
		})
	}
}

// TestServe_HasNoInboxNoFailuresAndNoPage requests every path of dev's openapi.json from
// serve. Only the two calls exist there.
func TestServe_HasNoInboxNoFailuresAndNoPage(t *testing.T) {
	fake := dysmsapitest.New(t)
	production := run(t, servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))).serving(t)
	dev := run(t, nil, "dev").serving(t)
	var described struct{ Paths map[string]map[string]any }
	if err := json.Unmarshal([]byte(testutil.Get(t, dev.Addr, "/openapi.json", 200)), &described); err != nil {
		t.Fatal(err)
	}
	paths := []string{"/page.js", "/page.css", "/words.js", "/openapi.json", "/index.html", "/page/index.html"}
	for path := range described.Paths {
		if !strings.HasPrefix(path, "/phonenumberservice.") {
			paths = append(paths, path)
		}
	}
	if len(paths) < 10 {
		t.Fatalf("paths in openapi.json: got %v; want at least 10", paths)
	}
	for _, path := range paths {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE"} {
			q, _ := http.NewRequest(method, "http://"+production.Addr+path, strings.NewReader(`{"kind":"timeout"}`))
			res, err := http.DefaultClient.Do(q)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if res.StatusCode != 404 {
				t.Errorf("%s %s: got %d; want 404", method, path, res.StatusCode)
			}
		}
	}
	production.send(t, "18612345678")
	plain := testutil.Get(t, production.Addr, "/", 200)
	version, err := command(nil, "version").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"phone-number-service " + strings.TrimSpace(string(version)),
		"/phonenumberservice.PhoneNumberService/SendSMS", "https://github.com/liulinhuai/phone-number-service",
	} {
		if !strings.Contains(plain, want) {
			t.Errorf("/ lacks %q:\n%s", want, plain)
		}
	}
	if strings.Contains(plain, "<") || len(plain) > 500 {
		t.Errorf("/: got %d bytes; want at most 500 of plain text, without HTML:\n%s", len(plain), plain)
	}
}
