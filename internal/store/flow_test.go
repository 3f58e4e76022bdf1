package store_test

import (
	"fmt"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A send without an older code, and the check of its code, write two rows: the code before the
// SMS, and its use before true.
func TestVerifier_FirstFlowWritesTwoRows(t *testing.T) {
	server := mysqltest.Start(t)
	var code string
	v := newVerifier(open(t, server.DSN(mysqltest.Database)), func(m verify.Message) error { code = m.Code; return nil })
	admin := server.Open(t)
	written := func() (rows int) {
		t.Helper()
		for _, name := range []string{"Handler_write", "Handler_update"} {
			var n int
			if err := admin.QueryRow("SHOW GLOBAL STATUS LIKE '"+name+"'").Scan(&name, &n); err != nil {
				t.Fatal(err)
			}
			rows += n
		}
		return rows
	}
	first := written()
	second := written() // the status itself may count
	const flows = 20
	for i := range flows {
		n := verify.Number(fmt.Sprintf("+86186%08d", i))
		if _, err := v.Send(t.Context(), n, "", ""); err != nil {
			t.Fatal(err)
		}
		if valid, err := isValid(t.Context(), v, n, code); !valid || err != nil {
			t.Fatalf("Check = %v, %v; want true", valid, err)
		}
	}
	v.Wait(t.Context())
	if got := written() - second - (second - first); got != 2*flows {
		t.Errorf("got %d rows written by %d flows; want %d", got, flows, 2*flows)
	}
}
