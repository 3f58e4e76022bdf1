package sms

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Message is one message in the inbox, as /inbox.json shows it.
type Message struct {
	PhoneNumber  verify.Number `json:"phone_number"`
	Signature    string        `json:"signature"`
	TemplateCode string        `json:"template_code"`
	Code         string        `json:"code"`
	SentAt       time.Time     `json:"sent_at"`
}

// A TrackedMessage message is one with what became of its code, as the page shows it.
type TrackedMessage struct {
	ID int64 `json:"id"`
	Message
	Expires      time.Time `json:"expires_at"`
	AttemptsLeft int       `json:"attempts_left"`
	State        CodeState `json:"state"`

	ticket  int64
	changed int64 // the inbox's revision when it last did
}

// CodeState is what became of a delivered code. That its life is over is told by
// Expires.
type CodeState string

// The states of a code. One that was seen to be gone may yet turn out to be used.
const (
	CodeLive     CodeState = "live"
	CodeUsed     CodeState = "used"     // a Valid succeeded with it
	CodeReplaced CodeState = "replaced" // by a later success
	CodeSpent    CodeState = "spent"    // no attempts are left
)

// A Failure makes sends fail as they fail at Aliyun.
type Failure struct {
	PhoneNumber verify.Number `json:"phone_number,omitempty"` // whose; "" is every number's
	Kind        string        `json:"kind"`                   // of FailureKinds
	Times       int           `json:"times,omitempty"`        // sends that it is still for; 0 is every one until it is taken away
}

// noFailure is a kind too: a number's own is stronger than every number's failure.
const noFailure = "none"

// failures are Aliyun's answers, or for those without a code its silence.
var failures = []struct {
	kind, code, message string
	arrives             bool // the SMS does
}{
	{"limit_minute", "isv.BUSINESS_LIMIT_CONTROL", "触发分钟级流控Permits:1", false},
	{"limit_hour", "isv.BUSINESS_LIMIT_CONTROL", "触发小时级流控Permits:5", false},
	{"limit_day", "isv.BUSINESS_LIMIT_CONTROL", "触发天级流控Permits:10", false},
	{"illegal_number", "isv.MOBILE_NUMBER_ILLEGAL", "", false},
	{"no_balance", "isv.AMOUNT_NOT_ENOUGH", "", false},
	{"timeout", "", "", false},
	{"timeout_delivered", "", "", true},
}

// FailureKinds names every way to fail, and the one not to.
func FailureKinds() []string {
	kinds := []string{noFailure}
	for _, f := range failures {
		kinds = append(kinds, f.kind)
	}
	return kinds
}

// ParseFailure reads KIND or KIND:TIMES. Whether such a failure can be is for Fail to
// say.
func ParseFailure(s string) Failure {
	kind, times, counted := strings.Cut(s, ":")
	f := Failure{Kind: kind}
	if counted {
		var err error
		if f.Times, err = strconv.Atoi(times); err != nil || f.Times == 0 {
			f.Times = -1
		}
	}
	return f
}

func (f Failure) fault() error {
	if !slices.Contains(FailureKinds(), f.Kind) {
		return fmt.Errorf("kind must be one of %s", strings.Join(FailureKinds(), ", "))
	}
	if f.Times < 0 || f.Times > inboxSize {
		return fmt.Errorf("times must be a whole number from 1 to %d, or left out", inboxSize)
	}
	return nil
}

// inboxSize is how many messages are kept, and at most how many failures.
const inboxSize = 1000

// Inbox is the Sender of development: it keeps the last messages, codes and all,
// and sends nothing.
type Inbox struct {
	Rules     verify.Rules  // by which codes live
	OnMessage func(Message) // where set, called with each message

	mu       sync.Mutex
	messages []TrackedMessage // newest first
	failures []Failure        // one a number
	ids      int64
	revision int64
	cleared  int64         // the revision at which messages were last taken out
	changed  chan struct{} // closed with the next change, where somebody waits
}

// Send puts m into the inbox, or fails as it was told to.
func (b *Inbox) Send(ctx context.Context, m verify.Message) (verify.Receipt, error) {
	kind := b.takeFailure(m.Number)
	for _, f := range failures {
		if f.kind != kind {
			continue
		}
		if f.code != "" {
			reply, err := json.Marshal(map[string]string{"Code": f.code, "Message": f.message, "RequestId": "DEVELOPMENT-" + strconv.FormatInt(m.SendID, 36)})
			if err != nil {
				return verify.Receipt{}, err
			}
			return readReply(m, 200, reply)
		}
		if f.arrives {
			b.deliver(m)
		}
		<-ctx.Done()
		return verify.Receipt{}, lostReply(ctx, 0)
	}
	b.deliver(m)
	return verify.Receipt{}, nil
}

func (b *Inbox) deliver(m verify.Message) {
	d := Message{m.Number, m.SignName, m.TemplateCode, m.Code, time.Now()}
	b.change(func() {
		b.ids++
		b.messages = slices.Insert(b.messages, 0, TrackedMessage{b.ids, d, d.SentAt.Add(b.Rules.CodeTTL), b.Rules.AttemptLimit, CodeLive, m.SendID, b.revision})
		b.messages = b.messages[:min(len(b.messages), inboxSize)]
	})
	if b.OnMessage != nil {
		b.OnMessage(d)
	}
}

