package dev

import (
	"bufio"
	"context"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// listen opens the event stream. next waits for the next event of a kind and decodes it.
func listen(t *testing.T, r *servertest.Replica) (next func(event string, into any)) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	q, _ := http.NewRequestWithContext(ctx, "GET", "http://"+r.Addr+"/inbox/events", nil)
	res, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	if ct := res.Header.Get("Content-Type"); res.StatusCode != 200 || ct != "text/event-stream" {
		t.Fatalf("got %d %s; want 200 text/event-stream", res.StatusCode, ct)
	}
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 1<<20)
	if lines.Scan(); lines.Text() != "retry: 1000" {
		t.Errorf("first line: got %q; want the delay before a new connection", lines.Text())
	}
	return func(event string, into any) {
		t.Helper()
		for lines.Scan() {
			if lines.Text() != "event: "+event {
				continue
			}
			lines.Scan()
			if err := json.Unmarshal([]byte(strings.TrimPrefix(lines.Text(), "data: ")), into); err != nil {
				t.Fatal(err)
			}
			return
		}
		t.Fatalf("the stream ended without the event %s: %v", event, lines.Err())
	}
}

func TestEvents_ReportTheStateOfEveryCode(t *testing.T) {
	r, _ := startDev(t)
	r.MustSend(t, "18600000001")
	next := listen(t, r)
	var settings struct {
		AttemptLimit   int     `json:"attempt_limit"`
		CodeTTLSeconds float64 `json:"code_ttl_seconds"`
		Version        string
		Now, Started   time.Time
	}
	next("settings", &settings)
	if settings.AttemptLimit != 3 || settings.CodeTTLSeconds != 600 || settings.Version != "test" || time.Since(settings.Now).Abs() > 5*time.Second || time.Since(settings.Started) > time.Minute {
		t.Errorf("settings: got %+v; want limit 3, 600 s, version test, and the present time", settings)
	}
	known := map[int64]trackedMessage{}
	var whole bool
	update := func() {
		t.Helper()
		var u changes
		next("inbox", &u)
		if whole = u.Whole; whole {
			clear(known)
		}
		for _, m := range u.Messages {
			known[m.ID] = m
		}
	}
	waitFor := func(step string, id int64, state codeState, attempts int) {
		t.Helper()
		for m := known[id]; m.State != state || m.AttemptsLeft != attempts; m = known[id] {
			update()
			if known[1].State == codeUsed {
				t.Fatalf("%s: state of the replaced code: got %s; want %s", step, codeUsed, codeReplaced)
			}
		}
		if left := time.Until(known[id].Expires); left < 9*time.Minute || left > 10*time.Minute {
			t.Errorf("%s: time to expiry: got %v; want between 9m and 10m", step, left)
		}
	}
	update()
	if !whole || len(known) != 1 {
		t.Fatalf("first update: got whole %v, %v; want true and one message", whole, known)
	}
	waitFor("sent before", 1, codeLive, 3)
	r.IsValid(t, "18600000001", "x")
	waitFor("a wrong code", 1, codeLive, 2)
	r.MustSend(t, "18600000001")
	waitFor("a newer code", 1, codeReplaced, 0)
	waitFor("the newer code", 2, codeLive, 3)
	if whole {
		t.Error("update after a change: got the whole inbox; want only the change")
	}
	if !r.IsValid(t, "18600000001", known[2].Code) {
		t.Error("the code in the event: got invalid; want valid")
	}
	waitFor("the right code", 2, codeUsed, 0)
	if r.IsValid(t, "18600000001", known[1].Code) {
		t.Error("the replaced code: got valid; want invalid")
	}
	r.MustSend(t, "18600000002")
	waitFor("another number", 3, codeLive, 3)
	for range 3 {
		r.IsValid(t, "18600000002", "x")
	}
	waitFor("three wrong codes", 3, codeExhausted, 0)
	r.Ask(t, "DELETE", "/inbox.json?phone_number=18600000001", "")
	for !whole {
		update()
	}
	if len(known) != 1 || known[3].State != codeExhausted {
		t.Errorf("messages after DELETE: got %v; want the one of the other number", known)
	}
}

func TestEvents_BurstIsFewEvents(t *testing.T) {
	r, inbox := startDev(t)
	next := listen(t, r)
	var u changes
	next("inbox", &u)
	const sent = 200
	go func() {
		for i := range int64(sent) {
			inbox.Send(t.Context(), verify.Message{Number: "+8618600000001", Code: "123456", SendID: i + 1})
			time.Sleep(200 * time.Microsecond) // time to write an event for each
		}
	}()
	events, messages := 0, 0
	for ; messages < sent; events++ {
		next("inbox", &u)
		messages += len(u.Messages)
	}
	t.Logf("%d events", events)
	if events > sent/2 || messages != sent {
		t.Errorf("got %d messages in %d events; want %d in at most %d", messages, events, sent, sent/2)
	}
}

// A lateStore returns records late, so that they may be stale.
type lateStore struct{ verify.Store }

func (s lateStore) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	record, err := s.Store.Load(ctx, n)
	time.Sleep(rand.N(2 * time.Millisecond))
	return record, err
}

// When all calls have ended, the last events must match the stored state.
func TestEvents_AreTrueUnderContention(t *testing.T) {
	r, inbox := startDev(t, func(c *server.Config) { c.Verifier.Store = lateStore{c.Verifier.Store} })
	for range 20 {
		number := servertest.FreshNumber()
		n := verify.Number("+86" + number)
		var calls sync.WaitGroup
		for worker := range 6 {
			calls.Go(func() {
				for i := range 15 {
					if (worker+i)%3 == 0 {
						r.SendSMS(t.Context(), servertest.SendRequest(number)) // some are rejected: eight are in flight
						continue
					}
					code := "x"
					if m := inbox.Messages(n); len(m) > 0 && i%2 == 0 {
						code = m[0].Code
					}
					r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
				}
			})
		}
		calls.Wait()
		last, _ := inbox.since("", -1)
		var live *trackedMessage
		var dead []string
		for i, m := range last.Messages {
			switch {
			case m.PhoneNumber != n:
			case m.State != codeLive:
				dead = append(dead, m.Code)
			case live == nil:
				live = &last.Messages[i]
			}
		}
		attempts := len(dead)
		if live != nil {
			attempts = live.AttemptsLeft - 1
		}
		for i := range attempts { // a check of a dead code counts as well
			if guess := append(dead, "x", "x")[i]; r.IsValid(t, number, guess) {
				t.Fatalf("code %s, which is not live: got valid; want invalid", guess)
			}
		}
		if live != nil && !r.IsValid(t, number, live.Code) {
			t.Fatalf("a live code with %d attempts left, at its last attempt: got invalid; want valid", live.AttemptsLeft)
		}
	}
}

func TestEvents_WatcherDoesNotDelayTheDrain(t *testing.T) {
	r, _ := startDev(t)
	listen(t, r)("settings", &struct{}{})
	r.Stop()
	select {
	case <-r.Done:
	case <-time.After(5 * time.Second):
		t.Fatal("Serve still runs 5 s after the stop; want its return")
	}
}
