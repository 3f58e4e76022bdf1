package consistency

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A load calls replicas until the history has enough calls. Each number first gets concurrent
// sends and checks. Then users of that number request a code, request again if that failed, and
// type the code that arrived.
type load struct {
	fake     *dysmsapitest.Server
	replicas []string                     // addresses
	together bool                         // one client for all replicas, not one for each
	aliyun   func(*rand.Rand) aliyunFault // fault of each send; nil for none
	disturb  func()                       // injects faults; the load runs at least as long
	flawless bool                         // no call may fail, no caller gives up
}

type aliyunFault struct {
	active bool
	fault  dysmsapitest.Fault
}

const (
	minCalls          = 5000
	concurrentNumbers = 10
	flawlessNumbers   = 3 // with more, a slow machine takes longer for a call than the service waits

	minAfterDoubt    = 10 // users who type a code of an unknown send
	callersPerNumber = 4
	callsPerCaller   = 20
	flowsPerNumber   = 3
	keysPerNumber    = 3                // idempotency keys
	loadTimeout      = 4 * time.Minute  // a busy machine is slow
	callTimeout      = 15 * time.Second // longer than any call of the service
	settleTimeout    = 30 * time.Second // for a call that must succeed in the end
)

// A history records the calls of a load.
type history struct {
	seed      uint64
	began     time.Time
	numbers   map[string]*number // by the number as Aliyun gets it
	violation []string
	completed []completedCall

	flows      atomic.Int64 // users who typed a code that had to be valid
	afterDoubt atomic.Int64 // of these, users whose send had an unknown outcome
	failures   atomic.Int64 // calls that definitely had no effect

	mu sync.Mutex
}

// A completedCall is a call that succeeded.
type completedCall struct {
	replica int
	at      time.Duration // since the load began
}

// A number is the part of the history of one phone number.
type number struct {
	text      string
	mu        sync.Mutex
	sends     []*send
	checks    []porcupine.Operation
	arrived   []arrival // codes, in the order of arrival
	keyed     [keysPerNumber]*send
	abandoned bool // a caller gave up on a send that may still run
}

type arrival struct {
	code    string
	context int
}

// A send is one call of SendSMS, or all calls with one idempotency key.
type send struct {
	signName   string // unique
	key        string // "" for none
	context    int
	calls      int
	client     int
	begun, end int64 // since the load began
	outcome    outcome
	replica    string
	codes      []string // accepted by the fake gateway: one at most, also for a key
	unsent     string   // code that reached the fake gateway, which sent no SMS
}

type outcome int

const (
	accepted    outcome = iota
	noEffect            // definitely not sent, or not counted
	inDoubt             // the service returned an unknown outcome
	mayStillRun         // no reply of the service, or it still works on the call
)

// seedOf returns TEST_SEED, or a new seed. The seed determines the calls, their order and
// Aliyun's faults. The interleaving depends on the machine.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("TEST_SEED")
	if text == "" {
		return rand.Uint64()
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("got TEST_SEED %q; want a whole number", text)
	}
	return seed
}

