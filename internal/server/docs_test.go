package server

import (
	"os"
	"strings"
	"testing"
)

func TestEveryReasonIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	all := []answer{unclassified}
	for _, a := range ownAnswers {
		all = append(all, a.answer)
	}
	for _, a := range sendAnswers {
		all = append(all, a)
	}
	for _, a := range all {
		documented := strings.Contains(string(page), "| `"+a.reason+"` |")
		// These kinds always come with a code of Aliyun's, which is the reason then.
		always := a.reason == "SMS_LIMITED" || a.reason == "SMS_BAD_NUMBER" || a.reason == "SMS_REFUSED" || a.reason == "SMS_BAD_REQUEST"
		if documented == always {
			t.Errorf("docs/errors.md: reason %s is documented: %v; want %v", a.reason, documented, !always)
		}
	}
}
