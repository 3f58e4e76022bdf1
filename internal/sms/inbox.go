package sms

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Delivered is one message in the inbox, as /inbox.json shows it.
type Delivered struct {
	PhoneNumber  verify.Number `json:"phone_number"`
	Signature    string        `json:"signature"`
	TemplateCode string        `json:"template_code"`
	Code         string        `json:"code"`
	SentAt       time.Time     `json:"sent_at"`
}

const inboxSize = 1000

// Inbox is the Sender of development: it keeps the last messages, codes and all,
// and sends nothing. Arrived, where set, is called with each.
type Inbox struct {
	Arrived func(Delivered)

	mu       sync.Mutex
	messages []Delivered // newest first
}

// Send puts m into the inbox.
func (b *Inbox) Send(_ context.Context, m verify.Message) (verify.Receipt, error) {
	d := Delivered{m.Number, m.SignName, m.TemplateCode, m.Code, time.Now()}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.messages = slices.Insert(b.messages, 0, d)
	b.messages = b.messages[:min(len(b.messages), inboxSize)]
	if b.Arrived != nil {
		b.Arrived(d)
	}
	return verify.Receipt{}, nil
}

// Messages returns the kept messages, newest first: those to n, or all where n
// is empty.
func (b *Inbox) Messages(n verify.Number) []Delivered {
	b.mu.Lock()
	defer b.mu.Unlock()
	found := make([]Delivered, 0, len(b.messages)) // never nil: JSON shows [], not null
	for _, d := range b.messages {
		if n == "" || d.PhoneNumber == n {
			found = append(found, d)
		}
	}
	return found
}
