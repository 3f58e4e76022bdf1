package consistency

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A driver makes all calls of one number.
type driver struct {
	load
	*history
	clients []pb.PhoneNumberServiceClient
	number  *number
	random  *rand.Rand
	client  int
}

// drive makes the calls, and returns how many it added to the history.
func (d *driver) drive(ctx context.Context) int64 {
	var callers sync.WaitGroup
	for c := range callersPerNumber {
		caller := *d
		caller.client, caller.random = c, rand.New(rand.NewPCG(d.random.Uint64(), 0))
		callers.Go(func() {
			for range callsPerCaller {
				caller.act(ctx)
			}
		})
	}
	callers.Wait()
	for range flowsPerNumber {
		d.user(ctx)
	}
	d.guesser(ctx)
	return int64(len(d.number.operations()))
}

// act makes one random call.
func (d *driver) act(ctx context.Context) {
	if !d.flawless && d.random.IntN(100) == 0 { // a caller that gives up
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(d.random.IntN(10_000))*time.Microsecond)
		defer cancel()
	}
	switch k := d.random.IntN(10); {
	case k < 1:
		d.call(ctx, d.keyedSend(), d.nextFault())
	case k < 3:
		d.send(ctx, d.nextFault(), d.anyContext())
	default:
		code, context := d.guess()
		d.check(ctx, code, context)
	}
}

// anyContext returns a context: in half the calls, none.
func (d *driver) anyContext() int { return max(0, d.random.IntN(2*len(contexts)-2)-len(contexts)+2) }

// nextFault returns the fault of the next send; without faults, some sends are slow.
func (d *driver) nextFault() aliyunFault {
	if d.aliyun != nil {
		return d.aliyun(d.random)
	}
	return aliyunFault{active: d.random.IntN(4) == 0, fault: dysmsapitest.Delay(time.Duration(d.random.IntN(5000)) * time.Microsecond)}
}

// guess returns mostly the newest code that arrived, sometimes an older one or random digits, and its
// context or sometimes another one.
func (d *driver) guess() (code string, context int) {
	d.number.mu.Lock()
	defer d.number.mu.Unlock()
	codes := d.number.arrived
	if len(codes) == 0 || d.random.IntN(10) < 3 {
		return fmt.Sprintf("%06d", d.random.IntN(1_000_000)), d.anyContext()
	}
	guessed := codes[len(codes)-1]
	if d.random.IntN(7) < 2 {
		guessed = codes[d.random.IntN(len(codes))]
	}
	if d.random.IntN(10) < 2 {
		guessed.context = d.anyContext()
	}
	return guessed.code, guessed.context
}

// user requests a code until one was sent, and types the code that arrived. It must be accepted:
// no later send succeeded, and it was not used.
func (d *driver) user(ctx context.Context) {
	d.number.mu.Lock()
	abandoned := d.number.abandoned
	d.number.mu.Unlock()
	if abandoned {
		return // an old send may still succeed and replace the code
	}
	var arrived []*send
	context := d.anyContext()
	for try := range 3 {
		fault := d.nextFault()
		if try > 0 && d.random.IntN(2) == 0 { // most second sends exceed the limit of one a minute
			fault = aliyunFault{true, dysmsapitest.Reply(200, "isv.BUSINESS_LIMIT_CONTROL", "触发分钟级流控Permits:1")}
		}
		s := d.send(ctx, fault, context)
		if ctx.Err() != nil {
			return
		}
		if code := d.codeOf(s); code != "" {
			if s.outcome == accepted || s.outcome == mayStillRun {
				arrived = nil // older codes are or may be dead
			}
			arrived = append(arrived, s)
		}
		if s.outcome == accepted || len(arrived) > 0 && d.random.IntN(2) == 0 {
			break
		}
	}
	if d.random.IntN(3) == 0 { // a typing error: two attempts remain
		d.check(ctx, "x", context)
	}
	for _, s := range arrived {
		if s != arrived[len(arrived)-1] && d.random.IntN(2) == 0 {
			continue // types only the newer one
		}
		code := d.codeOf(s)
		var r result
		for deadline := time.Now().Add(settleTimeout); ; {
			var counted bool
			if r, counted = d.check(ctx, code, context); counted {
				break
			}
			if ctx.Err() != nil || time.Now().After(deadline) {
				return
			}
		}
		switch r {
		case noResult:
			return // the code may be used
		case invalid:
			d.violated("a dead SMS: %s: code %s was rejected, sent %d ms into the load, outcome of its send %d", d.number.text, code, s.begun/1e6, s.outcome)
			return
		}
		d.flows.Add(1)
		if s.outcome != accepted {
			d.afterDoubt.Add(1)
		}
	}
}

