package prove

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
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A load is what drives replicas until there is enough of a history. Every number
// is first the scene of concurrent sends and checks, then of users who behave:
// ask for a code, ask again when that failed, type what arrived.
type load struct {
	fake     *dysmsapitest.Server
	replicas []string                     // addresses
	together bool                         // one client knows all replicas, instead of one a replica
	aliyun   func(*rand.Rand) aliyunFault // what a send meets there; nil for nothing
	disturb  func()                       // breaks things beside the load, which goes on until it is over
	flawless bool                         // no call may fail, and no caller gives up
}

type aliyunFault struct {
	strikes bool
	fault   dysmsapitest.Fault
}

const (
	minimumCalls   = 5000
	numbersAtATime = 10

	minimumAfterDoubt = 10 // users who type a code though nobody knows what became of its send
	callersANumber    = 4
	callsACaller      = 20
	flowsANumber      = 3
	loadPatience      = 2 * time.Minute
	callDeadline      = 15 * time.Second // longer than the service takes for anything
	settlePatience    = 30 * time.Second // for a call that has to be answered in the end
)

// A history is what a load saw.
type history struct {
	seed      uint64
	began     time.Time
	numbers   map[string]*number // by the form in which Aliyun is asked
	violation []string
	answers   []answered // of the replicas

	flows      atomic.Int64 // users who typed a code that had to be right
	afterDoubt atomic.Int64 // of them: the outcome of its send was not known to the caller
	failures   atomic.Int64 // calls that surely had no effect

	mu sync.Mutex
}

// answered is a call that a replica answered in full.
type answered struct {
	replica int
	at      time.Duration // since the load began
}

// A number's part of the history.
type number struct {
	text    string
	mu      sync.Mutex
	sends   []*send
	checks  []porcupine.Operation
	arrived []string // codes, as the phone got them
	left    bool     // a caller gave up on a send that may still go on
}

// A send is one call of SendSMS.
type send struct {
	signName   string // its own
	client     int
	begun, end int64 // since the load began
	outcome    outcome
	replica    string
	codes      []string // that the fake accepted for it: one at most
}

type outcome int

const (
	accepted   outcome = iota
	noEffect           // surely not sent, or surely not counted
	inDoubt            // the service says that it may have happened
	outOfSight         // it may yet succeed: nobody said anything, or the service is still at it
)

// seedOf is PROVE_SEED, or a new one: it chooses what is asked, in which order
// and what Aliyun does; the interleaving is the machine's.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("PROVE_SEED")
	if text == "" {
		return rand.Uint64()
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("PROVE_SEED is %q; it must be a whole number", text)
	}
	return seed
}

