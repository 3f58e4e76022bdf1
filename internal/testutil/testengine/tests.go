package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
)

// A property is a row of the table: a claim about the service on an engine, and its tests. A test can be
// a subtest. Then it does not belong to the property of its parent.
type property struct {
	name               string
	store, consistency []string // tests of the two packages
}

var properties = []property{
	{name: "contract of the store", store: []string{"TestStore_KeepsTheContract", "TestDB_IsDurableAndReady"}},
	{name: "replicas that start at once", store: []string{"TestPrepare_IsSafeForConcurrentReplicas"}},
	{name: "batches", store: []string{"TestFlushLoads_EachRequestGetsItsRecord", "TestFlushUpdates_AppliesAllOrNone"}},
	{
		name:  "a locked row fails a swap within a second",
		store: []string{"TestFlushUpdates_AppliesAllOrNone/a_row_is_locked", "TestPurge_LockedRowDelaysItsOwnDeleteOnly"},
	},
	{
		name: "purge",
		store: []string{
			"TestPurge_DeletesOnlyRowsOlderThanTheRetention", "TestPurge_OneReplicaPurgesOncePerHour",
			"TestPurge_OneOfManyConcurrentReplicasPurges", "TestPurge_KeepsANumberWithANewSend", "TestPurge_UsesTheEarlierOfTwoClocks",
			"TestPurge_ContinuesAfterAnInterruption",
		},
	},
	{
		name: "races", store: []string{"TestSwap_BatchedRacesHaveOneWinnerEach"},
		consistency: []string{
			"TestValid_ParallelGuessesGetThreeAttempts", "TestSendSMS_TwoFirstSendsAtOnceLeaveOneCode",
			"TestSendSMS_OneKeyInParallelIsOneSMS",
		},
	},
	{
		name: "lost replies of the server", store: []string{"TestSwap_LostReplyIsUnknown", "TestVerifier_ResolvesLostReplies"},
		consistency: []string{"TestSwap_LostReplyTakesEffectOnce", "TestSendSMS_RepeatedBeginUsesAFreshCode"},
	},
	{
		name: "histories",
		consistency: []string{
			"TestLinearizable_Undisturbed", "TestLinearizable_WhileAliyunFails", "TestValid_AcceptsACodeSentByAnotherReplica",
			"TestSendSMS_UsualRetryKillsNoSMS",
		},
	},
	{name: "a planted bug is found", consistency: []string{"TestPlantedBugs_EachIsCaught/swap_without_version"}},
	{name: "bad network to the server", consistency: []string{"TestLinearizable_OverABadNetworkToTheDatabase"}},
	{
		name:        "kill of the service",
		consistency: []string{"TestLinearizable_WhileReplicasAreKilled", "TestDurability_FiveKillsLoseNothing/of_the_replicas"},
	},
	{name: "rolling restart of the service", consistency: []string{"TestRollingRestart_FailsNoCall"}},
	{
		name: "kill of the server", store: []string{"TestSwap_SurvivesTheEndOfTheServer"},
		consistency: []string{
			"TestLinearizable_WhileTheDatabaseIsKilled", "TestDurability_FiveKillsLoseNothing/of_the_database",
			"TestDatabaseDown_FailsCallsAndSendsNothing",
		},
	},
	{name: "failover", consistency: []string{"TestFailover_DropsConnectionsToAReadOnlyServer"}},
	{name: "power failure of the server", consistency: []string{"TestDurability_PowerLossOfAServerLosesNothing"}},
	{name: "full disk of the server", consistency: []string{"TestFullDisk_FailsCallsUntilThereIsRoom"}},
	{
		name: "accounts and settings of the server",
		store: []string{
			"TestServer_UsersSettingsAndRoles", "TestPurge_WithoutTheRightWaitsAnHour", "TestPool_WaitsForItsOwnConnectionsAtALimit",
			"TestPool_FailsCallsIfOthersHaveAllConnections",
		},
	},
	{
		name: "error numbers that triggers raise",
		store: []string{
			"TestSwap_ErrorsOfTiDBHaveTheirOutcome", "TestRunPurge_CountsRowsAndLogsMissingRights", "TestMetrics_CountStatementErrorsByNumber",
		},
	},
}

// Subtests that say nothing about the server. Its warnings are printed, and break no guarantee.
const skipped = "/SQLite|//a_database_that_is_ready_has_no_warnings"

// A result is the result of a test.
type result struct {
	action string // pass, fail or skip
	output []string
}

// An event is a line of go test -json.
type event struct {
	Action, Test, Output string
	Elapsed              float64
}

