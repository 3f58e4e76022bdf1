package prove

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"strings"
	"testing"

	"github.com/Shopify/toxiproxy/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A lossy is a replica whose swaps are done while their answers get lost, beside
// another one for which all is well.
type lossy struct {
	pair
	proxy *toxiproxy.Proxy
	db    *sql.DB
}

func startLossy(t *testing.T, binary string) *lossy {
	t.Helper()
	dsn := mariadbtest.DSN(t)
	l := &lossy{pair: pair{fake: dysmsapitest.New(t)}}
	var behind string
	l.proxy, behind = proxied(t, dsn)
	for i, dsn := range []string{behind, dsn} {
		l.replicas[i] = servicetest.Start(t, binary, servicetest.FreeAddress(t), servicetest.Environment(l.fake, dsn)).Serving(t)
	}
	var err error
	if l.db, err = sql.Open("mysql", dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.db.Close() })
	return l
}

// lose makes the call, over the lossy replica, and returns once its swap is done
// in the database and the answer to it is lost. cut then tells the replica so, and
// returns when the call was answered.
func (l *lossy) lose(t *testing.T, number string, call func(*servicetest.Process)) (cut func()) {
	t.Helper()
	// Whoever holds the row lets reads pass, and no swap.
	holder, err := l.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Rollback()
	before := l.row(t, holder, number, " FOR UPDATE")
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		call(l.replicas[0])
	}()
	waitFor(t, "the swap waits for the row", func() bool {
		var name string
		var n int
		err := l.db.QueryRow("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'").Scan(&name, &n)
		return err == nil && n > 0
	})
	if _, err := l.proxy.Toxics.AddToxicJson(strings.NewReader(`{"name":"deaf","type":"timeout","stream":"downstream","attributes":{"timeout":0}}`)); err != nil {
		t.Fatal(err)
	}
	if err := holder.Rollback(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the swap is done", func() bool { return !bytes.Equal(before, l.row(t, l.db, number, "")) })
	return func() {
		l.proxy.Stop() // ends the connections
		l.proxy.Toxics.ResetToxics(context.Background())
		if err := l.proxy.Start(); err != nil {
			t.Error(err)
		}
		<-answered
	}
}

// row is the stored state of a number.
func (l *lossy) row(t *testing.T, q interface {
	QueryRow(string, ...any) *sql.Row
}, number, locking string,
) (state []byte) {
	t.Helper()
	if err := q.QueryRow("SELECT state FROM phone_numbers WHERE phone_number = ?"+locking, "+86"+number).Scan(&state); err != nil {
		t.Fatal(err)
	}
	return state
}

func TestSwap_LostReplyTakesEffectOnce(t *testing.T) { prove(t, lostAnswers) }

func lostAnswers(t *testing.T, binary string) (violations []string) {
	l := startLossy(t, binary)
	expect := func(what string, ok bool) {
		if !ok {
			violations = append(violations, what)
		}
	}
	ask := func(number, code string, valid *bool) func(*servicetest.Process) {
		return func(p *servicetest.Process) {
			res, err := p.Valid(context.Background(), &pb.ValidRequest{PhoneNumber: number, Code: code})
			expect(fmt.Sprintf("Valid whose answer from the database was lost: %v; want an answer, found by the version", err), err == nil)
			*valid = res.GetValid()
		}
	}
	var valid bool

	const used = "18700000001"
	code := l.send(t, used)
	l.lose(t, used, ask(used, code, &valid))()
	expect("the right code, used up by a swap whose answer was lost, was refused", valid)
	expect("the code was accepted again", l.accepted(t, used, []string{code}) == 0)

	const looked = "18700000002"
	code = l.send(t, looked)
	l.lose(t, looked, ask(looked, "x", &valid))()
	expect("a wrong code was accepted", !valid)
	l.accepted(t, looked, []string{"x"})
	expect("a look whose answer was lost was counted twice: the third call found the code dead", l.accepted(t, looked, []string{code}) == 1)

	const overtaken = "18700000006"
	code = l.send(t, overtaken)
	var err error
	cut := l.lose(t, overtaken, func(p *servicetest.Process) {
		_, err = p.Valid(context.Background(), &pb.ValidRequest{PhoneNumber: overtaken, Code: "x"})
	})
	l.spend(t, overtaken)
	cut()
	expect(fmt.Sprintf("Valid whose answer from the database was lost and whose version is gone: %v; want UNKNOWN", err), status.Code(err) == codes.Unknown)
	expect("a look whose answer was lost was counted again, after another one: the third call found the code dead", l.accepted(t, overtaken, []string{code}) == 1)

	const sent = "18700000003"
	l.send(t, sent)
	before := len(l.fake.Accepted())
	l.lose(t, sent, func(p *servicetest.Process) {
		_, err := p.SendSMS(context.Background(), &pb.SendSMSRequest{PhoneNumber: sent, Signature: "阿里云", TemplateCode: "SMS_1"})
		expect(fmt.Sprintf("SendSMS whose begin's answer was lost: %v; want OK", err), err == nil)
	})()
	expect("want one SMS for one call", len(l.fake.Accepted()) == before+1)
	expect("the code of a send whose begin's answer was lost is refused", l.accepted(t, sent, []string{l.code(sent)}) == 1)
	return violations
}

