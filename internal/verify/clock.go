package verify

import "time"

// SteadyClock returns the clock by which codes expire: the later of the wall clock and
// the process's start plus the elapsed monotonic time. A wall clock that is set back
// therefore extends no code's lifetime. A wall clock that is set forward is followed,
// since the other replicas' clocks may agree with it. If it is then set back, SteadyClock
// returns to the monotonic time.
func SteadyClock() func() time.Time {
	start := time.Now()
	return steadyClock(start, time.Now, func() time.Duration { return time.Since(start) })
}

func steadyClock(start time.Time, wall func() time.Time, elapsed func() time.Duration) func() time.Time {
	start = start.Round(0) // strips the monotonic reading, to compare wall times
	return func() time.Time {
		steady := start.Add(elapsed())
		if now := wall().Round(0); now.After(steady) {
			return now
		}
		return steady
	}
}
