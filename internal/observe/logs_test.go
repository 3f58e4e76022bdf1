package observe

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), what)
}

func TestABurstOfEqualErrorsIsSampledCountedAndSaidSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lines
		log := slog.New(NewSampled(slog.NewTextHandler(&out, nil)))
		for i := range 2 * linesOfABurst {
			log.Warn("call", "error", fmt.Sprintf("read tcp 127.0.0.1:%d: reset", 40000+i))
		}
		log.Warn("call", "error", "server certificate not trusted") // another reason is not left out
		if reset, other := out.count("reset"), out.count("certificate"); reset != linesOfABurst || other != 1 {
			t.Errorf("%d and %d lines of two reasons were written, want %d and 1", reset, other, linesOfABurst)
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
		if got := out.count("aliyun_code=isv.AMOUNT_NOT_ENOUGH"); got != linesOfABurst {
			t.Errorf("%d lines of the burst were written, want %d", got, linesOfABurst)
		}
		if got := out.count("SMS_SIGNATURE_ILLEGAL"); got != 1 {
			t.Errorf("%d lines of another code were written, want it", got)
		}
		if got := out.count("status=OK"); got != 50 {
			t.Errorf("%d lines of calls that went well were written, want all 50", got)
		}
		time.Sleep(burstWindow)
		synctest.Wait()
		const told = `level=WARN msg="more lines like these were left out" like=call count=40 method=SendSMS status=FailedPrecondition aliyun_code=isv.AMOUNT_NOT_ENOUGH`
		if got := out.count(told); got != 1 {
			t.Errorf("%d lines told that 40 were left out, want one:\n%s", got, &out.b)
		}
		call(slog.LevelWarn, "FailedPrecondition", "isv.AMOUNT_NOT_ENOUGH")
		if got := out.count("aliyun_code=isv.AMOUNT_NOT_ENOUGH d"); got != linesOfABurst+1 {
			t.Errorf("%d lines in all, want one more in the next window", got)
		}
	})
}

func TestWhatWasLeftOutIsToldWhenTheProcessEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lines
		sampled := NewSampled(slog.NewTextHandler(&out, nil))
		for range linesOfABurst + 5 {
			slog.New(sampled).With("a", 1).WithGroup("g").Error("the disk is full")
		}
		sampled.Flush()
		if got := out.count("count=5"); got != 1 {
			t.Errorf("got %d lines that count five, want one:\n%s", got, &out.b)
		}
		time.Sleep(2 * burstWindow)
		synctest.Wait()
		if got := out.count("left out"); got != 1 {
			t.Errorf("it was told %d times, want once", got)
		}
	})
}

func TestABurstOfUnequalErrorsTakesBoundedMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lines
		sampled := NewSampled(slog.NewTextHandler(&out, nil))
		for i := range 3 * kindsOfLines {
			slog.New(sampled).Warn("call", "aliyun_code", fmt.Sprint("isv.", i))
		}
		if got := len(sampled.burst.lines); got > kindsOfLines+1 {
			t.Errorf("%d kinds are remembered, want %d and one more", got, kindsOfLines)
		}
		slog.New(sampled).Error("panic in a call")
		if out.count("panic in a call") != 1 {
			t.Error("an error was left out among warnings")
		}
		sampled.Flush()
		if got := out.count("count=1990"); got != 1 {
			t.Errorf("what is beyond was not counted:\n%s", out.b.String()[out.b.Len()-300:])
		}
	})
}
