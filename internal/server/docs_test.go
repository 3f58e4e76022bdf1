package server

import (
	"os"
	"strings"
	"testing"
)

func TestErrorTable_EveryReasonIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	all := []publicError{
		unclassified, overloaded, headersTooLarge, messageTooLarge, originNotAllowed, unknownEncoding, notAllowed, rateLimited, unknownPath,
	}
	for _, a := range errorTable {
		all = append(all, a.publicError)
	}
	for _, a := range sendErrorTable {
		all = append(all, a)
	}
	for _, a := range all {
		documented := strings.Contains(string(page), "| `"+a.reason+"` |")
		// These errors always come with Aliyun's code, which replaces the reason.
		isReplaced := a.reason == "SMS_LIMITED" || a.reason == "SMS_BAD_NUMBER" || a.reason == "SMS_REFUSED" || a.reason == "SMS_BAD_REQUEST"
		if documented == isReplaced {
			t.Errorf("docs/errors.md has the reason %s: got %v; want %v", a.reason, documented, !isReplaced)
		}
	}
}
