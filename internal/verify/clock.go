package verify

import "time"

// SteadyClock returns the clock for the expiry of codes. It returns the later of two times:
// the wall clock, and the start time of the process plus the elapsed monotonic time.
//
// If the wall clock is set back, the second time is later, so no code lives longer. If the
// wall clock is set forward, SteadyClock follows it, since the clocks of the other replicas
// may have the same time. If the wall clock is then set back, SteadyClock returns the second
// time again, so it can go back too.
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
