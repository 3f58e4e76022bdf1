package consistency

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestValid_ParallelGuessesGetThreeAttempts(t *testing.T) { testGuarantee(t, parallelGuesses) }

// Parallel guesses get no more attempts than sequential ones. A service that compares first and
// counts later is linearizable too: only the rate of successful guesses shows that a code is
// compared too often.
func parallelGuesses(t *testing.T, program string) (violations []string) {
	p := startPair(t, program, mysqltest.DSN(t))
	const (
		rounds  = 150
		guesses = 60
		// With three attempts, one round in 20 succeeds: 7.5 of 150. 30 or more succeed in
		// less than one run of 10⁹.
		tooMany = 30
	)
	successes := 0
	for round := range rounds {
		number := fmt.Sprintf("187%08d", round)
		code := p.send(t, number)
		guess := make([]string, guesses)
		for i := range guess {
			guess[i] = fmt.Sprintf("x%05d", i)
		}
		guess[rand.N(guesses)] = code
		if p.countValid(t, number, guess) > 0 {
			successes++
		}
	}
	t.Logf("%d of %d rounds of %d parallel guesses, one of them right, succeeded; %d are expected", successes, rounds, guesses, rounds*attemptLimit/guesses)
	if successes >= tooMany {
		violations = append(violations, fmt.Sprintf("%d of %d rounds succeeded: a code was compared with more than %d attempts", successes, rounds, attemptLimit))
	}

	for round := range 20 {
		number := fmt.Sprintf("188%08d", round)
		if n := p.countValid(t, number, slices.Repeat([]string{p.send(t, number)}, 64)); n != 1 {
			violations = append(violations, fmt.Sprintf("64 right guesses at once: got %d accepted; want 1", n))
		}
		p.send(t, number)
		p.countValid(t, number, slices.Repeat([]string{"x"}, 64))
		if p.countValid(t, number, []string{p.code(number)}) != 0 {
			violations = append(violations, "64 wrong guesses at once: got the code accepted; want it dead")
		}
	}
	return violations
}

// send calls SendSMS on one of the replicas and returns the code.
func (p *pair) send(t *testing.T, number string) string {
	t.Helper()
	if _, err := p.replicas[rand.N(2)].SendSMS(t.Context(),
		&pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
		t.Fatalf("SendSMS: %v", err)
	}
	return p.code(number)
}

// code returns the newest code that arrived.
func (p *pair) code(number string) (code string) {
	for _, m := range p.fake.Accepted() {
		if m.PhoneNumber == number {
			code = m.Code
		}
	}
	return code
}

// countValid calls Valid for all codes at once, over both replicas, and counts the valid ones.
func (p *pair) countValid(t *testing.T, number string, codes []string) int {
	t.Helper()
	var calling sync.WaitGroup
	var valid atomic.Int64
	for i, code := range codes {
		calling.Go(func() {
			res, err := p.replicas[i%2].Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
			if err != nil {
				t.Errorf("Valid: got %v; want nil", err)
			}
			if res.GetValid() {
				valid.Add(1)
			}
		})
	}
	calling.Wait()
	return int(valid.Load())
}
