package consistency

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/Shopify/toxiproxy/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A lossy has two replicas. The swaps of the first one are applied, but their replies are lost.
// The second one has no faults.
type lossy struct {
	pair
	proxy *toxiproxy.Proxy
	db    *sql.DB
}

func startLossy(t *testing.T, program string) *lossy {
	t.Helper()
	dsn := mysqltest.DSN(t)
	l := &lossy{pair: pair{fake: dysmsapitest.New(t)}}
	var viaProxy string
	l.proxy, viaProxy = startProxy(t, dsn)
	for i, dsn := range []string{viaProxy, dsn} {
		l.replicas[i] = servicetest.Start(t, program, servicetest.FreeAddress(t), servicetest.Environment(l.fake, dsn)).Serving(t)
	}
	var err error
	if l.db, err = sql.Open("mysql", dsn); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.db.Close() })
	if _, counted := serverStatus(t, l.db, rowLockWaits); !counted {
		t.Skip("needs a server that counts the statements that wait for a row (" + rowLockWaits + ")")
	}
	return l
}

// lose makes the call over the first replica, and returns after its swap is applied and the
// reply is lost. cut then closes the connection to the database, and returns when the call is
// complete.
func (l *lossy) lose(t *testing.T, number string, call func(*servicetest.Process)) (cut func()) {
	t.Helper()
	// A lock of the row lets reads pass, but no swap.
	holder, err := l.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Rollback()
	before := l.row(t, holder, number, " FOR UPDATE")
	completed := make(chan struct{})
	go func() {
		defer close(completed)
		call(l.replicas[0])
	}()
	waitForRowLocks(t, l.db, 1)
	if _, err := l.proxy.Toxics.AddToxicJson(strings.NewReader(`{"name":"deaf","type":"timeout","stream":"downstream","attributes":{"timeout":0}}`)); err != nil {
		t.Fatal(err)
	}
	if err := holder.Rollback(); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "the swap is applied", func() bool { return !bytes.Equal(before, l.row(t, l.db, number, "")) })
	return func() {
		l.proxy.Stop() // ends the connections
		l.proxy.Toxics.ResetToxics(context.Background())
		if err := l.proxy.Start(); err != nil {
			t.Error(err)
		}
		<-completed
	}
}

// row returns the stored state of a number.
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

func TestSwap_LostReplyTakesEffectOnce(t *testing.T) { testGuarantee(t, lostReplies) }

func lostReplies(t *testing.T, program string) (violations []string) {
	l := startLossy(t, program)
	expect := func(violation string, ok bool) {
		if !ok {
			violations = append(violations, violation)
		}
	}
	check := func(number, code string, valid *bool) func(*servicetest.Process) {
		return func(p *servicetest.Process) {
			res, err := p.Valid(context.Background(), &pb.ValidRequest{PhoneNumber: number, Code: code})
			expect(fmt.Sprintf("Valid with a lost reply of the database: got %v; want nil, found by the version", err), err == nil)
			*valid = res.GetValid()
		}
	}
	var valid bool

	const used = "18700000001"
	code := l.send(t, used)
	l.lose(t, used, check(used, code, &valid))()
	expect("the right code, used up by a swap with a lost reply: got false; want true", valid)
	expect("the code was accepted again", l.countValid(t, used, []string{code}) == 0)

	const tried = "18700000002"
	code = l.send(t, tried)
	l.lose(t, tried, check(tried, "x", &valid))()
	expect("a wrong code was accepted", !valid)
	l.countValid(t, tried, []string{"x"})
	expect("an attempt with a lost reply was counted twice: the third call found the code dead", l.countValid(t, tried, []string{code}) == 1)

	const overtaken = "18700000006"
	code = l.send(t, overtaken)
	var err error
	cut := l.lose(t, overtaken, func(p *servicetest.Process) {
		_, err = p.Valid(context.Background(), &pb.ValidRequest{PhoneNumber: overtaken, Code: "x"})
	})
	l.useAttempt(t, overtaken)
	cut()
	expect(fmt.Sprintf("Valid with a lost reply and an overwritten version: got %v; want UNKNOWN", err), status.Code(err) == codes.Unknown)
	expect("an attempt with a lost reply was counted again after another attempt: the third call found the code dead", l.countValid(t, overtaken, []string{code}) == 1)

	const sent = "18700000003"
	l.send(t, sent)
	before := len(l.fake.Accepted())
	l.lose(t, sent, func(p *servicetest.Process) {
		_, err := p.SendSMS(context.Background(), &pb.SendSMSRequest{PhoneNumber: sent, Signature: "阿里云", TemplateCode: "SMS_1"})
		expect(fmt.Sprintf("SendSMS with a lost reply to its begin: got %v; want OK", err), err == nil)
	})()
	got := len(l.fake.Accepted()) - before
	expect(fmt.Sprintf("got %d SMS for one call; want 1", got), got == 1)
	expect("the code of a send with a lost reply to its begin was rejected", l.countValid(t, sent, []string{l.code(sent)}) == 1)
	return violations
}

