package main

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
)

type content string

func (content) changed(content) []string { return nil }

// TestWatchFiles_BackOffToAMinute checks the seconds at which invalid contents are applied
// again. A further change is applied and logged as soon as two reads are identical.
func TestWatchFiles_BackOffToAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var current atomic.Value
		current.Store(content("good"))
		began, attempts := time.Now(), make(chan int, 100)
		var log servicetest.Output
		go watchFiles(t.Context(), slog.New(slog.NewTextHandler(&log, nil)),
			prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "n"}, []string{"files"}), "good", watchedFiles[content]{
				kind: "secrets",
				read: func(*configErrors) content { return current.Load().(content) },
				apply: func(_, next content) error {
					attempts <- int(time.Since(began).Seconds())
					if next == "better" {
						return nil
					}
					return errors.New("wrong password")
				},
			})
		time.Sleep(time.Second)
		current.Store(content("bad"))
		time.Sleep(5 * time.Minute)
		logged := strings.Count(log.String(), "wrong password")
		current.Store(content("worse")) // after 301 s
		time.Sleep(4 * time.Second)
		if got := strings.Count(log.String(), "wrong password") - logged; got != 1 {
			t.Errorf("log lines about the change: got %d; want 1", got)
		}
		time.Sleep(26 * time.Second)
		current.Store(content("better")) // after 331 s
		time.Sleep(5 * time.Minute)
		var got []int
		for len(attempts) > 0 {
			got = append(got, <-attempts)
		}
		if want := []int{4, 6, 10, 18, 34, 66, 126, 186, 246, 304, 306, 310, 318, 334}; !slices.Equal(got, want) {
			t.Errorf("seconds of the attempts: got %v; want %v", got, want)
		}
	})
}

// TestReload_WrongPasswordIsDialledLessAndLess counts the logins that the server rejected.
// A slow machine makes fewer attempts than the bound allows.
func TestReload_WrongPasswordIsDialledLessAndLess(t *testing.T) {
	t.Parallel()
	server, fake := mariadbtest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	rejected := func() (n int) {
		var name string
		if err := admin.QueryRow("SHOW GLOBAL STATUS LIKE 'Access_denied_errors'").Scan(&name, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	dir := t.TempDir()
	dsn := server.DSN(mariadbtest.Database)
	env := append(write(t, dir, map[string]string{"DATA_SOURCE_NAME": dsn}), slices.DeleteFunc(servicetest.Environment(fake, dsn), func(v string) bool {
		return strings.HasPrefix(v, "DATA_SOURCE_NAME=")
	})...)
	p := run(t, env).serving(t)
	bad := strings.Replace(dsn, server.Password(), "wr0ng", 1)
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": bad})
	eventually(t, "the first attempt", func() bool { return rejected() > 0 })
	time.Sleep(11 * time.Second) // attempts follow after 2, 6 and 14 s
	if n := rejected(); n > 3 {
		t.Errorf("rejected logins within 11 s of the first: got %d; want at most 3", n)
	}
	before := rejected()
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": strings.Replace(bad, "wr0ng", "wr0ng again", 1)})
	eventually(t, "a further change is attempted", func() bool { return rejected() > before })
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": dsn + "?timeout=1s"})
	eventually(t, "the correct password is in use", func() bool { return strings.Contains(p.Output.String(), "reloaded secrets") })
	if out := p.Output.String(); strings.Contains(out, "wr0ng") {
		t.Errorf("the log contains a password:\n%s", out)
	}
}
