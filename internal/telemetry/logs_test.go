package telemetry

import (
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
)

func TestLogHandler_BurstIsSampledAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out testutil.Output
		log := slog.New(NewLogHandler(slog.NewTextHandler(&out, nil)))
		for i := range 2 * maxPerWindow {
			log.Warn("call", "error", fmt.Sprintf("read tcp 127.0.0.1:%d: reset", 40000+i))
		}
		log.Warn("call", "error", "server certificate not trusted") // another error: not suppressed
		if reset, other := out.Count("reset"), out.Count("certificate"); reset != maxPerWindow || other != 1 {
			t.Errorf("got %d and %d lines of two errors, want %d and 1", reset, other, maxPerWindow)
		}
		call := func(level slog.Level, status, code string) {
			log.Log(t.Context(), level, "call", "method", "SendSMS", "status", status, "aliyun_code", code, "duration_ms", time.Now().Nanosecond())
		}
		for range 50 {
			call(slog.LevelWarn, "FailedPrecondition", "isv.AMOUNT_NOT_ENOUGH")
		}
		call(slog.LevelWarn, "FailedPrecondition", "isv.SMS_SIGNATURE_ILLEGAL") // unequal: not suppressed
		for range 50 {
			call(slog.LevelInfo, "OK", "OK") // no error
		}
		if got := out.Count("aliyun_code=isv.AMOUNT_NOT_ENOUGH"); got != maxPerWindow {
			t.Errorf("got %d lines of the burst, want %d", got, maxPerWindow)
		}
		if got := out.Count("SMS_SIGNATURE_ILLEGAL"); got != 1 {
			t.Errorf("got %d lines of another code, want 1", got)
		}
		if got := out.Count("status=OK"); got != 50 {
			t.Errorf("got %d lines of successful calls, want all 50", got)
		}
		time.Sleep(sampleWindow)
		synctest.Wait()
		const summary = `level=WARN msg="similar log lines suppressed" message=call count=40 method=SendSMS status=FailedPrecondition aliyun_code=isv.AMOUNT_NOT_ENOUGH`
		if got := out.Count(summary); got != 1 {
			t.Errorf("got %d summaries of 40 suppressed lines, want 1:\n%s", got, &out)
		}
		call(slog.LevelWarn, "FailedPrecondition", "isv.AMOUNT_NOT_ENOUGH")
		if got := out.Count("aliyun_code=isv.AMOUNT_NOT_ENOUGH d"); got != maxPerWindow+1 {
			t.Errorf("got %d lines in all, want %d: one more in the next window", got, maxPerWindow+1)
		}
	})
}

func TestLogHandler_FlushLogsTheSuppressedCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out testutil.Output
		sampled := NewLogHandler(slog.NewTextHandler(&out, nil))
		for range maxPerWindow + 5 {
			slog.New(sampled).With("a", 1).WithGroup("g").Error("the disk is full")
		}
		sampled.Flush()
		if got := out.Count("count=5"); got != 1 {
			t.Errorf("got %d summaries of 5 suppressed lines, want 1:\n%s", got, &out)
		}
		time.Sleep(2 * sampleWindow)
		synctest.Wait()
		if got := out.Count("suppressed"); got != 1 {
			t.Errorf("got %d summaries in the end, want 1", got)
		}
	})
}

func TestLogHandler_UnequalErrorsTakeBoundedMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out testutil.Output
		sampled := NewLogHandler(slog.NewTextHandler(&out, nil))
		for i := range 3 * maxGroups {
			slog.New(sampled).Warn("call", "aliyun_code", fmt.Sprint("isv.", i))
		}
		if got := len(sampled.groups); got > maxGroups+1 {
			t.Errorf("got %d groups, want %d and one more at most", got, maxGroups)
		}
		slog.New(sampled).Error("recovered from a panic")
		if out.Count("recovered from a panic") != 1 {
			t.Error("got an error suppressed with the warnings, want it logged")
		}
		sampled.Flush()
		if got := out.Count("count=1990"); got != 1 {
			t.Errorf("got %d lines with a count of 1990 for the other groups, want 1:\n%s", got, &out)
		}
	})
}
