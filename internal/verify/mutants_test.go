package verify

import (
	"slices"
	"testing"
	"time"
)

// A mutant has transitions with one error. explore must find every one; otherwise it could
// also miss a real error. Some mutants are designs that were tried and failed.
func TestModel_FindsEveryMutant(t *testing.T) {
	for _, m := range []struct {
		name   string
		mutate func(t *transitions, r Rules)
		storm  bool // found only with a full list
		loads  bool // found only with a load before another begin
	}{
		{name: "confirm adds a used code again", mutate: func(t *transitions, r Rules) {
			t.confirm = func(s State, begun Code, now int64) State {
				s = r.Confirm(s, begun.SendID, nil, now)
				if !s.contains(begun.SendID, begun.MAC) && now < begun.BegunAt+r.CodeTTL.Microseconds() {
					s.Codes = slices.Insert(s.Codes, 0, begun)
				}
				return s
			}
		}},
		{name: "attempts are counted per number and reset by confirm", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				s, b, err := r.Begin(s, n, now)
				if n := len(s.Codes); err == nil && n > 1 {
					s.Codes[n-1].Attempts = s.Codes[n-2].Attempts
				}
				return s, b, err
			}
			t.confirm = func(s State, begun Code, now int64) State {
				s = r.Confirm(s, begun.SendID, nil, now)
				for i := range s.Codes {
					s.Codes[i].Attempts = 0
				}
				return s
			}
		}},
		{name: "a match does not reset the attempts of newer codes", mutate: func(t *transitions, r Rules) {
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := r.Check(s, macs, nil, now)
				for i := range next.Codes {
					for _, before := range s.Codes {
						if valid && before.SendID == next.Codes[i].SendID {
							next.Codes[i].Attempts = before.Attempts + 1
						}
					}
				}
				return next, valid, changed
			}
		}},
		{name: "a code is accepted twice", mutate: func(t *transitions, r Rules) {
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := r.Check(s, macs, nil, now)
				if valid {
					return s, valid, changed
				}
				return next, valid, changed
			}
		}},
		{name: "a match leaves older codes alive", mutate: func(t *transitions, r Rules) {
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := r.Check(s, macs, nil, now)
				if valid {
					older := slices.IndexFunc(s.Codes, func(c Code) bool { return slices.Contains(macs, c.MAC) })
					next.Codes = slices.Concat(s.Codes[:older], next.Codes)
				}
				return next, valid, changed
			}
		}},
		{name: "a match drops newer codes", mutate: func(t *transitions, r Rules) {
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := r.Check(s, macs, nil, now)
				if valid {
					next.Codes = nil
				}
				return next, valid, changed
			}
		}},
		{name: "a code has one attempt too many", mutate: func(t *transitions, r Rules) {
			r.AttemptLimit++
			t.check = transitionsOf(r).check
		}},
		{name: "a code has one attempt too few", mutate: func(t *transitions, r Rules) {
			r.AttemptLimit--
			t.check = transitionsOf(r).check
		}},
		{name: "a wrong code counts against the newest code only", mutate: func(t *transitions, r Rules) {
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := r.Check(s, macs, nil, now)
				if n := len(s.Codes); changed && !valid && n > 1 {
					next.Codes = slices.Concat(s.Codes[:n-1], next.Codes[min(n-1, len(next.Codes)):])
				}
				return next, valid, changed
			}
		}},
		{name: "a wrong code counts against the oldest code only", mutate: func(t *transitions, r Rules) {
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := r.Check(s, macs, nil, now)
				if n := len(s.Codes); changed && !valid && n > 1 {
					next.Codes = slices.Concat(next.Codes[:max(0, len(next.Codes)-n+1)], s.Codes[1:])
				}
				return next, valid, changed
			}
		}},
		{name: "an expired code is accepted", mutate: func(t *transitions, r Rules) {
			r.CodeTTL += time.Microsecond
			t.begin, t.check = r.Begin, transitionsOf(r).check
		}},
		{name: "a code dies before its time", mutate: func(t *transitions, r Rules) {
			r.CodeTTL = modelTick
			t.check = transitionsOf(r).check
		}},
		{name: "begin kills the older codes", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				return r.Begin(State{LastSendID: s.LastSendID}, n, now)
			}
		}},
		{name: "begin resets the attempts of older codes", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				s, b, err := r.Begin(s, n, now)
				for i := range s.Codes {
					s.Codes[i].Attempts = 0
				}
				return s, b, err
			}
		}},
		{name: "confirm resets the attempts of its code", mutate: func(t *transitions, r Rules) {
			t.confirm = func(s State, begun Code, now int64) State {
				s = r.Confirm(s, begun.SendID, nil, now)
				if s.contains(begun.SendID, begun.MAC) {
					s.Codes[0].Attempts = 0
				}
				return s
			}
		}},
		{name: "confirm does not kill older codes", mutate: func(t *transitions, _ Rules) {
			t.confirm = func(s State, _ Code, _ int64) State { return s }
		}},
		{name: "confirm kills newer codes", mutate: func(t *transitions, r Rules) {
			t.confirm = func(s State, begun Code, now int64) State {
				s = r.Confirm(s, begun.SendID, nil, now)
				s.Codes = slices.DeleteFunc(s.Codes, func(c Code) bool { return c.SendID != begun.SendID })
				return s
			}
		}},
		{name: "withdraw drops older codes too", mutate: func(t *transitions, r Rules) {
			t.withdraw = func(s State, begun Code, now int64) State {
				return r.Confirm(r.Withdraw(s, begun.SendID, now), begun.SendID, nil, now)
			}
		}},
		{name: "withdraw drops newer codes too", mutate: func(t *transitions, _ Rules) {
			t.withdraw = func(s State, begun Code, _ int64) State {
				s.Codes = slices.DeleteFunc(slices.Clone(s.Codes), func(c Code) bool { return c.SendID >= begun.SendID })
				return s
			}
		}},
		{name: "withdraw drops nothing", mutate: func(t *transitions, _ Rules) {
			t.withdraw = func(s State, _ Code, _ int64) State { return s }
		}},
		{name: "send IDs start again after a purge", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				last := s.LastSendID
				s, b, err := r.Begin(s, n, now)
				b.SendID = last + 1
				return renumbered(s, b.SendID), b, err
			}
		}},
		{name: "send IDs repeat within a microsecond", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				s, b, err := r.Begin(s, n, now)
				b.SendID = now
				return renumbered(s, b.SendID), b, err
			}
		}},
		{name: "send IDs decrease", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				sendID := -(s.LastSendID + 1)
				if s.LastSendID < 0 {
					sendID = s.LastSendID - 1
				}
				s, b, err := r.Begin(s, n, now)
				b.SendID = sendID
				return renumbered(s, b.SendID), b, err
			}
		}},
		{name: "a full list pushes out its first code", storm: true, mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				codes := r.unexpired(s.Codes, now)
				if len(codes) == maxCodes && codes[0].BegunAt < now-longestInFlight.Microseconds() {
					codes = codes[1:]
				}
				return r.Begin(State{s.LastSendID, codes, nil}, n, now)
			}
		}},
		{name: "a full list pushes out a code in flight", storm: true, mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				if len(s.Codes) == maxCodes {
					s.Codes = slices.Delete(slices.Clone(s.Codes), 1, 2)
				}
				return r.Begin(s, n, now)
			}
		}},
		{name: "a full list pushes out its newest code of unknown outcome", storm: true, mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				if _, _, err := r.Begin(s, n, now); err == nil && len(s.Codes) == maxCodes {
					s.Codes = s.Codes[:maxCodes-1]
				}
				return r.Begin(s, n, now)
			}
		}},
		{name: "sole is true of an earlier state than the replaced one", loads: true, mutate: func(t *transitions, _ Rules) {
			t.soleAtLoad = true
		}},
		{name: "sole, although a code that expires later is in the list", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				_, later, _ := r.Begin(s, n, now+modelTick.Microseconds())
				s, b, err := r.Begin(s, n, now)
				b.Sole = later.Sole
				return s, b, err
			}
		}},
		{name: "OK without confirm, although an older code is in the list", mutate: func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				s, b, err := r.Begin(s, n, now)
				b.Sole = true
				return s, b, err
			}
		}},
	} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			w := world{limit: 3, sends: 3, ticks: 2, storm: m.storm, loads: m.loads}
			mutant := transitionsOf(w.rules())
			m.mutate(&mutant, w.rules())
			seen := explore(w, mutant)
			if seen.wrong == nil {
				t.Fatalf("got no violation in %v, want the mutant found", seen)
			}
			t.Logf("found: %v", seen)
		})
	}
}

// renumbered returns s with another send ID for the newest code.
func renumbered(s State, sendID int64) State {
	if n := len(s.Codes); n > 0 && s.Codes[n-1].SendID == s.LastSendID {
		s.Codes = slices.Clone(s.Codes)
		s.Codes[n-1].SendID = sendID
	}
	s.LastSendID = sendID
	return s
}