func TestSendSMS_RepeatedBeginUsesAFreshCode(t *testing.T) { prove(t, freshCodes) }

// A code that was begun, whose begin's answer was lost, and whose looks were spent
// meanwhile must not get looks again.
func freshCodes(t *testing.T, binary string) (violations []string) {
	l := startLossy(t, binary)
	const number = "18700000004"
	l.send(t, number)
	var sendErr error
	cut := l.lose(t, number, func(p *servicetest.Process) {
		_, sendErr = p.SendSMS(context.Background(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"})
	})
	first := newestMAC(t, l.row(t, l.db, number, ""))
	for range attemptLimit {
		l.spend(t, number)
	}
	cut()
	if sendErr != nil {
		return []string{fmt.Sprintf("SendSMS: %v", sendErr)}
	}
	if bytes.Equal(first, newestMAC(t, l.row(t, l.db, number, ""))) {
		violations = append(violations, "a code whose looks were spent was begun again")
	}
	if l.accepted(t, number, []string{l.code(number)}) != 1 {
		violations = append(violations, "the code that went out is refused")
	}
	return violations
}

// spend takes a look at the codes, over the replica for which all is well.
func (l *lossy) spend(t *testing.T, number string) {
	t.Helper()
	if _, err := l.replicas[1].Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: "x"}); err != nil {
		t.Fatal(err)
	}
}

// newestMAC reads the last code of a stored state: see internal/verify/state.go.
func newestMAC(t *testing.T, state []byte) []byte {
	t.Helper()
	const header, ticket, mac, perCode = 10, 8, 32, 49
	codes := int(state[header-1])
	if codes == 0 || len(state) < header+codes*perCode || state[0] != 1 {
		t.Fatalf("a state of %d bytes in format %d with %d codes", len(state), state[0], codes)
	}
	return state[header+(codes-1)*perCode+ticket:][:mac]
}

func TestValid_AcceptsACodeSentByAnotherReplica(t *testing.T) { prove(t, noMemory) }

func noMemory(t *testing.T, binary string) (violations []string) {
	p := startPair(t, binary, mariadbtest.DSN(t))
	const number = "18700000005"
	for range 10 {
		code := p.send(t, number)
		if p.accepted(t, number, []string{code, "x"}) != 1 || p.accepted(t, number, []string{code, code}) != 0 { // over both
			violations = append(violations, "a code is not accepted once")
		}
	}
	return violations
}

func TestSendSMS_UsualRetryKillsNoSMS(t *testing.T) { prove(t, usualRetry) }

// The first send arrives, though its caller was told that nobody knows; the
// user's second try meets the limit of one a minute; the code that arrived works.
func usualRetry(t *testing.T, binary string) (violations []string) {
	p := startPair(t, binary, mariadbtest.DSN(t), shortSMSTimeout)
	p.fake.Limits(true)
	for i, c := range []struct {
		fault dysmsapitest.Fault
		want  codes.Code
	}{
		{dysmsapitest.Hang(), codes.DeadlineExceeded},
		{dysmsapitest.CloseAfterReading(), codes.Unknown},
		{dysmsapitest.Truncated(), codes.Unknown},
		{dysmsapitest.BadGateway(), codes.Unknown},
	} {
		number := fmt.Sprintf("187001%05d", i)
		request := &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"}
		p.fake.Next(c.fault.ButAccepted())
		_, first := p.replicas[0].SendSMS(t.Context(), request)
		_, second := p.replicas[1].SendSMS(t.Context(), request)
		if status.Code(first) != c.want || status.Code(second) != codes.ResourceExhausted {
			t.Fatalf("the sends: got %v, then %v; want %v, then ResourceExhausted", first, second, c.want)
		}
		if p.accepted(t, number, []string{p.code(number)}) != 1 {
			violations = append(violations, fmt.Sprintf("a dead SMS: its code is refused after %v and a refused retry", c.want))
		}
	}
	return violations
}
