package prove

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// The specification of one number, for one caller at a time: the newest
// successful send counts, for three calls, once. Everything that concurrent
// callers saw must be explained by some order of their calls in which each takes
// effect at one moment between its begin and its end.

const attemptLimit = 3

// A call is what was asked, and an answer what was said.
type call struct {
	send bool
	code string // of a send: the one in its message
}

type answer int

const (
	done       answer = iota // of a send
	valid                    // of Valid, like the next
	refused                  //
	unanswered               // it may have taken effect, at any time since, or never
)

type numberState struct {
	code  string // "" where none is alive
	looks int
}

var specification = porcupine.Model{
	Init: func() any { return numberState{} },
	Step: func(state, input, output any) (bool, any) {
		s, c, a := state.(numberState), input.(call), output.(answer)
		if c.send {
			return true, numberState{code: c.code}
		}
		if s.code != "" && c.code == s.code {
			return a != refused, numberState{}
		}
		if s.looks++; s.looks >= attemptLimit {
			s = numberState{}
		}
		return a != valid, s
	},
	DescribeOperation: func(input, output any) string {
		c, a := input.(call), output.(answer)
		name := "Valid"
		if c.send {
			name = "SendSMS"
		}
		return fmt.Sprintf("%s %s → %s", name, c.code, [...]string{"OK", "true", "false", "unknown"}[a])
	},
	DescribeState: func(state any) string {
		s := state.(numberState)
		if s.code == "" {
			return "no code"
		}
		return fmt.Sprintf("%s after %d looks", s.code, s.looks)
	},
}

// failuresIn names the directory for histories that violate the specification.
const failuresIn = "PROVE_FAILURES"

// never is when an unanswered call ends: it may take effect until then.
const never = int64(1) << 62

// How long porcupine may search one number's history; the usual is below 10 ms.
const checkPatience = 60 * time.Second

// notLinearizable checks one number's history. Where it is not linearizable, or
// the search did not end, it returns what is wrong and where the history was
// written, with porcupine's picture of it.
func notLinearizable(t *testing.T, number string, history []porcupine.Operation, origin string) string {
	t.Helper()
	result, info := porcupine.CheckOperationsVerbose(specification, history, checkPatience)
	if result == porcupine.Ok {
		return ""
	}
	name := strings.ReplaceAll(t.Name(), "/", "-") + "-" + number
	dir := cmp.Or(os.Getenv(failuresIn), "failures")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	picture := filepath.Join(dir, name+".html")
	if err := porcupine.VisualizePath(specification, info, picture); err != nil {
		t.Log(err)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s: the history of %s is %s\n", origin, number, result)
	for _, o := range history {
		end := fmt.Sprint(o.Return)
		if o.Return == never {
			end = "never"
		}
		fmt.Fprintf(&text, "client %d, %d to %s ns: %s, at %v\n", o.ClientId, o.Call, end, specification.DescribeOperation(o.Input, o.Output), o.Metadata)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".txt"), []byte(text.String()), 0o644); err != nil {
		t.Log(err)
	}
	return fmt.Sprintf("the history of %s is %s; see %s (and .txt)", number, result, picture)
}
