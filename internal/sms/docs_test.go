package sms

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// errorsSection returns a section of docs/errors.md, whose heading begins with heading.
func errorsSection(t *testing.T, heading string) string {
	t.Helper()
	page := testutil.ReadFile(t, "../../docs/errors.md")
	_, section, _ := strings.Cut(page, "## "+heading)
	section, _, _ = strings.Cut(section, "\n## ")
	return section
}

// The table of Aliyun's codes in docs/errors.md gives each code the status that classify gives it.
func TestClassify_IsAsDocumented(t *testing.T) {
	kinds := map[string]verify.SendKind{
		"RESOURCE_EXHAUSTED": verify.SendLimited, "INVALID_ARGUMENT": verify.SendBadNumber, "FAILED_PRECONDITION": verify.SendRejected,
		"INTERNAL": verify.SendBadRequest, "UNAVAILABLE": verify.SendNotAttempted, "UNKNOWN": verify.SendUnknown,
	}
	documented := map[string]verify.SendKind{} // by code, or by prefix with a star
	for _, row := range regexp.MustCompile(`(?m)^\| (.*?) \| ([A-Z_]+)`).FindAllStringSubmatch(errorsSection(t, "From Aliyun"), -1) {
		for _, code := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			documented[code[1]] = kinds[row[2]]
		}
	}
	for code, want := range documented {
		if got := classify(strings.TrimSuffix(code, "*")); got != want {
			t.Errorf("docs/errors.md gives %s the status of %v; want that of %v", code, want, got)
		}
	}
	for _, row := range codeKinds {
		for prefix := range strings.FieldsSeq(row.prefixes) {
			covered := slices.ContainsFunc([]string{prefix, "isv." + prefix}, func(code string) bool {
				for pattern, kind := range documented {
					start, star := strings.CutSuffix(pattern, "*")
					if kind == row.kind && pattern != "isv.*" && (strings.HasPrefix(pattern, code) || star && strings.HasPrefix(code, start)) {
						return true
					}
				}
				return false
			})
			if !covered {
				t.Errorf("docs/errors.md has no code that begins with %s; want one with the status of %v", prefix, row.kind)
			}
		}
	}
}

// docs/errors.md has the same codes, each with the same meaning and action.
func TestMeaning_IsThatOfTheDocs(t *testing.T) {
	documented := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.+) \\| (.+) \\|$").FindAllStringSubmatch(errorsSection(t, "From carriers"), -1) {
		documented[row[1]] = true
		if meaning, action := Meaning(row[1]); meaning != row[2] || action != row[3] {
			t.Errorf("%s: docs/errors.md has %q, %q; want %q, %q", row[1], row[2], row[3], meaning, action)
		}
	}
	for code := range carrierCodes {
		if !documented[code] {
			t.Errorf("%s: docs/errors.md has no row; want one", code)
		}
	}
}
