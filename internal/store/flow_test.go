package store_test

import (
	"fmt"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A send without an older code, and the check of its code, write two rows: the code before the
// SMS, and its use before true. A context costs none. An idempotency key costs one: its outcome
// before OK. A repeated send writes none.
func TestVerifier_FlowWritesAsManyRowsAsItNeeds(t *testing.T) {
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
	status := written() - first // the status itself may count
	const flows = 20
	for i, c := range []struct {
		name, context, key string
		flow, repeated     int // rows
	}{
		{"neither", "", "", 2, 1},
		{"a context", "login", "", 2, 1},
		{"a key", "", "0123456789", 3, 0},
		{"a context and a key", "login", "0123456789", 3, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			// rows returns how many rows each flow writes with f.
			rows := func(f func(n verify.Number)) int {
				t.Helper()
				before := written()
				for flow := range flows {
					f(verify.Number(fmt.Sprintf("+86186%04d%04d", i, flow)))
				}
				return (written() - before - status) / flows
			}
			send := func(n verify.Number) {
				t.Helper()
				if _, err := v.Send(t.Context(), verify.SendRequest{Number: n, Context: c.context, IdempotencyKey: c.key}); err != nil {
					t.Fatal(err)
				}
			}
			got := rows(func(n verify.Number) {
				send(n)
				if found, err := v.Check(t.Context(), n, code, c.context); !found.Valid() || err != nil {
					t.Fatalf("Check = %v, %v; want a match", found, err)
				}
			})
			if got != c.flow {
				t.Errorf("got %d rows written by a flow; want %d", got, c.flow)
			}
			if got := rows(send); got != c.repeated {
				t.Errorf("got %d rows written by one more send; want %d", got, c.repeated)
			}
		})
	}
	v.Wait(t.Context())
}
