package consistency

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

// This is the sequential specification of one number in one context: the newest successful send
// counts, for three calls, once. Contexts do not affect each other (Partition). The results of
// concurrent calls must be explained by an order in which each call takes effect at one moment
// between its begin and its end.

const attemptLimit = 3

// contexts are the verification contexts of the calls: none, a purpose, a session.
var contexts = [...]string{"", "login", "5f1c9a37"}

// A call is the input of an operation, and a result its output.
type call struct {
	send    bool
	code    string // of a send: the one in its message
	context int
}

type result int

const (
	done     result = iota // of SendSMS
	valid                  // of Valid: true
	invalid                // of Valid: false
	noResult               // took effect at any later time, or never
)

type numberState struct {
	code     string // "" if no code is live
	attempts int
}

var specification = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		parts := make([][]porcupine.Operation, len(contexts))
		for _, o := range history {
			context := o.Input.(call).context
			parts[context] = append(parts[context], o)
		}
		return parts
	},
	Init: func() any { return numberState{} },
	Step: func(state, input, output any) (bool, any) {
		s, c, r := state.(numberState), input.(call), output.(result)
		if c.send {
			return true, numberState{code: c.code}
		}
		if s.code != "" && c.code == s.code {
			return r != invalid, numberState{}
		}
		if s.attempts++; s.attempts >= attemptLimit {
			s = numberState{}
		}
		return r != valid, s
	},
	DescribeOperation: func(input, output any) string {
		c, r := input.(call), output.(result)
		name := "Valid"
		if c.send {
			name = "SendSMS"
		}
		return fmt.Sprintf("%s %s in context %q → %s", name, c.code, contexts[c.context], [...]string{"OK", "true", "false", "unknown"}[r])
	},
	DescribeState: func(state any) string {
		s := state.(numberState)
		if s.code == "" {
			return "no code"
		}
		return fmt.Sprintf("%s after %d attempts", s.code, s.attempts)
	},
}

// failuresIn is the variable of the directory for histories that violate the specification.
const failuresIn = "TEST_FAILURES"

// never is the end of a call without a result: it may take effect until then.
const never = int64(1) << 62

// checkTimeout limits porcupine's search in one number's history. Most take below 10 ms.
const checkTimeout = 60 * time.Second

// notLinearizable checks one number's history. It returns "" if the history is linearizable. If
// not, or if the search did not end, it writes the history with porcupine's picture to a file,
// and returns a text with its path.
func notLinearizable(t *testing.T, number string, history []porcupine.Operation, origin string) string {
	t.Helper()
	result, info := porcupine.CheckOperationsVerbose(specification, history, checkTimeout)
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
