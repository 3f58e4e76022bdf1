package telemetry

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/servicetest"
)

func count(out *servicetest.Output, what string) int { return strings.Count(out.String(), what) }

func TestSampled_BurstIsSampledAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out servicetest.Output
		log := slog.New(NewSampled(slog.NewTextHandler(&out, nil)))
		for i := range 2 * maxPerWindow {
			log.Warn("call", "error", fmt.Sprintf("read tcp 127.0.0.1:%d: reset", 40000+i))
		}
		log.Warn("call", "error", "server certificate not trusted") // another reason is not left out
		if reset, other := count(&out, "reset"), count(&out, "certificate"); reset != maxPerWindow || other != 1 {
			t.Errorf("%d and %d lines of two reasons were written, want %d and 1", reset, other, maxPerWindow)
		}
		call := func(level slog.Level, status, code string) {
			log.Log(t.Context(), level, "call", "method", "SendSMS", "status", status, "aliyun_code", code, "duration_ms", time.Now().Nanosecond())
		}
		for range 50 {
			call(slog.LevelWarn, "FailedPrecondition", "isv.AMOUNT_NOT_ENOUGH")
		}
		call(slog.LevelWarn, "FailedPrecondition", "isv.SMS_SIGNATURE_ILLEGAL") // unequal: its first ten are written
		for range 50 {
			call(slog.LevelInfo, "OK", "OK") // no error
		}
		if got := count(&out, "aliyun_code=isv.AMOUNT_NOT_ENOUGH"); got != maxPerWindow {
			t.Errorf("%d lines of the burst were written, want %d", got, maxPerWindow)
		}
		if got := count(&out, "SMS_SIGNATURE_ILLEGAL"); got != 1 {
			t.Errorf("%d lines of another code were written, want it", got)
		}
		if got := count(&out, "status=OK"); got != 50 {
			t.Errorf("%d lines of calls that went well were written, want all 50", got)
		}
		time.Sleep(sampleWindow)
		synctest.Wait()
		const told = `level=WARN msg="similar log lines suppressed" message=call count=40 method=SendSMS status=FailedPrecondition aliyun_code=isv.AMOUNT_NOT_ENOUGH`
		if got := count(&out, told); got != 1 {
			t.Errorf("%d lines told that 40 were left out, want one:\n%s", got, &out)
		}
		call(slog.LevelWarn, "FailedPrecondition", "isv.AMOUNT_NOT_ENOUGH")
		if got := count(&out, "aliyun_code=isv.AMOUNT_NOT_ENOUGH d"); got != maxPerWindow+1 {
			t.Errorf("%d lines in all, want one more in the next window", got)
		}
	})
}

func TestSampled_FlushLogsTheSuppressedCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out servicetest.Output
		sampled := NewSampled(slog.NewTextHandler(&out, nil))
		for range maxPerWindow + 5 {
			slog.New(sampled).With("a", 1).WithGroup("g").Error("the disk is full")
		}
		sampled.Flush()
		if got := count(&out, "count=5"); got != 1 {
			t.Errorf("got %d lines that count five, want one:\n%s", got, &out)
		}
		time.Sleep(2 * sampleWindow)
		synctest.Wait()
		if got := count(&out, "suppressed"); got != 1 {
			t.Errorf("it was told %d times, want once", got)
		}
	})
}

func TestSampled_UnequalErrorsTakeBoundedMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out servicetest.Output
		sampled := NewSampled(slog.NewTextHandler(&out, nil))
		for i := range 3 * maxGroups {
			slog.New(sampled).Warn("call", "aliyun_code", fmt.Sprint("isv.", i))
		}
		if got := len(sampled.sampler.groups); got > maxGroups+1 {
			t.Errorf("%d kinds are remembered, want %d and one more", got, maxGroups)
		}
		slog.New(sampled).Error("panic in a call")
		if count(&out, "panic in a call") != 1 {
			t.Error("an error was left out among warnings")
		}
		sampled.Flush()
		if got := count(&out, "count=1990"); got != 1 {
			t.Errorf("what is beyond was not counted:\n%s", &out)
		}
	})
}
