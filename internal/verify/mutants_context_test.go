package verify

import (
	"slices"
	"testing"
	"time"
)

// These mutants have one error in what they do with contexts or with idempotency keys.
func TestModel_FindsEveryMutantOfContextsAndKeys(t *testing.T) {
	contexts := world{limit: 2, sends: 2, ticks: 1, contexts: 2}
	keys := world{limit: 1, sends: 3, ticks: 2, keys: true}
	both := world{limit: 1, sends: 2, ticks: 1, contexts: 2, keys: true}
	full := world{limit: 1, sends: 3, ticks: 1, contexts: 2, storm: true}
	forget := func(t *transitions, r Rules, statuses ...keyedStatus) {
		t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
			s.Keyed = slices.DeleteFunc(slices.Clone(s.Keyed), func(k KeyedSend) bool { return slices.Contains(statuses, k.Status) })
			return r.Begin(s, n, now)
		}
	}
	for _, m := range []struct {
		name   string
		world  world
		mutate func(t *transitions, r Rules)
	}{
		{"a code counts for every context", contexts, func(t *transitions, r Rules) {
			check := t.check
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				for context := range maxContexts {
					other := []MAC{contextMAC(int(macs[0][0]+macs[0][16])-2, context)}
					if next, valid, changed := check(s, other, now); valid {
						return next, valid, changed
					}
				}
				return check(s, macs, now)
			}
		}},
		{"a match drops older codes of another context", contexts, func(t *transitions, r Rules) {
			check := t.check
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := check(s, macs, now)
				if valid {
					at := slices.IndexFunc(s.Codes, func(c Code) bool { return slices.Contains(macs, c.MAC) })
					next.Codes = slices.DeleteFunc(next.Codes, func(c Code) bool { return c.SendID < s.Codes[at].SendID })
				}
				return next, valid, changed
			}
		}},
		{"a match resets the attempts of another context", contexts, func(t *transitions, r Rules) {
			check := t.check
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := check(s, macs, now)
				for i := range next.Codes {
					if valid {
						next.Codes[i].Attempts = 0
					}
				}
				return next, valid, changed
			}
		}},
		{"an attempt counts in every context", contexts, func(t *transitions, r Rules) {
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := r.Check(s, macs, contextOf(macs[0]), now)
				if valid {
					return next, valid, changed
				}
				for context := range maxContexts {
					if tags := contextOf(contextMAC(0, context)); !slices.Equal(tags, contextOf(macs[0])) {
						next, _, _ = r.Check(next, nil, tags, now)
					}
				}
				return next, valid, changed
			}
		}},
		{"an attempt counts in no context but the absent one", contexts, func(t *transitions, r Rules) {
			check := t.check
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := check(s, macs, now)
				if !valid && contextOf(macs[0]) != nil {
					return s, valid, changed
				}
				return next, valid, changed
			}
		}},
		{"a confirm drops older codes of another context", world{limit: 1, sends: 3, contexts: 2}, func(t *transitions, r Rules) {
			t.confirm = func(s State, begun Code, now int64) State { return previousConfirm(r, s, begun.SendID, now) }
		}},
		{"a confirm drops no older codes of its context", world{limit: 1, sends: 2, contexts: 2}, func(t *transitions, r Rules) {
			t.confirm = func(s State, begun Code, now int64) State { return r.Confirm(s, begun.SendID, nil, now) }
		}},
		{"sole, although an older code of the context is there", contexts, func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				s, b, err := r.Begin(s, n, now)
				b.Sole = b.Sole || n.Context != nil
				return s, b, err
			}
		}},
		{"a full list pushes out the first code of another context", full, func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				codes := r.unexpired(s.Codes, now)
				if len(codes) == maxCodes && !isInFlight(codes[1].BegunAt, now) {
					s.Codes = slices.Delete(codes, 1, 2)
				}
				return r.Begin(s, n, now)
			}
		}},
		{"a key sends again while its send is in flight", keys, func(t *transitions, r Rules) { forget(t, r, keyedInFlight) }},
		{"a key sends again after an unknown outcome", keys, func(t *transitions, r Rules) { forget(t, r, keyedUnknown, keyedTimedOut) }},
		{"a key sends again after it was accepted", keys, func(t *transitions, r Rules) { forget(t, r, keyedAccepted) }},
		{"a key is lost with its used code", keys, func(t *transitions, r Rules) {
			check := t.check
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := check(s, macs, now)
				if valid {
					next.Keyed = onlyListed(next)
				}
				return next, valid, changed
			}
		}},
		{"a key is lost with its exhausted code", keys, func(t *transitions, r Rules) {
			check := t.check
			t.check = func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := check(s, macs, now)
				if !valid {
					next.Keyed = onlyListed(next)
				}
				return next, valid, changed
			}
		}},
		{"a key is lost with its replaced code", keys, func(t *transitions, r Rules) {
			confirm := t.confirm
			t.confirm = func(s State, begun Code, now int64) State {
				s = confirm(s, begun, now)
				s.Keyed = onlyListed(s)
				return s
			}
		}},
		{"a key is kept after a rejection", keys, func(t *transitions, r Rules) {
			t.withdraw = func(s State, begun Code, now int64) State {
				keyed := s.Keyed
				s = r.Withdraw(s, begun.SendID, now)
				s.Keyed = keyed
				return s
			}
		}},
		{"a withdraw drops the keys of other sends", keys, func(t *transitions, r Rules) {
			t.withdraw = func(s State, begun Code, now int64) State {
				s = r.Withdraw(s, begun.SendID, now)
				s.Keyed = nil
				return s
			}
		}},
		{"a confirm does not store that a key was accepted", keys, func(t *transitions, r Rules) {
			t.confirm = func(s State, begun Code, now int64) State {
				keyed := s.Keyed
				s = r.Confirm(s, begun.SendID, nil, now)
				s.Keyed = keyed
				return s
			}
		}},
		{"an unknown outcome is not stored", keys, func(t *transitions, _ Rules) {
			t.doubt = func(s State, _ Code) State { return s }
		}},
		{"a key lives longer than its code", keys, func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				longer := r
				longer.CodeTTL += time.Microsecond
				if b, err := replayed(longer.unexpiredKeyed(s.Keyed, now), n.Key, now); b.Replayed || err != nil {
					return s, b, err
				}
				return r.Begin(s, n, now)
			}
		}},
		{"a key dies before its code", keys, func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				shorter := r
				shorter.CodeTTL = modelTick
				s.Keyed = shorter.unexpiredKeyed(s.Keyed, now)
				return r.Begin(s, n, now)
			}
		}},
		{"a key is replayed for another request", both, func(t *transitions, r Rules) {
			t.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
				if n.Key != nil && len(s.Keyed) > 0 {
					n.Key = []KeyTag{s.Keyed[0].Tag}
				}
				return r.Begin(s, n, now)
			}
		}},
	} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			mutant := transitionsOf(m.world.rules())
			m.mutate(&mutant, m.world.rules())
			seen := explore(m.world, mutant)
			if seen.wrong == nil {
				t.Fatalf("got no violation in %v, want the mutant found", seen)
			}
			t.Logf("found: %v", seen)
		})
	}
}

// onlyListed returns the keyed sends whose code is in the list.
func onlyListed(s State) []KeyedSend {
	return slices.DeleteFunc(slices.Clone(s.Keyed), func(k KeyedSend) bool {
		return !slices.ContainsFunc(s.Codes, func(c Code) bool { return c.SendID == k.SendID })
	})
}
