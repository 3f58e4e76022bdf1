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

// TestWatchFiles_BackOffToAMinute reads the seconds at which contents that cannot be used
// are tried. A further change is tried and told as soon as it was read twice.
func TestWatchFiles_BackOffToAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now atomic.Value
		now.Store(content("good"))
		began, tried := time.Now(), make(chan int, 100)
		var log servicetest.Output
		go watchFiles(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "n"}, []string{"files"}), "good", watchedFiles[content]{
			kind: "secrets",
			read: func(*configErrors) content { return now.Load().(content) },
			apply: func(_, now content) error {
				tried <- int(time.Since(began).Seconds())
				if now == "better" {
					return nil
				}
				return errors.New("wrong password")
			},
		})
		time.Sleep(time.Second)
		now.Store(content("bad"))
		time.Sleep(5 * time.Minute)
		told := strings.Count(log.String(), "wrong password")
		now.Store(content("worse")) // after 301 s
		time.Sleep(4 * time.Second)
		if got := strings.Count(log.String(), "wrong password") - told; got != 1 {
			t.Errorf("the change was told %d times; want once", got)
		}
		time.Sleep(26 * time.Second)
		now.Store(content("better")) // after 331 s
		time.Sleep(5 * time.Minute)
		var got []int
		for len(tried) > 0 {
			got = append(got, <-tried)
		}
		if want := []int{4, 6, 10, 18, 34, 66, 126, 186, 246, 304, 306, 310, 318, 334}; !slices.Equal(got, want) {
			t.Errorf("got attempts after %v s; want %v", got, want)
		}
	})
}

// TestReload_WrongPasswordIsDialledLessAndLess counts the logins that a server refused,
// from the first on. A slow machine tries less often than the bound allows.
func TestReload_WrongPasswordIsDialledLessAndLess(t *testing.T) {
	t.Parallel()
	server, fake := mariadbtest.Start(t), dysmsapitest.New(t)
	admin := server.Open(t)
	refused := func() (n int) {
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
	eventually(t, "the first attempt", func() bool { return refused() > 0 })
	time.Sleep(11 * time.Second) // the next are 2 s, 6 s and 14 s after the first
	if n := refused(); n > 3 {
		t.Errorf("the server refused %d logins within 11 s of the first; want 3 at most", n)
	}
	before := refused()
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": strings.Replace(bad, "wr0ng", "wr0ng again", 1)})
	eventually(t, "a further change is tried", func() bool { return refused() > before })
	write(t, dir, map[string]string{"DATA_SOURCE_NAME": dsn + "?timeout=1s"})
	eventually(t, "taken over", func() bool { return strings.Contains(p.Output.String(), "reloaded secrets") })
	if out := p.Output.String(); strings.Contains(out, "wr0ng") {
		t.Errorf("the log holds a password:\n%s", out)
	}
}
