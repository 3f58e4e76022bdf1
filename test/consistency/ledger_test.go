package consistency

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A ledger records the results of calls on numbers that one caller uses once. After a fault the
// test checks that the database still has each of them.
type ledger struct {
	fake    *dysmsapitest.Server
	codes   sync.Map // from number to the code that arrived
	serial  atomic.Int64
	mu      sync.Mutex
	entries []entry
}

// An entry is a number whose calls all succeeded.
type entry struct {
	number, code string
	live         bool // otherwise the code was used, or its attempts were
}

const writers = 16

func newLedger(fake *dysmsapitest.Server) *ledger {
	l := &ledger{fake: fake}
	fake.OnAccepted(func(m dysmsapitest.Accepted) { l.codes.Store(m.PhoneNumber, m.Code) })
	return l
}

func (l *ledger) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.entries)
}

// grow waits for n more entries.
func (l *ledger) grow(t *testing.T, n int) {
	t.Helper()
	n += l.len()
	testutil.Eventually(t, fmt.Sprintf("%d entries", n), func() bool { return l.len() >= n })
}

// write adds entries to the ledger while disturb injects faults.
func (l *ledger) write(t *testing.T, replicas []string, disturb func()) {
	t.Helper()
	clients := load{replicas: replicas}.dial(t)
	ctx, cancel := context.WithCancel(t.Context())
	var writing sync.WaitGroup
	for range writers {
		writing.Go(func() {
			for ctx.Err() == nil {
				e, err := l.newEntry(ctx, clients[rand.N(len(clients))])
				if err != nil {
					time.Sleep(5 * time.Millisecond) // a caller that waits before it retries
					continue
				}
				l.mu.Lock()
				l.entries = append(l.entries, e)
				l.mu.Unlock()
			}
		})
	}
	disturb()
	cancel()
	writing.Wait()
}

// newEntry sends to a new number. Then it leaves the code live, uses it, or uses up its attempts.
func (l *ledger) newEntry(ctx context.Context, client pb.PhoneNumberServiceClient) (entry, error) {
	e := entry{number: fmt.Sprintf("185%08d", l.serial.Add(1))}
	if _, err := client.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: e.number, Signature: "阿里云", TemplateCode: "SMS_1"}); err != nil {
		return e, err
	}
	code, _ := l.codes.Load(e.number)
	e.code = code.(string)
	var typed []string
	switch rand.N(3) {
	case 0:
		e.live = true
	case 1:
		typed = []string{e.code}
	case 2:
		typed = []string{"x", "x", "x"}
	}
	for _, code := range typed {
		if _, err := client.Valid(ctx, &pb.ValidRequest{PhoneNumber: e.number, Code: code}); err != nil {
			return e, err
		}
	}
	return e, nil
}

// lost checks the code of every entry and returns those that differ from the ledger.
func (l *ledger) lost(t *testing.T, replica string) (violations []string) {
	t.Helper()
	client := load{replicas: []string{replica}}.dial(t)[0]
	var checking sync.WaitGroup
	var next atomic.Int64
	for range writers {
		checking.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(l.entries)); i = next.Add(1) - 1 {
				e := l.entries[i]
				res, err := client.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: e.number, Code: e.code}, grpc.WaitForReady(true))
				if err != nil {
					t.Errorf("Valid: got %v; want nil", err)
					return
				}
				if res.Valid == e.live {
					continue
				}
				l.mu.Lock()
				violations = append(violations, fmt.Sprintf("lost: the code of %s: got valid %v; want %v", e.number, res.Valid, e.live))
				l.mu.Unlock()
			}
		})
	}
	checking.Wait()
	t.Logf("%d of %d entries were lost", len(violations), len(l.entries))
	return violations
}
