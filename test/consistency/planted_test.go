package consistency

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

// A plantedBug is an error that a developer could make, and the test that must find it.
type plantedBug struct {
	name  string
	edits []edit
	test  guaranteeTest
	// Name of the test that runs test on the program as it is.
	foundBy   string
	violation string // part of the violation that test must return
}

type edit struct{ file, old, new string }

const (
	verifier = "internal/verify/verifier.go"
	update   = "internal/verify/update.go"
	state    = "internal/verify/state.go"
	keyed    = "internal/verify/keyed.go"
)

var plantedBugs = []plantedBug{
	{
		name: "swap without version",
		edits: []edit{
			{"internal/store/store.go", `state = ? WHERE phone_number = ? AND version = ?"`, `state = ? WHERE phone_number = ?"`},
			{"internal/store/store.go", `string(s.number), s.old[:])`, `string(s.number))`},
			{"internal/store/store.go", `"", anyBytes)`, `"")`},
		},
		test: undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name: "batched swaps without their versions",
		edits: []edit{{
			"internal/store/batch_mysql.go", " WHEN phone_number = ? AND version = ? THEN ?",
			" WHEN phone_number = ? AND (version = ? OR 1) THEN ?",
		}},
		test: undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name: "swap repeated with a new version after an unknown outcome",
		edits: []edit{
			{update, `u.unresolved = true`, `_ = true`},
			{update, `if u.swap.Version != (Version{}) &&`, `if u.unresolved &&`},
		},
		test: lostReplies, foundBy: "TestSwap_LostReplyTakesEffectOnce",
		violation: "was counted twice",
	},
	{
		name:  "a lost connection treated as a swap that was not applied",
		edits: []edit{{"internal/store/mysql.go", "\t\tclass = transient\n", "\t\tclass = notApplied | transient\n"}},
		test:  lostReplies, foundBy: "TestSwap_LostReplyTakesEffectOnce",
		violation: "was counted again after another attempt",
	},
	{
		name:  "begin repeated with the same code",
		edits: []edit{{verifier, `if s.code, err = newCode(`, "if s.code != \"\" {\n} else if s.code, err = newCode("}},
		test:  freshCodes, foundBy: "TestSendSMS_RepeatedBeginUsesAFreshCode",
		violation: "a code without attempts left was stored again",
	},
	{
		name:  "code accepted twice",
		edits: []edit{{state, `return c.SendID <= used && context.has(c)`, `return c.SendID < used && context.has(c)`}},
		test:  undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name: "four attempts",
		edits: []edit{
			{state, "> now || int(c.Attempts) >= r.AttemptLimit", "> now || int(c.Attempts) > r.AttemptLimit"},
			{state, "return int(c.Attempts) >= r.AttemptLimit &&", "return int(c.Attempts) > r.AttemptLimit &&"},
		},
		test: undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name: "compare before count",
		edits: []edit{
			{verifier, "\t\"log/slog\"\n", "\t\"log/slog\"\n\t\"slices\"\n"},
			{verifier, "\tfound   Verification\n", "\tfound   Verification\n\tright   bool\n"},
			{verifier, "\tif _, err := v.updateForCaller(ctx, n, v.owed.takeRecord(n, v.Now().UnixMicro()), c.count)", `	first, err := v.Store.Load(ctx, n)
	if err != nil {
		return Verification{}, ErrStoreUnavailable
	}
	seen, _, _ := decodeRecord(first.State)
	_, c.right, _ = v.Rules.Check(seen, c.macs, c.context, v.Now().UnixMicro())
	if _, err := v.updateForCaller(ctx, n, v.owed.takeRecord(n, v.Now().UnixMicro()), c.count)`},
			{verifier, "\tnext, valid, changed := c.rules.Check(in.state, c.macs, c.context, in.now)\n", `	next, valid, changed := in.state, false, false
	if !c.right {
		next, _, changed = c.rules.Check(in.state, c.macs, c.context, in.now)
	} else if i := slices.IndexFunc(in.state.Codes, func(s Code) bool { return slices.Contains(c.macs, s.MAC) }); i >= 0 {
		next, valid, changed = State{LastSendID: in.state.LastSendID, Codes: in.state.Codes[i+1:]}, true, true
	}
`},
			// Exhausted codes stay in the list, as in a table with a column of attempts.
			{state, "\tcodes = slices.DeleteFunc(codes, func(c Code) bool { return int(c.Attempts) >= r.AttemptLimit && context.has(c) })\n", ""},
		},
		test: parallelGuesses, foundBy: "TestValid_ParallelGuessesGetThreeAttempts",
		violation: "rounds succeeded",
	},
	{
		name: "false from a remembered record",
		edits: []edit{
			{verifier, "\t\"sync/atomic\"\n", "\t\"sync\"\n\t\"sync/atomic\"\n"},
			{verifier, "\tbackground atomic.Int64", "\tremembered sync.Map\n\tbackground atomic.Int64"},
			{verifier, "\tif _, err := v.updateForCaller(ctx, n, v.owed.takeRecord(n, v.Now().UnixMicro()), c.count)", `	if state, ok := v.remembered.Load(n); ok {
		s, _, _ := decodeRecord(state.([]byte))
		if _, _, alive := v.Rules.Check(s, c.macs, c.context, v.Now().UnixMicro()); !alive {
			return Verification{}, nil
		}
	}
	if _, err := v.updateForCaller(ctx, n, v.owed.takeRecord(n, v.Now().UnixMicro()), c.count)`},
			{update, "\tif u.swap.Version != (Version{}) &&", "\tu.v.remembered.Store(u.number, current.State)\n\tif u.swap.Version != (Version{}) &&"},
			{update, "\tu.known = u.swap\n", "\tu.known = u.swap\n\tu.v.remembered.Store(u.number, u.swap.State)\n"},
		},
		test: codeOfOtherReplica, foundBy: "TestValid_AcceptsACodeSentByAnotherReplica",
		violation: "a code was not accepted exactly once",
	},
	{
		name:  "a rejection by a record that was not loaded",
		edits: []edit{{update, "if err != nil && !loaded {", "if err != nil && false {"}},
		test:  undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name:  "withdraw on unknown outcome",
		edits: []edit{{verifier, `case sendErr.Kind.NotSent():`, `case sendErr != nil:`}},
		test:  usualRetry, foundBy: "TestSendSMS_UsualRetryKillsNoSMS",
		violation: "a dead SMS",
	},
	{
		name:  "OK before the confirm of a resend",
		edits: []edit{{verifier, `if s.begun.Sole && s.key == nil {`, `if s.begun.Sole = true; s.key == nil {`}},
		test:  undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name: "sole by a state that another writer replaced",
		edits: []edit{{
			verifier, "\tnext, s.begun, err = s.v.Rules.Begin(", "\twas := s.begun.Sole\n\tdefer func() { s.begun.Sole = s.begun.Sole || was }()\n\tnext, s.begun, err = s.v.Rules.Begin(",
		}},
		test: twoFirstSends, foundBy: "TestSendSMS_TwoFirstSendsAtOnceLeaveOneCode",
		violation: "were both accepted",
	},
	{
		name:  "an SQLite file that is not flushed",
		edits: []edit{{"internal/store/sqlite.go", "_synchronous=FULL", "_synchronous=OFF"}},
		test:  sqliteLosesPower, foundBy: "TestDurability_PowerLossOfSQLiteLosesNothing",
		violation: "lost",
	},
	{
		name:  "connections to a read-only server are kept",
		edits: []edit{{"internal/store/mysql.go", "cfg.RejectReadOnly = true ", "cfg.RejectReadOnly = false "}},
		test:  failover, foundBy: "TestFailover_DropsConnectionsToAReadOnlyServer",
		violation: "were kept",
	},
	{
		name:  "a confirm drops the codes of other contexts",
		edits: []edit{{state, "return c.SendID < sendID && context.has(c)", "return c.SendID < sendID"}},
		test:  undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name: "a code counts for every context",
		edits: []edit{
			{verifier, "s.keys.sign(s.request.Number, s.code, s.request.Context)", "s.keys.sign(s.request.Number, s.code, \"\")"},
			{verifier, "keys.macs(n, code, verificationContext), context: keys.contextTags(n, verificationContext)", "keys.macs(n, code, \"\")"},
			{verifier, "context: keys.contextTags(q.Number, q.Context), ", ""},
		},
		test: undisturbed, foundBy: "TestLinearizable_Undisturbed",
		violation: "is Illegal",
	},
	{
		name:  "a key sends again while its send is in flight",
		edits: []edit{{keyed, "return Begun{}, ErrKeyInProgress", "return Begun{}, nil"}},
		test:  parallelKeys, foundBy: "TestSendSMS_OneKeyInParallelIsOneSMS",
		violation: "64 calls with one key",
	},
	{
		name:  "a key is forgotten after an unknown outcome",
		edits: []edit{{state, "status := keyedUnknown", "status := keyedUnknown\n\treturn State{s.LastSendID, s.Codes, nil}"}},
		test:  aliyunFails, foundBy: "TestLinearizable_WhileAliyunFails",
		violation: "2 SMS for one call",
	},
	{
		name: "SMS requested again after an error",
		edits: []edit{{
			verifier, "\tif err == nil {\n\t\taccepted := ",
			"\tif err != nil {\n\t\tresult.Receipt, err = v.Sender.Send(sendCtx, Message{Number: q.Number, SignName: q.SignName, TemplateCode: q.TemplateCode, Code: s.code})\n\t}\n\tif err == nil {\n\t\taccepted := ",
		}},
		test: aliyunFails, foundBy: "TestLinearizable_WhileAliyunFails",
		violation: "2 SMS for one call",
	},
}

