package dev

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Message is one SMS in the inbox, in the form of /inbox.json.
type Message struct {
	PhoneNumber  verify.Number `json:"phone_number"`
	Signature    string        `json:"signature"`
	TemplateCode string        `json:"template_code"`
	Code         string        `json:"code"`
	SentAt       time.Time     `json:"sent_at"`
}

// trackedMessage is a message with the state of its code, in the form of /inbox/events.
type trackedMessage struct {
	ID int64 `json:"id"`
	Message
	Expires      time.Time `json:"expires_at"`
	AttemptsLeft int       `json:"attempts_left"`
	State        codeState `json:"state"`

	sendID  int64
	changed int64 // revision of its last change
}

// codeState is the state of a delivered code. It does not show if the code is expired; see
// trackedMessage.Expires.
type codeState string

// The states of a code. A replaced or exhausted code can change to used, if the result of its Valid
// arrives later.
const (
	codeLive      codeState = "live"
	codeUsed      codeState = "used"      // a Valid succeeded with it
	codeReplaced  codeState = "replaced"  // a newer code was confirmed or used
	codeExhausted codeState = "exhausted" // no attempts are left
)

// Failure makes sends fail in the same way as Aliyun does (fault injection).
type Failure struct {
	PhoneNumber verify.Number `json:"phone_number,omitempty"` // "" for all numbers
	Kind        string        `json:"kind"`                   // one of FailureKinds
	Times       int           `json:"times,omitempty"`        // remaining sends; 0 for no limit
}

// failures are the kinds of failure with Aliyun's replies. If code is "", the send times out.
var failures = []struct {
	kind, code, message string
	arrives             bool // the SMS is delivered anyway
}{
	{"limit_minute", "isv.BUSINESS_LIMIT_CONTROL", "触发分钟级流控Permits:1", false},
	{"limit_hour", "isv.BUSINESS_LIMIT_CONTROL", "触发小时级流控Permits:5", false},
	{"limit_day", "isv.BUSINESS_LIMIT_CONTROL", "触发天级流控Permits:10", false},
	{"illegal_number", "isv.MOBILE_NUMBER_ILLEGAL", "", false},
	{"no_balance", "isv.AMOUNT_NOT_ENOUGH", "", false},
	{"timeout", "", "", false},
	{"timeout_delivered", "", "", true},
}

// FailureKinds returns the kinds of failures, and none: then sends succeed. Set for one number, none
// overrides a failure for all numbers.
func FailureKinds() []string {
	kinds := []string{"none"}
	for _, f := range failures {
		kinds = append(kinds, f.kind)
	}
	return kinds
}

// ParseFailure parses KIND or KIND:TIMES. It returns no error: if TIMES is invalid, Times is -1, which
// SetFailure rejects.
func ParseFailure(s string) Failure {
	kind, times, counted := strings.Cut(s, ":")
	f := Failure{Kind: kind}
	if counted {
		n, _ := strconv.Atoi(times)
		f.Times = cmp.Or(n, -1)
	}
	return f
}

// inboxSize is the maximum number of messages, and of failures.
const inboxSize = 1000

// Inbox is the verify.Sender of dev. It keeps the last messages with their codes, and sends no SMS.
type Inbox struct {
	Rules     verify.Rules  // for the expiry and the attempts of codes
	OnMessage func(Message) // if set, called with each message

	mu       sync.Mutex
	messages []trackedMessage // newest first
	failures []Failure        // one for each number
	ids      int64            // ID of the newest message
	revision int64            // number of the last change
	cleared  int64            // revision of the last deletion
	changed  chan struct{}    // nil, or closed at the next change
}

// Send adds m to the inbox, or fails if SetFailure has set a failure for its number.
func (b *Inbox) Send(ctx context.Context, m verify.Message) (verify.Receipt, error) {
	kind := b.takeFailure(m.Number)
	for _, f := range failures {
		if f.kind != kind {
			continue
		}
		if f.code != "" {
			reply, _ := json.Marshal(map[string]string{ // strings never fail
				"Code": f.code, "Message": f.message,
				"RequestId": "DEVELOPMENT-" + strconv.FormatInt(m.SendID, 36),
			})
			return sms.ReadReply(m, 200, reply)
		}
		if f.arrives {
			b.deliver(m)
		}
		<-ctx.Done()
		return verify.Receipt{}, sms.LostReply(ctx, 0)
	}
	b.deliver(m)
	return verify.Receipt{}, nil
}

// deliver adds m to the inbox. If the inbox is full, it removes the oldest message.
func (b *Inbox) deliver(m verify.Message) {
	d := Message{m.Number, m.SignName, m.TemplateCode, m.Code, time.Now()}
	b.mu.Lock()
	b.bump()
	b.ids++
	b.messages = slices.Insert(b.messages, 0, trackedMessage{
		b.ids, d, d.SentAt.Add(b.Rules.CodeTTL), b.Rules.AttemptLimit, codeLive, m.SendID, b.revision,
	})
	b.messages = b.messages[:min(len(b.messages), inboxSize)]
	b.mu.Unlock()
	if b.OnMessage != nil {
		b.OnMessage(d)
	}
}

