package verify

import (
	"bytes"
	"testing"
	"testing/synctest"
)

// A rotation keeps the old key in the list until its codes have expired.
func TestReplaceKeys_AppliesToTheNextCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, accept)
		check := func(code string, want bool) {
			t.Helper()
			if got, err := isValid(t.Context(), v, testNumber, code); got != want || err != nil {
				t.Errorf("check %s: got %v, %v, want %v", code, got, err, want)
			}
		}
		newKey := bytes.Repeat([]byte{2}, minKeyBytes)
		send(v)
		v.ReplaceKeys(Keys{newKey, testKeys[0]})
		check("000001", true) // signed with the old key
		send(v)
		v.ReplaceKeys(testKeys)
		check("000002", false) // signed with the new key
		v.ReplaceKeys(Keys{newKey})
		check("000002", true)
	})
}