func TestSendSMS_RepeatedBeginUsesAFreshCode(t *testing.T) { testGuarantee(t, freshCodes) }

// The reply to a begin is lost, and other calls use up all attempts of its code. The code must not
// get attempts again.
func freshCodes(t *testing.T, program string) (violations []string) {
	l := startLossy(t, program)
	const number = "18700000004"
	l.send(t, number)
	var sendErr error
	cut := l.lose(t, number, func(p *servicetest.Process) {
		_, sendErr = p.SendSMS(context.Background(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"})
	})
	first := newestMAC(t, l.row(t, l.db, number, ""))
	for range attemptLimit {
		l.useAttempt(t, number)
	}
	cut()
	if sendErr != nil {
		return []string{fmt.Sprintf("SendSMS: got %v; want OK", sendErr)}
	}
	if bytes.Equal(first, newestMAC(t, l.row(t, l.db, number, ""))) {
		violations = append(violations, "a code without attempts left was stored again")
	}
	if l.countValid(t, number, []string{l.code(number)}) != 1 {
		violations = append(violations, "the sent code was rejected")
	}
	return violations
}

func TestSendSMS_TwoFirstSendsAtOnceLeaveOneCode(t *testing.T) { testGuarantee(t, twoFirstSends) }

// Two sends load a number without a code. The swap of one conflicts. Both return OK: only the code
// of the later one is live.
func twoFirstSends(t *testing.T, binary string) (violations []string) {
	l := startLossy(t, binary)
	for round := range 5 {
		number := fmt.Sprintf("1870020%04d", round)
		l.countValid(t, number, []string{l.send(t, number)})
		before := len(l.fake.Accepted())
		holder, err := l.db.Begin() // both load, and wait to swap
		if err != nil {
			t.Fatal(err)
		}
		l.row(t, holder, number, " FOR UPDATE")
		var sending sync.WaitGroup
		for _, replica := range l.replicas {
			sending.Go(func() {
				request := &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"}
				if _, err := replica.SendSMS(t.Context(), request); err != nil {
					t.Errorf("SendSMS: got %v; want OK", err)
				}
			})
		}
		waitForRowLocks(t, l.db, 2)
		if err := holder.Rollback(); err != nil {
			t.Fatal(err)
		}
		sending.Wait()
		sent := l.fake.Accepted()[before:]
		if len(sent) != 2 {
			t.Fatalf("got %d SMS; want 2", len(sent))
		}
		if older := l.countValid(t, number, []string{sent[0].Code}); older+l.countValid(t, number, []string{sent[1].Code}) != 1 {
			violations = append(violations, "the codes of two sends that returned OK were both accepted")
		}
	}
	return violations
}

const rowLockWaits = "Innodb_row_lock_current_waits"

// waitForRowLocks waits until a number of statements wait for a row.
func waitForRowLocks(t *testing.T, db *sql.DB, want int) {
	t.Helper()
	testutil.Eventually(t, fmt.Sprint("statements that wait for a row: ", want), func() bool {
		n, _ := serverStatus(t, db, rowLockWaits)
		return n >= want
	})
}

// useAttempt uses up one attempt with a wrong code, over the replica without faults.
func (l *lossy) useAttempt(t *testing.T, number string) {
	t.Helper()
	if _, err := l.replicas[1].Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: "x"}); err != nil {
		t.Fatal(err)
	}
}

// newestMAC reads the last code of a stored state: see internal/verify/state.go.
func newestMAC(t *testing.T, state []byte) []byte {
	t.Helper()
	const header, sendID, mac, perCode = 10, 8, 32, 49
	codes := int(state[header-1])
	if codes == 0 || len(state) < header+codes*perCode || state[0] != 1 {
		t.Fatalf("got a state of %d bytes in format %d with %d codes; want a whole one in format 1 with a code", len(state), state[0], codes)
	}
	return state[header+(codes-1)*perCode+sendID:][:mac]
}

func TestValid_AcceptsACodeSentByAnotherReplica(t *testing.T) { testGuarantee(t, codeOfOtherReplica) }

func codeOfOtherReplica(t *testing.T, program string) (violations []string) {
	p := startPair(t, program, mysqltest.DSN(t))
	const number = "18700000005"
	for range 10 {
		code := p.send(t, number)
		if p.countValid(t, number, []string{code, "x"}) != 1 || p.countValid(t, number, []string{code, code}) != 0 { // over both replicas
			violations = append(violations, "a code was not accepted exactly once")
		}
	}
	return violations
}

func TestSendSMS_UsualRetryKillsNoSMS(t *testing.T) { testGuarantee(t, usualRetry) }

// The first SMS arrives, but its caller gets an unknown outcome. Aliyun rejects the user's second
// send by the limit of one a minute. The code that arrived must be accepted.
func usualRetry(t *testing.T, program string) (violations []string) {
	p := startPair(t, program, mysqltest.DSN(t), shortSMSTimeout)
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
		if p.countValid(t, number, []string{p.code(number)}) != 1 {
			violations = append(violations, fmt.Sprintf("a dead SMS: its code was rejected after %v and a rejected retry", c.want))
		}
	}
	return violations
}
