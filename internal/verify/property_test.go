package verify

import (
	"cmp"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The random histories here test the properties of model_test.go with ten overlapping sends
// and times of every size. model_test.go explores three sends with coarse time exhaustively.
// To run more histories:
//
//	go test ./internal/verify -run Random -rapid.checks=100000

const historySends = 10

// A history is the history of one number: its row, its sends and their results.
type history struct {
	rules Rules
	row   State
	now   int64
	sends []historySend
	specs [maxContexts]oracle // of each context
}

type historySend struct {
	sendID   int64
	mac      MAC
	context  int
	begunAt  int64
	phase    phase
	sole     bool
	used     bool
	calls    int // checks since the begin, or since the last match
	compared int // of these, the ones that could have accepted its code
	younger  int // sends begun later
	pushed   bool
}

func (h *history) live(i int) bool {
	_, valid, _ := h.rules.Check(h.row, []MAC{h.sends[i].mac}, contextOf(h.sends[i].mac), h.now)
	return valid
}

func (h *history) expired(i int) bool {
	return h.now >= h.sends[i].begunAt+h.rules.CodeTTL.Microseconds()
}

// letPendingSucceed lets every send that has not returned succeed at any instant, as the
// specification allows.
func (h *history) letPendingSucceed() {
	var pending [maxContexts]int
	for i, s := range h.sends {
		if s.phase == inFlight || s.phase == delivered {
			pending[s.context] |= 1 << i
		}
	}
	for context := range h.specs {
		h.specs[context].letSucceed(pending[context])
	}
}

func (h *history) begin(context int) {
	mac := contextMAC(len(h.sends), context)
	row, b, err := h.rules.Begin(h.row, newSend(mac), h.now)
	if err != nil {
		return
	}
	for i := range h.sends {
		s := &h.sends[i]
		s.younger++
		first := slices.IndexFunc(row.Codes, contextOf(s.mac).has)
		isFirst := first >= 0 && row.Codes[first].SendID == s.sendID
		s.pushed = s.pushed || s.phase != returnedOK && h.now-s.begunAt > longestInFlight.Microseconds() &&
			s.younger >= maxCodes-maxContexts && !isFirst
	}
	h.row = row
	h.sends = append(h.sends, historySend{sendID: b.SendID, mac: mac, context: context, begunAt: h.now, phase: inFlight, sole: b.Sole})
}

// returnOK confirms the send first, unless its code is sole.
func (h *history) returnOK(i int) {
	if !h.sends[i].sole {
		h.row = h.rules.Confirm(h.row, h.sends[i].sendID, contextOf(h.sends[i].mac), h.now)
	}
	if h.sends[i].phase == delivered {
		h.sends[i].phase = returnedOK
		h.specs[h.sends[i].context].returnedOK(i)
	}
}

func (h *history) withdraw(i int) {
	h.row = h.rules.Withdraw(h.row, h.sends[i].sendID, h.now)
	if h.sends[i].phase == inFlight {
		h.sends[i].phase = withdrawn
		h.specs[h.sends[i].context].returnedRejected(i, h.sends[i].used)
	}
}

// check types the code of send i, or a wrong one (-1), in a context.
func (h *history) check(i, context int) error {
	for k := range h.sends {
		s := &h.sends[k]
		if s.context != context {
			continue
		}
		s.calls++
		if h.live(k) {
			s.compared++
		}
		if s.compared > h.rules.AttemptLimit {
			return fmt.Errorf("G1: code %d was compared with %d calls since the last match, want the limit at most", k, s.compared)
		}
	}
	macs := []MAC{contextMAC(historySends, context), contextMAC(i, context)}
	row, valid, _ := h.rules.Check(h.row, macs, contextOf(macs[0]), h.now)
	h.row = row
	if valid {
		if h.sends[i].used || h.sends[i].context != context {
			return fmt.Errorf("rule 4: code %d was accepted twice, or in another context", i)
		}
		h.sends[i].used = true
		for k := range h.sends {
			if h.sends[k].context == context {
				h.sends[k].calls, h.sends[k].compared = 0, 0
			}
		}
	}
	h.specs[context].checked(i, i >= 0 && h.sends[i].context == context && !h.expired(i), valid, len(h.sends))
	if !h.specs[context].legal() {
		return fmt.Errorf("not linearizable: no order of the calls explains the result %[2]v for code %[1]d", i, valid)
	}
	return nil
}

func (h *history) deadSMS() error {
	var replaced [maxContexts]bool
	for i := len(h.sends) - 1; i >= 0; i-- {
		s := h.sends[i]
		reached := s.phase == delivered || s.phase == returnedOK
		if reached && !replaced[s.context] && !s.used && !s.pushed && s.calls < h.rules.AttemptLimit && !h.expired(i) && !h.live(i) {
			return fmt.Errorf("G2: code %d is on the phone and rejected, but is not replaced, used, expired or exhausted", i)
		}
		replaced[s.context] = replaced[s.context] || s.used || s.phase == returnedOK
	}
	return nil
}

func TestRules_RandomHistoriesKeepTheGuarantees(t *testing.T) {
	for limit := 1; limit <= 4; limit++ {
		t.Run(fmt.Sprintf("limit %d", limit), func(t *testing.T) {
			rules := Rules{AttemptLimit: limit, CodeTTL: MaxCodeTTL}
			var possible [maxContexts][1 << historySends]uint64
			rapid.Check(t, func(t *rapid.T) {
				h := &history{rules: rules, now: modelZero}
				for context := range h.specs {
					h.specs[context] = newOracle(possible[context][:], limit)
				}
				for range rapid.IntRange(20, 150).Draw(t, "steps") {
					before, copied := h.row, State{h.row.LastSendID, slices.Clone(h.row.Codes), nil}
					if err := h.step(t); err != nil {
						t.Fatal(err)
					}
					if !slices.Equal(before.Codes, copied.Codes) || before.LastSendID != copied.LastSendID {
						t.Fatalf("the step changed its argument: got %v, want %v", before, copied)
					}
					if len(h.row.Codes) > maxCodes || !slices.IsSortedFunc(h.row.Codes, func(a, b Code) int { return cmp.Compare(a.SendID, b.SendID) }) {
						t.Fatalf("got codes %v, want at most %d in the order of their send IDs", h.row.Codes, maxCodes)
					}
				}
			})
		})
	}
}

// step runs one random step, if it is possible now.
func (h *history) step(t *rapid.T) (err error) {
	pauses := []time.Duration{time.Microsecond, time.Second, 31 * time.Second, time.Minute, MaxCodeTTL - time.Microsecond, MaxCodeTTL}
	// A step that is in the list more than once is more frequent.
	kind := rapid.SampledFrom([]string{
		"begin", "begin", "begin", "deliver", "deliver", "return OK", "return OK", "withdraw",
		"check", "check", "check", "guess", "wait",
	}).Draw(t, "step")
	context := rapid.IntRange(0, maxContexts-1).Draw(t, "context")
	switch {
	case kind == "begin":
		if len(h.sends) < historySends {
			h.begin(context)
		}
	case kind == "guess":
		err = h.check(wrongCode, context)
	case kind == "wait":
		h.now += rapid.SampledFrom(pauses).Draw(t, "pause").Microseconds()
	case len(h.sends) > 0:
		i := rapid.IntRange(0, len(h.sends)-1).Draw(t, "send")
		switch phase := h.sends[i].phase; {
		case kind == "deliver" && phase == inFlight:
			h.sends[i].phase = delivered
		case kind == "return OK" && (phase == delivered || phase == returnedOK):
			h.returnOK(i)
		case kind == "withdraw" && (phase == inFlight || phase == withdrawn):
			h.withdraw(i)
		case kind == "check":
			err = h.check(i, context)
		}
	}
	if err != nil {
		return err
	}
	h.letPendingSucceed()
	for context := range h.specs {
		if !h.specs[context].legal() {
			return fmt.Errorf("not linearizable after %s", kind)
		}
	}
	return h.deadSMS()
}

func anyState() *rapid.Generator[State] {
	return rapid.Custom(func(t *rapid.T) State {
		s := State{LastSendID: rapid.Int64().Draw(t, "last"), Codes: []Code{}}
		for range rapid.IntRange(0, maxCodes).Draw(t, "codes") {
			c := Code{
				SendID:   rapid.Int64().Draw(t, "send ID"),
				BegunAt:  rapid.Int64().Draw(t, "begun at"),
				Attempts: uint8(rapid.IntRange(0, MaxAttemptLimit).Draw(t, "attempts")),
			}
			if rapid.Bool().Draw(t, "context") {
				c.MAC[zeroBytes] = byte(rapid.IntRange(1, 2).Draw(t, "tag"))
			} else {
				copy(c.MAC[:], rapid.SliceOfN(rapid.Byte(), len(c.MAC), len(c.MAC)).Draw(t, "mac"))
			}
			s.Codes = append(s.Codes, c)
		}
		return s
	})
}

func TestState_RoundTrips(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := anyState().Draw(t, "state")
		stored := want.encode()
		if len(stored) > MaxStateBytes {
			t.Fatalf("got %d bytes, want at most %d", len(stored), MaxStateBytes)
		}
		later := rapid.SliceOf(rapid.Byte()).Draw(t, "bytes of a later version")
		got, _, err := decodeState(append(stored, later...))
		if err != nil || got.LastSendID != want.LastSendID || !slices.Equal(got.Codes, want.Codes) {
			t.Fatalf("got %v, %v, want %v", got, err, want)
		}
	})
}