// run runs the load and returns its history.
func (l load) run(t *testing.T) *history {
	t.Helper()
	h := &history{seed: seedOf(t), began: time.Now(), numbers: map[string]*number{}}
	l.fake.OnAccepted(h.arrive)
	defer l.fake.OnAccepted(func(dysmsapitest.Accepted) {})
	l.fake.OnUnsent(h.recordUnsent)
	defer l.fake.OnUnsent(func(_, _, _ string) {})
	clients := l.dial(t)
	ctx, cancel := context.WithTimeout(t.Context(), loadTimeout)
	defer cancel()

	var over atomic.Bool
	var working sync.WaitGroup
	var serial, calls atomic.Int64
	serial.Store(int64(h.seed % 90_000_000)) // other numbers than other loads
	concurrent := concurrentNumbers
	if l.flawless {
		concurrent = flawlessNumbers
	}
	for range concurrent {
		working.Go(func() {
			for !over.Load() {
				i := serial.Add(1)
				d := &driver{load: l, history: h, clients: clients, number: h.number(int(i)), random: rand.New(rand.NewPCG(h.seed, uint64(i)))}
				calls.Add(d.drive(ctx))
				if ctx.Err() != nil {
					return
				}
			}
		})
	}
	if l.disturb != nil {
		l.disturb()
	}
	for ctx.Err() == nil && calls.Load() < minCalls {
		time.Sleep(10 * time.Millisecond)
	}
	over.Store(true)
	working.Wait()
	if ctx.Err() != nil {
		t.Fatalf("seed %d: got %d calls within %[4]v; want %[3]d", h.seed, calls.Load(), minCalls, loadTimeout)
	}
	t.Logf("%d calls on %d numbers in %.1f s, %d without effect, %d in doubt; %d users typed a code that had to be valid, %d of them after a send of unknown outcome (seed %d)",
		calls.Load(), len(h.numbers), time.Since(h.began).Seconds(), h.failures.Load(), h.doubts(), h.flows.Load(), h.afterDoubt.Load(), h.seed)
	if n := h.afterDoubt.Load(); l.aliyun != nil && n < minAfterDoubt {
		h.violated("got %d users who typed a code of a send of unknown outcome; want %d at least for a useful test", n, minAfterDoubt)
	}
	return h
}

// waitForProgress waits until the load has made 100 more requests to Aliyun.
func (l load) waitForProgress(t *testing.T) {
	t.Helper()
	n := l.fake.Requests() + 100
	testutil.Eventually(t, "100 more requests at Aliyun", func() bool { return l.fake.Requests() >= n })
}

// dial returns one client for each replica, or one for all. They reconnect quickly.
func (l load) dial(t *testing.T) []pb.PhoneNumberServiceClient {
	t.Helper()
	targets := l.replicas
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
			BaseDelay: 20 * time.Millisecond, Multiplier: 1.5,
			MaxDelay: 100 * time.Millisecond,
		}}),
	}
	if l.together {
		targets = []string{"both:///"}
		options = []grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(allReplicas(l.replicas)),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
		}
	}
	var clients []pb.PhoneNumberServiceClient
	for _, target := range targets {
		conn, err := grpc.NewClient(target, options...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		clients = append(clients, pb.NewPhoneNumberServiceClient(conn))
	}
	return clients
}

func (h *history) now() int64 { return int64(time.Since(h.began)) }

func (h *history) number(i int) *number {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := &number{text: fmt.Sprintf("186%08d", i)}
	h.numbers[n.text] = n
	return n
}

// arrive records an SMS at the phone. It may come before SendSMS returns.
func (h *history) arrive(m dysmsapitest.Accepted) {
	h.record(m.PhoneNumber, m.SignName, func(n *number, s *send) {
		n.arrived = append(n.arrived, arrival{m.Code, s.context})
		s.codes = append(s.codes, m.Code)
	})
}

// recordUnsent records a code that reached the gateway, and no phone.
func (h *history) recordUnsent(phoneNumber, signName, code string) {
	h.record(phoneNumber, signName, func(_ *number, s *send) { s.unsent = code })
}

// record calls f with the number and the send of a message, unless it is of an earlier load.
func (h *history) record(phoneNumber, signName string, f func(*number, *send)) {
	h.mu.Lock()
	n := h.numbers[phoneNumber]
	h.mu.Unlock()
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	f(n, n.sends[slices.IndexFunc(n.sends, func(s *send) bool { return s.signName == signName })])
}

func (h *history) violated(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.violation = append(h.violation, fmt.Sprintf("seed %d: ", h.seed)+fmt.Sprintf(format, args...))
}

// expected are the codes besides OK that calls with valid fields may return.
var expected = []codes.Code{
	codes.Unavailable, codes.Unknown, codes.DeadlineExceeded, codes.Aborted, codes.ResourceExhausted, codes.FailedPrecondition,
	codes.InvalidArgument, codes.Canceled,
}

