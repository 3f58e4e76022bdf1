package verify

import (
	"slices"
	"testing"
)

// The releases before sole codes store the same bytes, with the firstFlag on a code that they
// confirmed. They confirm each send before it returns OK, and their begin drops the oldest code
// without the flag from a full list. In this file, Code.Attempts is the stored byte, with the flag.

func olderBegin(r Rules, s State, n NewSend, now int64) (State, Begun, error) {
	codes := r.unexpired(s.Codes, now)
	if len(codes) >= maxCodes {
		i := slices.IndexFunc(codes, func(c Code) bool {
			return c.Attempts&firstFlag == 0 && c.BegunAt < now-longestInFlight.Microseconds()
		})
		if i < 0 {
			return s, Begun{}, ErrSendInProgress
		}
		codes = slices.Delete(codes, i, i+1)
	}
	sendID := max(s.LastSendID+1, now)
	return State{sendID, append(codes, Code{SendID: sendID, MAC: n.MAC, BegunAt: now}), nil}, Begun{SendID: sendID, At: now}, nil
}

func olderConfirm(r Rules, s State, sendID, now int64) State {
	s = r.Confirm(s, sendID, nil, now)
	if len(s.Codes) > 0 && s.Codes[0].SendID == sendID {
		s.Codes[0].Attempts |= firstFlag
	}
	return s
}

// read returns the State that this release decodes, and written the bytes that it encodes.
func read(s State) State {
	s, _, err := decodeRecord(s.encode())
	if err != nil {
		panic(err)
	}
	return s
}

func written(s State) State {
	s.Codes = slices.Clone(s.Codes)
	for i, stored := 0, s.encode(); i < len(s.Codes); i++ {
		s.Codes[i].Attempts = stored[headerBytes+(i+1)*codeBytes-1]
	}
	return s
}

// besideOlder returns the transitions of this release on a table that the older one uses too.
func besideOlder(r Rules) transitions {
	t := transitionsOf(r)
	return transitions{
		begin: func(s State, n NewSend, now int64) (State, Begun, error) {
			s, b, err := t.begin(read(s), n, now)
			return written(s), b, err
		},
		confirm:  func(s State, begun Code, now int64) State { return written(t.confirm(read(s), begun, now)) },
		withdraw: func(s State, begun Code, now int64) State { return written(t.withdraw(read(s), begun, now)) },
		check: func(s State, macs []MAC, now int64) (State, bool, bool) {
			s, valid, changed := t.check(read(s), macs, now)
			return written(s), valid, changed
		},
		older: &transitions{
			begin:    func(s State, n NewSend, now int64) (State, Begun, error) { return olderBegin(r, s, n, now) },
			confirm:  func(s State, begun Code, now int64) State { return olderConfirm(r, s, begun.SendID, now) },
			withdraw: t.withdraw,
			check: func(s State, macs []MAC, now int64) (State, bool, bool) {
				next, valid, changed := t.check(read(s), macs, now)
				for i, c := range next.Codes {
					at := slices.IndexFunc(s.Codes, func(before Code) bool { return before.SendID == c.SendID })
					next.Codes[i].Attempts |= s.Codes[at].Attempts & firstFlag
				}
				return next, valid, changed
			},
		},
	}
}

// In a rolling upgrade, or when it is taken back, replicas of both releases use one table.
func TestModel_OlderReleaseBesideThisOneKeepsTheGuarantees(t *testing.T) {
	for name, w := range map[string]world{
		"three sends":                 {limit: 1, sends: 3, ticks: 1},
		"two sends, the list is full": {limit: 2, sends: 2, ticks: 1, storm: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seen := explore(w, besideOlder(w.rules()))
			if seen.wrong != nil {
				t.Fatalf("got %v", seen)
			}
			t.Logf("no violation in %v", seen)
		})
	}
}

// Without the flag on the first code, a begin of the older release drops a sole code whose send
// returned OK.
func TestModel_OlderReleaseNeedsTheFirstFlag(t *testing.T) {
	w := world{limit: 1, sends: 2, ticks: 1, storm: true}
	unflagged := besideOlder(w.rules())
	begin := unflagged.begin
	unflagged.begin = func(s State, n NewSend, now int64) (State, Begun, error) {
		s, b, err := begin(s, n, now)
		return read(s), b, err
	}
	if seen := explore(w, unflagged); seen.wrong == nil {
		t.Errorf("got no violation in %v, want the sole code dropped", seen)
	}
}
