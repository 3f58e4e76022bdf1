package prove

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/servicetest"
)

// A plantedBug is a mistake that a developer could make, in the lines where it
// would be made, and the proof that must find it.
type plantedBug struct {
	name   string
	edits  []edit
	proof  proof
	caught string // the test that runs the proof on the program as it is
	as     string // what it says of the bug
}

type edit struct{ file, old, new string }

const (
	verifier = "internal/verify/verifier.go"
	state    = "internal/verify/state.go"
)

var plantedBugs = []plantedBug{
	{
		name: "swap without version",
		edits: []edit{
			{"internal/store/store.go", `WHERE phone_number = ? AND version = ?"`, `WHERE phone_number = ?"`},
			{"internal/store/store.go", `string(n), old[:])`, `string(n))`},
			{"internal/store/store.go", `"", []byte{})`, `"")`},
		},
		proof: undisturbed, caught: "TestLinearizable_Undisturbed",
		as: "is Illegal",
	},
	{
		name:  "swaps of many without their versions",
		edits: []edit{{"internal/store/batch.go", " WHEN phone_number = ? AND version = ? THEN ?", " WHEN phone_number = ? AND (version = ? OR 1) THEN ?"}},
		proof: undisturbed, caught: "TestLinearizable_Undisturbed",
		as: "is Illegal",
	},
	{
		name: "swap repeated with a new version after an unknown outcome",
		edits: []edit{
			{verifier, `unconfirmed, lastErr = next, err //`, `lastErr = err //`},
			{verifier, "\t\tlastWritten = next.Version\n", ""},
		},
		proof: lostAnswers, caught: "TestSwap_LostReplyTakesEffectOnce",
		as: "was counted twice",
	},
	{
		name:  "a lost connection taken for a swap that was not done",
		edits: []edit{{"internal/store/mysql.go", "\t\treturn transient\n", "\t\treturn notApplied | transient\n"}},
		proof: lostAnswers, caught: "TestSwap_LostReplyTakesEffectOnce",
		as: "was counted again, after another one",
	},
	{
		name:  "begin repeated with the same code",
		edits: []edit{{verifier, `if code, err = newCode(v.Random); err != nil {`, "if code != \"\" {\n} else if code, err = newCode(v.Random); err != nil {"}},
		proof: freshCodes, caught: "TestSendSMS_RepeatedBeginUsesAFreshCode",
		as: "a code whose looks were spent was begun again",
	},
	{
		name:  "code accepted twice",
		edits: []edit{{state, `codes = codes[match+1:]`, `codes = codes[match:]`}},
		proof: undisturbed, caught: "TestLinearizable_Undisturbed",
		as: "is Illegal",
	},
	{
		name: "four looks",
		edits: []edit{
			{state, "> now || int(c.Attempts) >= r.AttemptLimit", "> now || int(c.Attempts) > r.AttemptLimit"},
			{state, "{ return int(c.Attempts) >= r.AttemptLimit })", "{ return int(c.Attempts) > r.AttemptLimit })"},
		},
		proof: undisturbed, caught: "TestLinearizable_Undisturbed",
		as: "is Illegal",
	},
	{
		name: "compare before count",
		edits: []edit{
			{verifier, "\t\"log/slog\"\n", "\t\"log/slog\"\n\t\"slices\"\n"},
			{verifier, "\tvar valid bool\n", `	var valid bool
	first, err := v.Store.Load(ctx, n)
	if err != nil {
		return Verification{}, ErrStoreUnavailable
	}
	seen, _ := decodeState(first.State)
	_, right, _ := v.Rules.Check(seen, macs, v.Now().UnixMicro())
`},
			{verifier, "\terr := v.updateForCaller(ctx, n, func(s State, t *History, now int64, inDoubt bool) (next State", "\terr = v.updateForCaller(ctx, n, func(s State, t *History, now int64, inDoubt bool) (next State"},
			{verifier, "\t\tnext, valid, changed = v.Rules.Check(s, macs, now)\n", `		if !right {
			next, _, changed = v.Rules.Check(s, macs, now)
			return next, changed, nil
		}
		i := slices.IndexFunc(s.Codes, func(c Code) bool { return slices.Contains(macs, c.MAC) })
		if valid = i >= 0; valid {
			next, changed = State{LastSendID: s.LastSendID, Codes: s.Codes[i+1:]}, true
		}
`},
			// Spent codes stay in the list, as in a table with a column of looks.
			{state, "\tcodes = slices.DeleteFunc(codes, func(c Code) bool { return int(c.Attempts) >= r.AttemptLimit })\n", ""},
		},
		proof: parallelGuesses, caught: "TestValid_ParallelGuessesGetThreeAttempts",
		as: "rounds were won",
	},
	{
		name: "false from a remembered state",
		edits: []edit{
			{verifier, "\tbackground     atomic.Int64", "\tremembered     sync.Map\n\tbackground     atomic.Int64"},
			{verifier, "\tvar valid bool\n", `	if state, ok := v.remembered.Load(n); ok {
		s, _ := decodeState(state.([]byte))
		if _, _, alive := v.Rules.Check(s, macs, v.Now().UnixMicro()); !alive {
			return Verification{}, nil
		}
	}
	var valid bool
`},
			{verifier, "\t\tif lastWritten != (Version{}) && current.Version == lastWritten {", "\t\tv.remembered.Store(n, current.State)\n\t\tif lastWritten != (Version{}) && current.Version == lastWritten {"},
			{verifier, "\t\tcase done:\n", "\t\tcase done:\n\t\t\tv.remembered.Store(n, next.State)\n"},
		},
		proof: noMemory, caught: "TestValid_AcceptsACodeSentByAnotherReplica",
		as: "a code is not accepted once",
	},
	{
		name:  "withdraw on unknown outcome",
		edits: []edit{{verifier, `if sendErr.Kind.NotSent() {`, `if sendErr != nil {`}},
		proof: usualRetry, caught: "TestSendSMS_UsualRetryKillsNoSMS",
		as: "a dead SMS",
	},
	{
		name:  "an SQLite file that is not flushed",
		edits: []edit{{"internal/store/sqlite.go", "_synchronous=FULL", "_synchronous=OFF"}},
		proof: sqliteLosesPower, caught: "TestDurability_PowerLossOfSQLiteLosesNothing",
		as: "lost",
	},
	{
		name:  "connections to a read-only server are kept",
		edits: []edit{{"internal/store/mysql.go", "cfg.RejectReadOnly = true ", "cfg.RejectReadOnly = false "}},
		proof: failover, caught: "TestFailover_DropsConnectionsToAReadOnlyServer",
		as: "were kept",
	},
	{
		name: "an SMS asked for again after an error",
		edits: []edit{{
			verifier, "\tif err == nil {\n\t\tif !v.recordOutcome(",
			"\tif err != nil {\n\t\treceipt, err = v.Sender.Send(sendCtx, Message{Number: n, SignName: signName, TemplateCode: templateCode, Code: code})\n\t}\n\tif err == nil {\n\t\tif !v.recordOutcome(",
		}},
		proof: aliyunFails, caught: "TestLinearizable_WhileAliyunFails",
		as: "2 SMS for one call",
	},
}