// outcomeOf classifies an error as docs/errors.md describes for callers. An error without a reason
// is from the gRPC library of the client, not from the service. Such an error means that the call
// had no effect only if there was no connection.
func outcomeOf(err error) outcome {
	s := status.Convert(err)
	var reason string
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			reason = info.Reason
		}
	}
	fromService := reason != ""
	switch {
	case err == nil:
		return accepted
	case reason == "SENT_NOT_CONFIRMED": // continues in the background; then older codes are dead
		return mayStillRun
	case !fromService && s.Code() == codes.Unavailable && strings.Contains(s.Message(), "while dialing"):
		return noEffect
	case !fromService || s.Code() == codes.Canceled:
		return mayStillRun
	case s.Code() == codes.Unknown || s.Code() == codes.DeadlineExceeded:
		return inDoubt
	}
	return noEffect
}

func (h *history) doubts() (n int) {
	for _, number := range h.numbers {
		for _, s := range number.sends {
			if s.outcome == inDoubt || s.outcome == mayStillRun {
				n++
			}
		}
		for _, o := range number.checks {
			if o.Output == noResult {
				n++
			}
		}
	}
	return n
}

// operations returns the calls of a number that may have had an effect.
//
// A send without an SMS has a live code too: while it is in flight, and longer if its outcome is
// unknown or its withdraw is delayed. No caller knows this code, so nearly always the send has no
// effect, and is left out. But six digits repeat: if a caller typed the same code, the send is an
// operation that takes effect at any time after its begin, or never.
func (n *number) operations() []porcupine.Operation {
	n.mu.Lock()
	defer n.mu.Unlock()
	operations := slices.Clone(n.checks)
	for _, s := range n.sends {
		code := s.unsent
		if len(s.codes) > 0 {
			code = s.codes[0]
		} else if code == "" || !slices.ContainsFunc(n.checks, func(o porcupine.Operation) bool { return o.Input.(call).code == code }) {
			continue
		}
		o := porcupine.Operation{
			ClientId: s.client, Input: call{send: true, code: code, context: s.context}, Call: s.begun, Output: done, Return: s.end,
			Metadata: s.replica,
		}
		if s.outcome != accepted {
			o.Output, o.Return = noResult, never
		}
		operations = append(operations, o)
	}
	return operations
}

// violations checks the history and returns its violations: every number's calls are linearizable,
// no call and no key sent two SMS, and no call without effect sent one. The load has already added dead SMS.
func (h *history) violations(t *testing.T) []string {
	t.Helper()
	var checking sync.WaitGroup
	slots := make(chan struct{}, 2)
	for _, n := range h.numbers {
		for _, s := range n.sends {
			switch {
			case len(s.codes) > 1:
				h.violated("%d SMS for one call on %s, its key %q", len(s.codes), n.text, s.key)
			case s.outcome == accepted && len(s.codes) == 0:
				h.violated("SendSMS to %s returned OK and sent no SMS", n.text)
			case s.outcome == noEffect && len(s.codes) > 0:
				h.violated("SendSMS to %s returned an error without effect and sent an SMS", n.text)
			}
		}
		checking.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if wrong := notLinearizable(t, n.text, n.operations(), fmt.Sprintf("seed %d", h.seed)); wrong != "" {
				h.violated("%s", wrong)
			}
		})
	}
	checking.Wait()
	return h.violation
}

// longestStall returns the longest time without a completed call on the given replicas.
func (h *history) longestStall(replicas ...int) (longest time.Duration) {
	slices.SortFunc(h.completed, func(a, b completedCall) int { return cmp.Compare(a.at, b.at) })
	var last time.Duration
	for _, a := range h.completed {
		if slices.Contains(replicas, a.replica) {
			longest, last = max(longest, a.at-last), a.at
		}
	}
	return longest
}