// takeFailure returns the kind in which a send to n has to fail, "" where it has not.
func (b *Inbox) takeFailure(n verify.Number) (kind string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := b.failureOf(n)
	if i < 0 {
		i = b.failureOf("")
	}
	if i < 0 {
		return ""
	}
	f := &b.failures[i]
	kind = f.Kind
	if f.Times > 0 {
		if f.Times--; f.Times == 0 {
			b.failures = slices.Delete(b.failures, i, i+1)
		}
		b.bump()
	}
	return kind
}

func (b *Inbox) failureOf(n verify.Number) int {
	return slices.IndexFunc(b.failures, func(f Failure) bool { return f.PhoneNumber == n })
}

// change makes a change and wakes who waits for one.
func (b *Inbox) change(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bump()
	f()
}

func (b *Inbox) bump() {
	b.revision++
	if b.changed != nil {
		close(b.changed)
		b.changed = nil
	}
}

// SetFailure makes sends fail, in place of what was told of the same number before.
func (b *Inbox) SetFailure(f Failure) error {
	if err := f.fault(); err != nil {
		return err
	}
	var err error
	b.change(func() {
		if i := b.failureOf(f.PhoneNumber); i >= 0 {
			b.failures[i] = f
		} else if len(b.failures) < inboxSize {
			b.failures = append(b.failures, f)
		} else {
			err = fmt.Errorf("there are failures for %d numbers already; delete some", inboxSize)
		}
	})
	return err
}

// ClearFailure takes the failure of n away, or every one where n is empty.
func (b *Inbox) ClearFailure(n verify.Number) {
	b.change(func() {
		b.failures = slices.DeleteFunc(b.failures, func(f Failure) bool { return n == "" || f.PhoneNumber == n })
	})
}

// Failures returns how sends fail now.
func (b *Inbox) Failures() []Failure {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]Failure{}, b.failures...) // never nil: JSON shows [], not null
}

// Messages returns the kept messages, newest first: those to n, or all where n
// is empty.
func (b *Inbox) Messages(n verify.Number) []Message {
	found, _ := b.messagesAndChange(n)
	return found
}

func (b *Inbox) messagesAndChange(n verify.Number) ([]Message, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	found := []Message{} // never nil: JSON shows [], not null
	for _, d := range b.messages {
		if n == "" || d.PhoneNumber == n {
			found = append(found, d.Message)
		}
	}
	return found, b.nextChange()
}

func (b *Inbox) nextChange() <-chan struct{} {
	if b.changed == nil {
		b.changed = make(chan struct{})
	}
	return b.changed
}

// AwaitMessages is Messages once there is one, or when ctx ends.
func (b *Inbox) AwaitMessages(ctx context.Context, n verify.Number) []Message {
	for {
		found, changed := b.messagesAndChange(n)
		if len(found) > 0 {
			return found
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return found
		}
	}
}

// Delete takes the messages to n out, or all where n is empty. Their codes live on.
func (b *Inbox) Delete(n verify.Number) {
	b.change(func() {
		before := len(b.messages)
		b.messages = slices.DeleteFunc(b.messages, func(m TrackedMessage) bool { return n == "" || m.PhoneNumber == n })
		if len(b.messages) < before {
			b.cleared = b.revision
		}
	})
}

// UpdateStates notes what became of the codes that were sent to n, as seen; used is one
// with which a Valid has just succeeded, or "".
func (b *Inbox) UpdateStates(n verify.Number, used string, seen verify.Inspection) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var usedTicket int64 // of the newest, should two have drawn the same digits
	var changed bool
	for i := range b.messages {
		m := &b.messages[i]
		if m.PhoneNumber != n || m.ticket > seen.LastSendID || m.State != CodeLive && (m.Code != used || m.State == CodeUsed) {
			continue
		}
		before := *m
		at := slices.IndexFunc(seen.Alive, func(c verify.CodeStatus) bool { return c.SendID == m.ticket })
		switch {
		case at >= 0:
			m.Expires, m.AttemptsLeft = seen.Alive[at].Expires, seen.Alive[at].AttemptsLeft
		case m.Code == used && usedTicket == 0:
			m.State, usedTicket = CodeUsed, m.ticket
		case usedTicket > m.ticket || slices.ContainsFunc(seen.Alive, func(c verify.CodeStatus) bool { return c.Confirmed && c.SendID > m.ticket }):
			m.State = CodeReplaced
		case time.Now().Before(m.Expires):
			m.State = CodeSpent
		}
		if m.State != CodeLive {
			m.AttemptsLeft = 0
		}
		if *m != before {
			m.changed, changed = b.revision+1, true
		}
	}
	if changed {
		b.bump()
	}
}

// An Update is what changed in an inbox.
type Update struct {
	Revision int64            `json:"-"`        // to ask from the next time
	Whole    bool             `json:"whole"`    // Messages are all that there are
	Messages []TrackedMessage `json:"messages"` // newest first
	Failures []Failure        `json:"failures"` // all
}

// Since returns what changed after a revision, -1 for everything, and a channel
// that is closed with the next change.
func (b *Inbox) Since(revision int64) (Update, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	u := Update{Revision: b.revision, Whole: revision < b.cleared || revision < 0, Messages: []TrackedMessage{}, Failures: append([]Failure{}, b.failures...)}
	for _, m := range b.messages {
		if u.Whole || m.changed > revision {
			u.Messages = append(u.Messages, m)
		}
	}
	return u, b.nextChange()
}