// The service as it is passes every one of these tests. A test that also passes with its bug
// does not test its guarantee.
func TestPlantedBugs_EachIsCaught(t *testing.T) {
	t.Setenv(failuresIn, t.TempDir()) // these failures are expected
	for _, bug := range plantedBugs {
		t.Run(bug.name, func(t *testing.T) {
			violations := bug.test(t, planted(t, bug.name, bug.edits...))
			i := slices.IndexFunc(violations, func(v string) bool { return strings.Contains(v, bug.violation) })
			if i < 0 {
				t.Fatalf("%s: got the violations %q; want one with %q", bug.foundBy, violations, bug.violation)
			}
			t.Logf("%s found it: %s", bug.foundBy, violations[i])
		})
	}
}

// withBug builds the program with one of the planted bugs.
func withBug(t *testing.T, name string) (program string) {
	t.Helper()
	for _, bug := range plantedBugs {
		if bug.name == name {
			return planted(t, name, bug.edits...)
		}
	}
	t.Fatalf("got no planted bug %q; want one", name)
	return ""
}

// planted builds the program with edits that are not in its source (go build -overlay).
func planted(t *testing.T, name string, edits ...edit) (program string) {
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
			t.Fatalf("planted bug %q: got its old text %[3]d times in %[2]s, want 1: %[4]s", name, e.file, n, e.old)
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
	program, err = servicetest.Build(root, "-overlay", file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(program)) })
	return program
}