// The service as it is passes every proof (they are the tests that are named); a
// proof that also passes with its bug proves nothing.
func TestPlantedBugs_EachIsCaught(t *testing.T) {
	t.Setenv(failuresIn, t.TempDir()) // what is found here was expected
	for _, bug := range plantedBugs {
		t.Run(bug.name, func(t *testing.T) {
			violations := bug.proof(t, planted(t, bug.name, bug.edits...))
			i := slices.IndexFunc(violations, func(v string) bool { return strings.Contains(v, bug.as) })
			if i < 0 {
				t.Fatalf("%s did not say %q:\n%s", bug.caught, bug.as, strings.Join(violations, "\n"))
			}
			t.Logf("%s caught it: %s", bug.caught, violations[i])
		})
	}
}

// withBug builds the program with one of the planted bugs.
func withBug(t *testing.T, name string) (binary string) {
	t.Helper()
	for _, bug := range plantedBugs {
		if bug.name == name {
			return planted(t, name, bug.edits...)
		}
	}
	t.Fatalf("no planted bug has the name %q", name)
	return ""
}

// planted builds the program with edits that are nowhere in its source.
func planted(t *testing.T, name string, edits ...edit) (binary string) {
	t.Helper()
	dir := t.TempDir()
	text, overlay := map[string]string{}, map[string]string{}
	for _, e := range edits {
		path, err := filepath.Abs(filepath.Join(root, e.file))
		if err != nil {
			t.Fatal(err)
		}
		if overlay[path] == "" {
			source, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			text[path], overlay[path] = string(source), filepath.Join(dir, filepath.Base(path))
		}
		if n := strings.Count(text[path], e.old); n != 1 {
			t.Fatalf("the planted bug %q no longer fits %s, which holds %d times: %s", name, e.file, n, e.old)
		}
		text[path] = strings.Replace(text[path], e.old, e.new, 1)
	}
	for path, copied := range overlay {
		if err := os.WriteFile(copied, []byte(text[path]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	binary, err = servicetest.Build(root, "-overlay", file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(binary)) })
	return binary
}
