package reload_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/reload"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

// TestWatcher_BacksOffToAMinute checks the seconds at which the Watcher tries to apply contents that
// are rejected. It applies and logs a further change as soon as it has read it twice.
func TestWatcher_BacksOffToAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now atomic.Value
		now.Store("good")
		start, attempts := time.Now(), make(chan int, 100)
		var log testutil.Output
		go reload.Watcher{
			Kind: "secrets",
			Read: func() (reload.Files, error) { return reload.Files{"password": now.Load().(string)}, nil },
			Apply: func(_ context.Context, _, now reload.Files) error {
				attempts <- int(time.Since(start).Seconds())
				if now["password"] == "better" {
					return nil
				}
				return errors.New("wrong password")
			},
		}.Run(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), reload.NewMetric(), reload.Files{"password": "good"})
		time.Sleep(time.Second)
		now.Store("bad")
		time.Sleep(5 * time.Minute)
		logged := strings.Count(log.String(), "wrong password")
		now.Store("worse") // after 301 s
		time.Sleep(4 * time.Second)
		if got := strings.Count(log.String(), "wrong password") - logged; got != 1 {
			t.Errorf("log lines for the change: got %d; want 1", got)
		}
		time.Sleep(26 * time.Second)
		now.Store("better") // after 331 s
		time.Sleep(5 * time.Minute)
		var got []int
		for len(attempts) > 0 {
			got = append(got, <-attempts)
		}
		if want := []int{4, 6, 10, 18, 34, 66, 126, 186, 246, 304, 306, 310, 318, 334}; !slices.Equal(got, want) {
			t.Errorf("got attempts after %v s; want %v", got, want)
		}
	})
}
