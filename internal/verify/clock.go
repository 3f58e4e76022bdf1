package verify

import "time"

// SteadyClock returns the clock that a process gives its codes' lives by: the
// later of the wall clock and the start plus the time that really passed. A wall
// clock that is set back thus lengthens no life. One that is set forward is
// believed, since the other replicas' clocks may be right, and so is its way back
// to the time that really passed.
func SteadyClock() func() time.Time {
	start := time.Now()
	return steadyClock(start, time.Now, func() time.Duration { return time.Since(start) })
}

func steadyClock(start time.Time, wall func() time.Time, elapsed func() time.Duration) func() time.Time {
	start = start.Round(0) // without its monotonic reading: wall times are compared
	return func() time.Time {
		steady := start.Add(elapsed())
		if now := wall().Round(0); now.After(steady) {
			return now
		}
		return steady
	}
}