// takeFailure returns the kind of failure for a send to n, "" for none. If the failure is limited, it
// subtracts one from Times, and removes the failure after the last.
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

// failureOf returns the index of the failure for exactly n, or -1.
func (b *Inbox) failureOf(n verify.Number) int {
	return slices.IndexFunc(b.failures, func(f Failure) bool { return f.PhoneNumber == n })
}

// bump starts a new revision, and wakes the waiting requests. The calling function must hold b.mu.
func (b *Inbox) bump() {
	b.revision++
	if b.changed != nil {
		close(b.changed)
		b.changed = nil
	}
}

// SetFailure makes sends fail. It replaces the previous failure for the same number.
func (b *Inbox) SetFailure(f Failure) error {
	if !slices.Contains(FailureKinds(), f.Kind) {
		return fmt.Errorf("kind must be one of %s", strings.Join(FailureKinds(), ", "))
	}
	if f.Times < 0 || f.Times > inboxSize {
		return fmt.Errorf("times must be a whole number from 1 to %d, or left out", inboxSize)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := b.failureOf(f.PhoneNumber); i >= 0 {
		b.failures[i] = f
	} else if len(b.failures) < inboxSize {
		b.failures = append(b.failures, f)
	} else {
		return fmt.Errorf("there are failures for %d numbers already; delete some", inboxSize)
	}
	b.bump()
	return nil
}

// clearFailure removes the failure for n, or all failures if n is empty.
func (b *Inbox) clearFailure(n verify.Number) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.failures = slices.DeleteFunc(b.failures, func(f Failure) bool { return n == "" || f.PhoneNumber == n })
	b.bump()
}

// Failures returns the current failures.
func (b *Inbox) Failures() []Failure {
	u, _ := b.since("", -1)
	return u.Failures
}

// Messages returns the messages to n, or all messages if n is "". The newest is first.
func (b *Inbox) Messages(n verify.Number) []Message {
	u, _ := b.since(n, -1)
	return u.plain()
}

// awaitMessages waits until there is a message to n or ctx is done, and returns Messages(n).
func (b *Inbox) awaitMessages(ctx context.Context, n verify.Number) []Message {
	for {
		u, changed := b.since(n, -1)
		if len(u.Messages) > 0 || ctx.Err() != nil {
			return u.plain()
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// delete removes the messages to n, or all messages if n is "". It does not change their codes in the
// store.
func (b *Inbox) delete(n verify.Number) {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := len(b.messages)
	b.messages = slices.DeleteFunc(b.messages, func(m trackedMessage) bool { return n == "" || m.PhoneNumber == n })
	b.bump()
	if len(b.messages) < before {
		b.cleared = b.revision
	}
}

// updateStates sets the states of the codes that were sent to n, according to the stored state seen.
// used is the code that Valid has just accepted, or "".
func (b *Inbox) updateStates(n verify.Number, used string, seen verify.Inspection) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var usedSendID int64 // the newest send with this code
	var changed bool
	for i := range b.messages {
		m := &b.messages[i]
		if m.PhoneNumber != n || m.sendID > seen.LastSendID || m.State != codeLive && (m.Code != used || m.State == codeUsed) {
			continue
		}
		before := *m
		at := slices.IndexFunc(seen.Live, func(c verify.CodeStatus) bool { return c.SendID == m.sendID })
		switch {
		case at >= 0:
			m.Expires, m.AttemptsLeft = seen.Live[at].Expires, seen.Live[at].AttemptsLeft
		case m.Code == used && usedSendID == 0:
			m.State, usedSendID = codeUsed, m.sendID
		case usedSendID > m.sendID || slices.ContainsFunc(seen.Live,
			func(c verify.CodeStatus) bool { return c.Accepted && c.SendID > m.sendID }):
			m.State = codeReplaced
		case time.Now().Before(m.Expires):
			m.State = codeExhausted
		}
		if m.State != codeLive {
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

// changes describes the changes of an inbox since a revision.
type changes struct {
	Revision int64            `json:"-"`        // pass it to the next since
	Whole    bool             `json:"whole"`    // Messages contains all messages
	Messages []trackedMessage `json:"messages"` // newest first
	Failures []Failure        `json:"failures"` // all
}

// plain returns the messages without the states of their codes.
func (u changes) plain() []Message {
	messages := []Message{} // never nil: JSON shows [], not null
	for _, m := range u.Messages {
		messages = append(messages, m.Message)
	}
	return messages
}

// since returns the changes after a revision, and a channel that is closed at the next change. It
// returns only messages to n, unless n is "". If revision is -1, it returns all of them.
func (b *Inbox) since(n verify.Number, revision int64) (changes, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	u := changes{
		Revision: b.revision, Whole: revision < b.cleared || revision < 0,
		Messages: []trackedMessage{}, Failures: append([]Failure{}, b.failures...), // never nil, either
	}
	for _, m := range b.messages {
		if (n == "" || m.PhoneNumber == n) && (u.Whole || m.changed > revision) {
			u.Messages = append(u.Messages, m)
		}
	}
	if b.changed == nil {
		b.changed = make(chan struct{})
	}
	return u, b.changed
}
