package consistency

import (
	"testing"

	"github.com/anishathalye/porcupine"
)

// Six digits repeat: the code of a send whose SMS was not sent can equal a code that a caller
// knows. The history is then legal only with that send in it.
func TestOperations_UnsentCodeMayEqualAUsedCode(t *testing.T) {
	const code, another = "111111", "222222"
	// A send of code and a check at 30 use it. A further check at 70 finds it live again.
	checks := []porcupine.Operation{
		{Input: call{code: code}, Call: 30, Output: valid, Return: 40},
		{Input: call{code: code}, Call: 70, Output: valid, Return: 80},
	}
	sent := &send{begun: 10, end: 20, outcome: accepted, codes: []string{code}}
	for _, c := range []struct {
		name   string
		unsent *send
		more   []porcupine.Operation
		legal  bool
	}{
		{name: "no further send"},
		{name: "an unknown outcome", unsent: &send{begun: 50, end: 60, outcome: inDoubt, unsent: code}, legal: true},
		{name: "a rejected send in flight", unsent: &send{begun: 65, end: 75, outcome: noEffect, unsent: code}, legal: true},
		{name: "another code", unsent: &send{begun: 50, end: 60, outcome: inDoubt, unsent: another}},
		{name: "a send without a request", unsent: &send{begun: 50, end: 60, outcome: noEffect}},
		{name: "a send after the check", unsent: &send{begun: 90, end: 95, outcome: inDoubt, unsent: code}},
		{
			name: "accepted twice more", unsent: &send{begun: 50, end: 60, outcome: inDoubt, unsent: code},
			more: []porcupine.Operation{{Input: call{code: code}, Call: 100, Output: valid, Return: 110}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := &number{checks: append(c.more, checks...), sends: []*send{sent}}
			if c.unsent != nil {
				n.sends = append(n.sends, c.unsent)
			}
			if got := porcupine.CheckOperations(specification, n.operations()); got != c.legal {
				t.Errorf("legal: got %v; want %v", got, c.legal)
			}
		})
	}
}

// A check without a code must not make a send without an SMS an operation: as one, it could end
// the life of any code.
func TestOperations_UnsentCodeKillsNoSMS(t *testing.T) {
	n := &number{
		sends: []*send{
			{begun: 10, end: 20, outcome: accepted, codes: []string{"111111"}},
			{begun: 30, end: 40, outcome: inDoubt, unsent: "222222"},
			{begun: 50, end: 60, outcome: noEffect},
		},
		checks: []porcupine.Operation{
			{Input: call{code: "111111"}, Call: 70, Output: invalid, Return: 80},
			{Input: call{code: ""}, Call: 90, Output: invalid, Return: 100},
		},
	}
	if porcupine.CheckOperations(specification, n.operations()) {
		t.Error("a dead code of an accepted send: got a legal history; want an illegal one")
	}
}
