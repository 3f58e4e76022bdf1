package prove

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestValid_ParallelGuessesGetThreeAttempts(t *testing.T) { prove(t, parallelGuesses) }

// Whoever guesses in parallel gets no more looks than one who guesses in turn. A
// service that compares first and counts later is linearizable all the same: that
// nobody's call is looked at too often shows only in how often guessing succeeds.
func parallelGuesses(t *testing.T, binary string) (violations []string) {
	p := startPair(t, binary, mariadbtest.DSN(t))
	const (
		rounds  = 150
		guesses = 60
		// A fair service lets 1 guess in 20 be right: 7.5 rounds of 150, and 30 or
		// more in less than one run of 10⁹.
		tooMany = 30
	)
	wins := 0
	for round := range rounds {
		number := fmt.Sprintf("187%08d", round)
		code := p.send(t, number)
		guess := make([]string, guesses)
		for i := range guess {
			guess[i] = fmt.Sprintf("x%05d", i)
		}
		guess[rand.N(guesses)] = code
		if p.accepted(t, number, guess) > 0 {
			wins++
		}
	}
	t.Logf("%d of %d rounds were won by %d parallel guesses, one of them right; %d are fair", wins, rounds, guesses, rounds*attemptLimit/guesses)
	if wins >= tooMany {
		violations = append(violations, fmt.Sprintf("%d of %d rounds were won: more than %d looks were taken", wins, rounds, attemptLimit))
	}

	for round := range 20 {
		number := fmt.Sprintf("188%08d", round)
		if n := p.accepted(t, number, slices.Repeat([]string{p.send(t, number)}, 64)); n != 1 {
			violations = append(violations, fmt.Sprintf("64 right guesses at once: %d won", n))
		}
		p.send(t, number)
		p.accepted(t, number, slices.Repeat([]string{"x"}, 64))
		if p.accepted(t, number, []string{p.code(number)}) != 0 {
			violations = append(violations, "64 wrong guesses at once left the code alive")
		}
	}
	return violations
}

// send sends through one of the replicas and returns the code.
func (p *pair) send(t *testing.T, number string) string {
	t.Helper()
	if _, err := p.replicas[rand.N(2)].SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: number, Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
		t.Fatalf("SendSMS: %v", err)
	}
	return p.code(number)
}

// code is the newest that arrived.
func (p *pair) code(number string) (code string) {
	for _, m := range p.fake.Accepted() {
		if m.PhoneNumber == number {
			code = m.Code
		}
	}
	return code
}

// accepted asks for all codes at once, over both replicas, and counts those that
// were right.
func (p *pair) accepted(t *testing.T, number string, codes []string) int {
	t.Helper()
	var asking sync.WaitGroup
	var right atomic.Int64
	for i, code := range codes {
		asking.Go(func() {
			res, err := p.replicas[i%2].Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
			if err != nil {
				t.Errorf("Valid: %v", err)
			}
			if res.GetValid() {
				right.Add(1)
			}
		})
	}
	asking.Wait()
	return int(right.Load())
}