// runTests runs the tests of the properties on the database of dsn, and returns their results by name.
func runTests(ctx context.Context, w io.Writer, dsn string, properties []property) (map[string]result, error) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return nil, fmt.Errorf("failed to find the module of the service: %w", err)
	}
	results := map[string]result{}
	for _, p := range []struct {
		name, dir string
		tests     func(property) []string
	}{
		{"./internal/store", "", func(p property) []string { return p.store }},
		{"./consistency", "test", func(p property) []string { return p.consistency }},
	} {
		var patterns []string
		for _, property := range properties {
			for _, test := range p.tests(property) {
				patterns = append(patterns, "^"+strings.ReplaceAll(test, "/", "$/^")+"$")
			}
		}
		if len(patterns) == 0 {
			continue
		}
		cmd := exec.CommandContext(ctx, "go", "test", "-json", "-count=1", "-timeout=30m",
			"-run", strings.Join(patterns, "|"), "-skip", skipped, p.name)
		cmd.Dir = filepath.Join(strings.TrimSpace(string(root)), p.dir)
		cmd.Env = append(os.Environ(), mysqltest.Existing+"="+dsn)
		// An interrupt ends the tests and the processes that they started.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		err := collect(cmd, w, results)
		if ctx.Err() != nil {
			return nil, errors.New("interrupted")
		}
		if err != nil {
			return nil, err
		}
	}
	return results, nil
}

const shownLines = 50 // of a test

// collect runs go test -json, writes its progress to w, and adds the results of its tests to results.
func collect(cmd *exec.Cmd, w io.Writer, results map[string]result) error {
	var problems bytes.Buffer
	cmd.Stderr = &problems
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	output := map[string][]string{} // of tests that have not ended; "" for the package
	ended := 0
	for decoder := json.NewDecoder(stdout); ; {
		var e event
		if err := decoder.Decode(&e); err != nil {
			break
		}
		switch e.Action {
		case "output", "build-output":
			output[e.Test] = append(output[e.Test], e.Output)
		case "pass", "fail", "skip":
			if e.Test == "" {
				continue
			}
			ended++
			results[e.Test] = result{e.Action, logged(output[e.Test], e.Action == "fail")}
			delete(output, e.Test)
			fmt.Fprintf(w, "%s %s, %.1f s\n", e.Action, e.Test, e.Elapsed)
			lines := results[e.Test].output
			for _, line := range lines[:min(len(lines), shownLines)] {
				fmt.Fprintf(w, "     %s\n", line)
			}
			if more := len(lines) - shownLines; more > 0 {
				fmt.Fprintf(w, "     and %d more lines\n", more)
			}
		}
	}
	err = cmd.Wait()
	if err == nil || ended > 0 && len(output) == 1 {
		return nil // without a failure, or with that of a test
	}
	for _, lines := range output { // of tests that did not end, or did not start
		fmt.Fprint(&problems, strings.Join(lines, ""))
	}
	return fmt.Errorf("go test: %w\n%s", err, &problems)
}

var source = regexp.MustCompile(`^\s+\w+\.go:\d+: `)

// logged returns the lines that a test logged, without their place in the source. all adds its other lines.
func logged(output []string, all bool) (lines []string) {
	for _, line := range output {
		line = strings.TrimRight(line, "\n")
		if text := strings.TrimSpace(line); strings.HasPrefix(text, "=== ") || strings.HasPrefix(text, "--- ") {
			continue
		}
		if place := source.FindString(line); all || place != "" {
			lines = append(lines, strings.TrimPrefix(line, place))
		}
	}
	return lines
}

// printTable writes a row for each property, and returns the number of those that did not hold.
func printTable(w io.Writer, properties []property, results map[string]result) (failed int) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "property\tresult\ttests")
	for _, p := range properties {
		verdict, detail := p.verdict(properties, results)
		if verdict == failure {
			failed++
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", p.name, verdict, detail)
	}
	table.Flush()
	return failed
}

const (
	held    = "held"
	failure = "FAILED"
	notRun  = "not run"
)

// verdict returns whether the property held, with the number of its tests or the reasons of skipped ones.
func (p property) verdict(properties []property, results map[string]result) (verdict, detail string) {
	passed := 0
	var failures, reasons []string
	for _, test := range append(slices.Clone(p.store), p.consistency...) {
		found := false
		for name, r := range results {
			if ownerOf(name, properties) != test {
				continue
			}
			found = true
			parent, childFailed := false, false
			for other, child := range results {
				if strings.HasPrefix(other, name+"/") {
					parent, childFailed = true, childFailed || child.action == "fail"
				}
			}
			switch {
			case r.action == "fail" && !childFailed:
				failures = append(failures, name)
			case parent:
			case r.action == "skip":
				reasons = append(reasons, r.output...)
			default:
				passed++
			}
		}
		if !found {
			failures = append(failures, test+" did not run")
		}
	}
	slices.Sort(reasons)
	reason := strings.Join(slices.Compact(reasons), "; ")
	switch {
	case len(failures) > 0:
		slices.Sort(failures)
		return failure, strings.Join(failures, ", ")
	case passed == 0:
		return notRun, reason
	case reason != "":
		return held, fmt.Sprintf("%d; skipped: %s", passed, reason)
	}
	return held, fmt.Sprint(passed)
}

// ownerOf returns the test of a property to which a test belongs: itself, or the nearest parent that is listed.
func ownerOf(name string, properties []property) (owner string) {
	for _, p := range properties {
		for _, test := range append(slices.Clone(p.store), p.consistency...) {
			if (name == test || strings.HasPrefix(name, test+"/")) && len(test) > len(owner) {
				owner = test
			}
		}
	}
	return owner
}