// run drives the replicas and returns what was seen.
func (l load) run(t *testing.T) *history {
	t.Helper()
	h := &history{seed: seedOf(t), began: time.Now(), numbers: map[string]*number{}}
	l.fake.OnAccepted(h.arrive)
	defer l.fake.OnAccepted(func(dysmsapitest.Accepted) {})
	clients := l.dial(t)
	ctx, cancel := context.WithTimeout(t.Context(), loadPatience)
	defer cancel()

	var over atomic.Bool
	var working sync.WaitGroup
	var serial, calls atomic.Int64
	serial.Store(int64(h.seed % 90_000_000)) // no load meets the numbers of another one
	for range numbersAtATime {
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
	for ctx.Err() == nil && calls.Load() < minimumCalls {
		time.Sleep(10 * time.Millisecond)
	}
	over.Store(true)
	working.Wait()
	if ctx.Err() != nil {
		t.Fatalf("seed %d: %d of %d calls within %v", h.seed, calls.Load(), minimumCalls, loadPatience)
	}
	t.Logf("%d calls on %d numbers in %.1f s, %d without effect, %d in doubt; %d users typed a code that had to be right, %d of them after a send in doubt (seed %d)",
		calls.Load(), len(h.numbers), time.Since(h.began).Seconds(), h.failures.Load(), h.doubts(), h.flows.Load(), h.afterDoubt.Load(), h.seed)
	if n := h.afterDoubt.Load(); l.aliyun != nil && n < minimumAfterDoubt {
		h.violated("only %d users typed a code whose send was in doubt; want %d, or this proves little", n, minimumAfterDoubt)
	}
	return h
}

// goOn waits until the load has gone on for a while.
func (l load) goOn(t *testing.T) {
	t.Helper()
	n := l.fake.Requests() + 100
	waitFor(t, "100 more requests at Aliyun", func() bool { return l.fake.Requests() >= n })
}

// dial returns a client a replica, or one for all. They come back quickly to a
// replica that was away.
func (l load) dial(t *testing.T) []pb.PhoneNumberServiceClient {
	t.Helper()
	targets := l.replicas
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 100 * time.Millisecond}}),
	}
	if l.together {
		targets = []string{"both:///"}
		options = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(all(l.replicas)), grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`)}
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

// arrive is the phone: the code is known to its holder, perhaps before the caller
// of SendSMS hears of it.
func (h *history) arrive(m dysmsapitest.Accepted) {
	h.mu.Lock()
	n := h.numbers[m.PhoneNumber]
	h.mu.Unlock()
	if n == nil {
		return // of an earlier load
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.arrived = append(n.arrived, m.Code)
	i := slices.IndexFunc(n.sends, func(s *send) bool { return s.signName == m.SignName })
	n.sends[i].codes = append(n.sends[i].codes, m.Code)
}

func (h *history) violated(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.violation = append(h.violation, fmt.Sprintf("seed %d: ", h.seed)+fmt.Sprintf(format, args...))
}

// A driver takes one number through its life.
type driver struct {
	load
	*history
	clients []pb.PhoneNumberServiceClient
	number  *number
	random  *rand.Rand
	client  int
}

// drive returns how many calls it added to the history.
func (d *driver) drive(ctx context.Context) int64 {
	var crowd sync.WaitGroup
	for c := range callersANumber {
		caller := *d
		caller.client, caller.random = c, rand.New(rand.NewPCG(d.random.Uint64(), 0))
		crowd.Go(func() {
			for range callsACaller {
				caller.act(ctx)
			}
		})
	}
	crowd.Wait()
	for range flowsANumber {
		d.user(ctx)
	}
	d.guesser(ctx)
	return int64(len(d.number.operations()))
}

// act is one call of somebody who does not behave.
func (d *driver) act(ctx context.Context) {
	if !d.flawless && d.random.IntN(100) == 0 { // a caller who gives up
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(d.random.IntN(10_000))*time.Microsecond)
		defer cancel()
	}
	if d.random.IntN(10) < 3 {
		d.send(ctx, d.meets())
		return
	}
	d.check(ctx, d.guess())
}

func (d *driver) meets() aliyunFault {
	if d.aliyun != nil {
		return d.aliyun(d.random)
	}
	return aliyunFault{strikes: d.random.IntN(4) == 0, fault: dysmsapitest.Delay(time.Duration(d.random.IntN(5000)) * time.Microsecond)}
}

// guess is mostly the newest code that arrived, else an older one, else anything.
func (d *driver) guess() string {
	d.number.mu.Lock()
	defer d.number.mu.Unlock()
	codes := d.number.arrived
	switch k := d.random.IntN(10); {
	case len(codes) == 0 || k < 3:
		return fmt.Sprintf("%06d", d.random.IntN(1_000_000))
	case k < 5:
		return codes[d.random.IntN(len(codes))]
	}
	return codes[len(codes)-1]
}

// user asks for a code until one was sent, as people do, types what arrived, and
// must be let in: whatever became of the calls, no later send succeeded, and
// nothing was used up.
func (d *driver) user(ctx context.Context) {
	d.number.mu.Lock()
	left := d.number.left
	d.number.mu.Unlock()
	if left {
		return // an old send may yet succeed, and rightly kill the code
	}
	var arrived []*send
	for try := range 3 {
		meets := d.meets()
		if try > 0 && d.random.IntN(2) == 0 { // the limit of one a minute meets most second tries
			meets = aliyunFault{true, dysmsapitest.Reply(200, "isv.BUSINESS_LIMIT_CONTROL", "触发分钟级流控Permits:1")}
		}
		s := d.send(ctx, meets)
		if ctx.Err() != nil {
			return
		}
		if code := d.codeOf(s); code != "" {
			if s.outcome == accepted || s.outcome == outOfSight {
				arrived = nil // older ones are dead, or may be
			}
			arrived = append(arrived, s)
		}
		if s.outcome == accepted || len(arrived) > 0 && d.random.IntN(2) == 0 {
			break
		}
	}
	if d.random.IntN(3) == 0 { // a slip: two more looks remain
		d.check(ctx, "x")
	}
	for _, s := range arrived {
		if s != arrived[len(arrived)-1] && d.random.IntN(2) == 0 {
			continue // the newer one will do
		}
		code := d.codeOf(s)
		var a answer
		for deadline := time.Now().Add(settlePatience); ; {
			var counted bool
			if a, counted = d.check(ctx, code); counted {
				break
			}
			if ctx.Err() != nil || time.Now().After(deadline) {
				return
			}
		}
		switch a {
		case unanswered:
			return // it may have been used
		case refused:
			d.violated("a dead SMS: %s was refused code %s, sent %d ms into the load, outcome of its send %d", d.number.text, code, s.begun/1e6, s.outcome)
			return
		}
		d.flows.Add(1)
		if s.outcome != accepted {
			d.afterDoubt.Add(1)
		}
	}
}

// guesser spends the looks of a code and then types it. What is right depends on
// what the calls before have left: the specification says.
func (d *driver) guesser(ctx context.Context) {
	s := d.send(ctx, d.meets())
	for range attemptLimit {
		d.check(ctx, "x")
	}
	d.check(ctx, d.codeOf(s))
}

func (d *driver) codeOf(s *send) string {
	d.number.mu.Lock()
	defer d.number.mu.Unlock()
	if len(s.codes) == 0 {
		return ""
	}
	return s.codes[0]
}

// send calls SendSMS under a sign name of its own, which tells the messages of
// overlapping calls apart.
func (d *driver) send(ctx context.Context, meets aliyunFault) *send {
	n := d.number
	n.mu.Lock()
	s := &send{signName: fmt.Sprintf("%s-%d", n.text, len(n.sends)), client: d.client}
	n.sends = append(n.sends, s)
	n.mu.Unlock()
	if meets.strikes {
		d.fake.For(s.signName, meets.fault)
	}
	replica := d.random.IntN(len(d.clients))
	ctx, cancel := context.WithTimeout(ctx, callDeadline)
	defer cancel()
	begun := d.now()
	_, err := d.clients[replica].SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: n.text, Signature: s.signName, TemplateCode: "SMS_1"})
	end := d.now()
	n.mu.Lock()
	s.begun, s.end, s.outcome, s.replica = begun, end, outcomeOf(err), d.name(replica)
	n.left = n.left || ctx.Err() != nil
	n.mu.Unlock()
	d.note(replica, end, err, s.outcome)
	return s
}

// check calls Valid; counted is false where it surely had no effect.
func (d *driver) check(ctx context.Context, code string) (a answer, counted bool) {
	replica := d.random.IntN(len(d.clients))
	ctx, cancel := context.WithTimeout(ctx, callDeadline)
	defer cancel()
	begun := d.now()
	res, err := d.clients[replica].Valid(ctx, &pb.ValidRequest{PhoneNumber: d.number.text, Code: code})
	end := d.now()
	o := outcomeOf(err)
	d.note(replica, end, err, o)
	switch {
	case o == noEffect:
		return 0, false
	case o != accepted:
		a, end = unanswered, never
	case res.Valid:
		a = valid
	default:
		a = refused
	}
	d.number.mu.Lock()
	defer d.number.mu.Unlock()
	d.number.checks = append(d.number.checks, porcupine.Operation{
		ClientId: d.client, Input: call{code: code}, Call: begun, Output: a, Return: end, Metadata: d.name(replica),
	})
	return a, true
}

func (d *driver) name(replica int) string {
	if d.together {
		return "one of " + strings.Join(d.replicas, ", ")
	}
	return d.replicas[replica]
}

func (d *driver) note(replica int, at int64, err error, o outcome) {
	if o == noEffect {
		d.failures.Add(1)
		time.Sleep(5 * time.Millisecond) // a caller who asks again does not storm a service that is away
	}
	if err != nil && d.flawless {
		d.violated("a call that failed: %v", err)
	} else if c := status.Code(err); err != nil && !slices.Contains(expected, c) {
		d.violated("%s: an answer that docs/errors.md does not list: %v", d.number.text, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil {
		d.answers = append(d.answers, answered{replica, time.Duration(at)})
	}
}

// What calls with sound fields may answer besides OK.
var expected = []codes.Code{
	codes.Unavailable, codes.Unknown, codes.DeadlineExceeded, codes.Aborted, codes.ResourceExhausted, codes.FailedPrecondition, codes.InvalidArgument, codes.Canceled,
}

// outcomeOf reads an answer as docs/errors.md tells callers to. What the client's
// own library says is no word of the service's: only of a connection that was
// never made is it sure that the call had no effect.
func outcomeOf(err error) outcome {
	s := status.Convert(err)
	var reason string
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			reason = info.Reason
		}
	}
	said := reason != ""
	switch {
	case err == nil:
		return accepted
	case reason == "SENT_NOT_CONFIRMED": // which goes on in the background, and then older codes are dead
		return outOfSight
	case !said && s.Code() == codes.Unavailable && strings.Contains(s.Message(), "while dialing"):
		return noEffect
	case !said || s.Code() == codes.Canceled:
		return outOfSight
	case s.Code() == codes.Unknown || s.Code() == codes.DeadlineExceeded:
		return inDoubt
	}
	return noEffect
}

func (h *history) doubts() (n int) {
	for _, number := range h.numbers {
		for _, s := range number.sends {
			if s.outcome == inDoubt || s.outcome == outOfSight {
				n++
			}
		}
		for _, o := range number.checks {
			if o.Output == unanswered {
				n++
			}
		}
	}
	return n
}

// operations is what porcupine is shown of a number: all that may have had an
// effect. A send whose code nobody got to know has none.
func (n *number) operations() []porcupine.Operation {
	n.mu.Lock()
	defer n.mu.Unlock()
	operations := slices.Clone(n.checks)
	for _, s := range n.sends {
		if len(s.codes) == 0 {
			continue
		}
		o := porcupine.Operation{ClientId: s.client, Input: call{send: true, code: s.codes[0]}, Call: s.begun, Output: done, Return: s.end, Metadata: s.replica}
		if s.outcome != accepted {
			o.Output, o.Return = unanswered, never
		}
		operations = append(operations, o)
	}
	return operations
}

// violations checks what was seen: every number's calls are linearizable, no call
// sent two SMS, none sent one that was said not to be sent, and (found on the
// way) no SMS was dead.
func (h *history) violations(t *testing.T) []string {
	t.Helper()
	var checking sync.WaitGroup
	turns := make(chan struct{}, 2)
	for _, n := range h.numbers {
		for _, s := range n.sends {
			switch {
			case len(s.codes) > 1:
				h.violated("%d SMS for one call on %s", len(s.codes), n.text)
			case s.outcome == accepted && len(s.codes) == 0:
				h.violated("SendSMS to %s answered OK and sent nothing", n.text)
			case s.outcome == noEffect && len(s.codes) > 0:
				h.violated("SendSMS to %s was said to have no effect and sent an SMS", n.text)
			}
		}
		checking.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			if wrong := notLinearizable(t, n.text, n.operations(), fmt.Sprintf("seed %d", h.seed)); wrong != "" {
				h.violated("%s", wrong)
			}
		})
	}
	checking.Wait()
	return h.violation
}

// longestStall is the longest time in which none of the replicas answered a call.
func (h *history) longestStall(replicas ...int) (longest time.Duration) {
	slices.SortFunc(h.answers, func(a, b answered) int { return cmp.Compare(a.at, b.at) })
	var last time.Duration
	for _, a := range h.answers {
		if slices.Contains(replicas, a.replica) {
			longest, last = max(longest, a.at-last), a.at
		}
	}
	return longest
}
