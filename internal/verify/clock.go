package verify

import "time"

// SteadyClock returns the clock for the expiry of codes: the later of the wall clock and the
// steady time. The steady time is the start time of the process plus the elapsed monotonic time.
//
// If the wall clock is set back, the steady time is the later one, so no code lives longer. If
// the wall clock is set forward, the returned clock follows it, since the clocks of the other
// replicas may be set forward too. So the returned clock goes back if the wall clock is set
// forward and back again, but never behind the steady time.
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
