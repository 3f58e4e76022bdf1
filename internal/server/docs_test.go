package server

import (
	"regexp"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const errorsPage = "../../docs/errors.md"

// allErrors returns every form of an error that callers see. Its errors of Aliyun have a reason
// that Aliyun's code can replace.
func allErrors() []publicError {
	all := []publicError{
		unclassified, overloaded, headersTooLarge, messageTooLarge, originNotAllowed, unknownEncoding, notAllowed, rateLimited, numberFull,
		unknownPath,
		{reason: "INVALID_FIELD"},
	}
	for _, a := range errorTable {
		all = append(all, a.publicError)
	}
	for _, a := range sendErrorTable {
		all = append(all, a)
	}
	return all
}

// isReplaced reports whether an error always comes with Aliyun's code, which replaces the reason.
func isReplaced(reason string) bool {
	return reason == "SMS_LIMITED" || reason == "SMS_BAD_NUMBER" || reason == "SMS_REFUSED" || reason == "SMS_BAD_REQUEST"
}

func TestErrorTable_EveryReasonIsDocumented(t *testing.T) {
	page := testutil.ReadFile(t, errorsPage)
	for _, a := range allErrors() {
		documented := strings.Contains(page, "| `"+a.reason+"` |")
		if documented == isReplaced(a.reason) {
			t.Errorf("docs/errors.md has the reason %s: got %v; want %v", a.reason, documented, !isReplaced(a.reason))
		}
	}
}

// For each reason, and for each status with a reason of Aliyun, docs/errors.md has one sentence in
// English and one in Chinese to show people. It has none for an error that does not exist.
func TestErrorTable_EveryErrorHasSentencesToShow(t *testing.T) {
	page := testutil.ReadFile(t, errorsPage)
	twin := testutil.ReadFile(t, "../../docs/zh/errors.md")
	_, section, _ := strings.Cut(page, "## What to show people\n")
	section, _, _ = strings.Cut(section, "\n## ")
	exists := map[string]bool{}
	for _, a := range allErrors() {
		if !isReplaced(a.reason) {
			exists[a.reason] = true
		}
	}
	for kind, a := range sendErrorTable {
		if kind != verify.SendTimedOut { // then Aliyun gave no code
			exists["aliyun.com: "+code.Code(a.code).String()] = true
		}
	}
	shown := map[string]bool{}
	english, chinese := regexp.MustCompile(`^[A-Z][^.]+\.$`), regexp.MustCompile(`^\p{Han}[^。a-z]+(\{wait\}[^。a-z]+)?。$`)
	for _, row := range regexp.MustCompile(`(?m)^\| (.+?) \| (.+?) \| (.+?) \|$`).FindAllStringSubmatch(section, -1)[1:] {
		if !english.MatchString(row[2]) || !chinese.MatchString(row[3]) {
			t.Errorf("%s: got %q and %q; want a sentence in English and one in Chinese", row[1], row[2], row[3])
		}
		if want := "| " + row[2] + " | " + row[3] + " |\n"; !strings.Contains(twin, want) {
			t.Errorf("docs/zh/errors.md: want the sentences %s", want)
		}
		own, ofAliyun, _ := strings.Cut(row[1], "`aliyun.com`:")
		for _, reason := range regexp.MustCompile("`([A-Z_]+)`").FindAllStringSubmatch(own, -1) {
			shown[reason[1]] = true
		}
		for _, status := range regexp.MustCompile(`\b[A-Z_]{5,}`).FindAllString(strings.Split(ofAliyun, ";")[0], -1) {
			if !strings.Contains(ofAliyun, "."+status) { // otherwise a part of one of Aliyun's codes
				shown["aliyun.com: "+status] = true
			}
		}
	}
	for e := range exists {
		if !shown[e] {
			t.Errorf("docs/errors.md, What to show people: got no row for %s; want one", e)
		}
	}
	for e := range shown {
		if !exists[e] {
			t.Errorf("docs/errors.md, What to show people: got a row for %s; want none, since there is no such error", e)
		}
	}
}