// guesser uses up the attempts of a code and then types it. The specification decides which
// results are right.
func (d *driver) guesser(ctx context.Context) {
	s := d.send(ctx, d.nextFault(), d.anyContext())
	for range attemptLimit {
		d.check(ctx, "x", s.context)
	}
	d.check(ctx, d.codeOf(s), s.context)
}

func (d *driver) codeOf(s *send) string {
	d.number.mu.Lock()
	defer d.number.mu.Unlock()
	if len(s.codes) == 0 {
		return ""
	}
	return s.codes[0]
}

// send calls SendSMS without an idempotency key.
func (d *driver) send(ctx context.Context, fault aliyunFault, context int) *send {
	n := d.number
	n.mu.Lock()
	s := n.newSend(d.client, context)
	n.mu.Unlock()
	d.call(ctx, s, fault)
	return s
}

// keyedSend returns the send of one of the number's idempotency keys. Several clients call it, also
// at the same time.
func (d *driver) keyedSend() *send {
	n := d.number
	n.mu.Lock()
	defer n.mu.Unlock()
	i := d.random.IntN(keysPerNumber)
	if n.keyed[i] == nil {
		n.keyed[i] = n.newSend(d.client, d.anyContext())
		n.keyed[i].key = n.keyed[i].signName
	}
	return n.keyed[i]
}

// newSend returns a send with a unique sign name, so that the message can be matched to its call.
func (n *number) newSend(client, context int) *send {
	s := &send{signName: fmt.Sprintf("%s-%d", n.text, len(n.sends)), client: client, context: context}
	n.sends = append(n.sends, s)
	return s
}

// call calls SendSMS for s.
func (d *driver) call(ctx context.Context, s *send, fault aliyunFault) {
	n := d.number
	if fault.active {
		d.fake.For(s.signName, fault.fault)
	}
	replica := d.random.IntN(len(d.clients))
	template := []string{"SMS_1", "100001"}[d.random.IntN(2)] // of either product
	ctx, cancel := context.WithTimeout(withContext(ctx, s.context), callTimeout)
	defer cancel()
	if s.key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "idempotency-key", s.key)
		template = "SMS_1" // a repeated request has the same
	}
	begun := d.now()
	_, err := d.clients[replica].SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: n.text, Signature: s.signName, TemplateCode: template})
	end, o := d.now(), outcomeOf(err)
	n.mu.Lock()
	s.add(begun, end, o, d.name(replica))
	n.abandoned = n.abandoned || ctx.Err() != nil
	n.mu.Unlock()
	if s.key != "" && status.Code(err) == codes.Aborted { // another call with the key is under way
		time.Sleep(5 * time.Millisecond)
		return
	}
	d.note(replica, end, err, o)
}

// withContext returns a context for a call in a verification context.
func withContext(ctx context.Context, i int) context.Context {
	if i == 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "verification-context", contexts[i])
}

// add adds a call to the send. The send took effect between its first begin and its first OK.
func (s *send) add(begun, end int64, o outcome, replica string) {
	if s.calls++; s.calls == 1 {
		s.begun, s.end, s.outcome, s.replica = begun, end, o, replica
		return
	}
	s.begun = min(s.begun, begun)
	switch {
	case o == accepted && s.outcome == accepted:
		s.end = min(s.end, end)
	case o == accepted:
		s.end, s.outcome, s.replica = end, o, replica
	case s.outcome != accepted:
		s.outcome = max(s.outcome, o) // the least certain
	}
}

// check calls Valid. counted is false if the call definitely had no effect.
func (d *driver) check(ctx context.Context, code string, inContext int) (r result, counted bool) {
	replica := d.random.IntN(len(d.clients))
	ctx, cancel := context.WithTimeout(withContext(ctx, inContext), callTimeout)
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
		r, end = noResult, never
	case res.Valid:
		r = valid
	default:
		r = invalid
	}
	d.number.mu.Lock()
	defer d.number.mu.Unlock()
	d.number.checks = append(d.number.checks, porcupine.Operation{
		ClientId: d.client, Input: call{code: code, context: inContext}, Call: begun, Output: r, Return: end, Metadata: d.name(replica),
	})
	return r, true
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
		time.Sleep(5 * time.Millisecond) // a caller that retries waits before it does
	}
	if err != nil && d.flawless {
		d.violated("a failed call: got %v; want OK", err)
	} else if c := status.Code(err); err != nil && !slices.Contains(expected, c) {
		d.violated("%s: got %v; want an error that docs/errors.md lists", d.number.text, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil {
		d.completed = append(d.completed, completedCall{replica, time.Duration(at)})
	}
}
