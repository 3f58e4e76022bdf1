package verify

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestSteadyClock_IsTheLaterOfWallAndElapsedTime(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name               string
		passed, wall, want time.Duration // since the start
	}{
		{"nothing happened", time.Minute, time.Minute, time.Minute},
		{"the wall clock was set back", time.Minute, -time.Hour, time.Minute},
		{"the wall clock was set forward", time.Minute, time.Hour, time.Hour},
		{"set forward, and back before the clock is read", 2 * time.Minute, 2 * time.Minute, 2 * time.Minute},
		{"set forward, and back too far", 3 * time.Minute, -time.Hour, 3 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := steadyClock(start, func() time.Time { return start.Add(c.wall) }, func() time.Duration { return c.passed })
			if got := now().Sub(start); got != c.want {
				t.Errorf("got %v after the start, want %v", got, c.want)
			}
		})
	}
}

func TestSteadyClock_RunsOnIfTheWallClockIsSetBack(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
	passed, wall := time.Duration(0), start
	now := steadyClock(start, func() time.Time { return wall }, func() time.Duration { return passed })
	last := now()
	for _, wall = range []time.Time{
		start.Add(time.Second), start.Add(-time.Hour), start.Add(-24 * time.Hour),
		start.Add(4 * time.Second), start,
	} {
		passed += time.Second
		got := now()
		if got.Sub(last) < time.Second {
			t.Errorf("%v after the start by a wall clock at %v: got %v, want at least a second after %v", passed, wall, got, last)
		}
		last = got
	}
}

func TestSteadyClock_FollowsElapsedTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := SteadyClock()
		first := now()
		time.Sleep(90 * time.Second)
		if got := now().Sub(first); got != 90*time.Second {
			t.Errorf("after 90 s: got %v later, want 1m30s", got)
		}
	})
}

// A wall clock that is set lengthens no life, and fresh codes are accepted.
func TestVerifier_WallClockJumpLengthensNoLife(t *testing.T) {
	for name, jump := range map[string]time.Duration{"an hour back": -time.Hour, "an hour forward": time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				var code string
				v := newVerifier(&m, func(_ context.Context, msg Message) (Receipt, error) {
					code = msg.Code
					return accept(t.Context(), msg)
				})
				start := time.Now()
				var off atomic.Int64 // a timer of owed acceptances reads the clock too
				wall := func() time.Time { return time.Now().Add(time.Duration(off.Load())) }
				v.Now = steadyClock(start, wall, func() time.Duration { return time.Since(start) })
				send := func() {
					t.Helper()
					if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err != nil {
						t.Fatal(err)
					}
				}
				check := func(name string, want bool) {
					t.Helper()
					if got, err := isValid(t.Context(), v, testNumber, code); err != nil || got != want {
						t.Errorf("%s: got %v, %v; want %v", name, got, err, want)
					}
				}
				life := v.Rules.CodeTTL

				send()
				off.Store(int64(jump))
				if jump < 0 {
					time.Sleep(life - time.Second)
					check("a code from before, at the end of its life", true)
					off.Store(0)
					send()
					off.Store(int64(jump))
				}
				time.Sleep(life)
				check("a code from before, after its life", false)

				send()
				time.Sleep(life - time.Second)
				check("a fresh code, at the end of its life", true)
				send()
				time.Sleep(life)
				check("a fresh code, after its life", false)

				send()
				off.Store(0) // set right again
				check("a code from before the wall clock was set right", jump < 0)
				send()
				time.Sleep(life - time.Second)
				check("a code since the wall clock was set right, at the end of its life", true)
				send()
				time.Sleep(life)
				check("a code since the wall clock was set right, after its life", false)
			})
		})
	}
}
