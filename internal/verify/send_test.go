package verify

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

func TestSend_StoresTheCodeFirstAndConfirmsAResend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		sent(t, &m, "888888")
		var asked Message
		v := newVerifier(&m, func(_ context.Context, msg Message) (Receipt, error) {
			asked = msg
			if s := m.state(); len(s.Codes) != 2 || s.Codes[1].MAC != stored(msg.Code) {
				t.Errorf("at the call to the provider: got state %v, want the code in it, beside the older one", s)
			}
			return Receipt{BizID: "biz", RequestID: "req"}, nil
		})
		result, err := v.Send(t.Context(), SendRequest{Number: testNumber, SignName: "sign", TemplateCode: "template"})
		if err != nil || result != (SendResult{Receipt: Receipt{"biz", "req"}, BegunAt: time.UnixMicro(now())}) {
			t.Errorf("got %v, %v, want the provider's receipt", result, err)
		}
		if want := (Message{testNumber, "sign", "template", "000001", m.state().LastSendID}); asked != want {
			t.Errorf("got message %v, want %v", asked, want)
		}
		if s := m.state(); len(s.Codes) != 1 || s.Codes[0].MAC != stored("000001") || m.record.BegunAt != now() {
			t.Errorf("got state %v, begun at %d, want the new code alone, %d", s, m.record.BegunAt, now())
		}
	})
}

func TestSend_CallerGoneBeforeTheProviderCallGetsNoSMS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var store brokenStore
		ctx, leave := context.WithCancel(t.Context())
		store.swap = func(context.Context) error { leave(); return nil }
		v := newVerifier(&store, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		_, err := v.Send(ctx, SendRequest{Number: testNumber})
		if !isOnly(t, err, ErrCallerGone) || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want %v", err, ErrCallerGone)
		}
		v.Wait(t.Context())
		if len(store.history) != 2 || len(store.state().Codes) != 0 {
			t.Errorf("got %d swaps and %v, want the code stored and withdrawn", len(store.history), store.state())
		}
	})
}

// The caller's deadline does not end the call to the provider. SMSTimeout does.
func TestSend_OnlySMSTimeoutEndsTheProviderCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		type key struct{}
		v := newVerifier(&m, func(ctx context.Context, _ Message) (Receipt, error) {
			if got := ctx.Value(key{}); got != "trace" {
				t.Errorf("got the value %v in the context, want the caller's", got)
			}
			<-ctx.Done()
			return Receipt{}, &SendError{Kind: SendTimedOut}
		})
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), key{}, "trace"), time.Second)
		defer cancel()
		start := time.Now()
		_, err := v.Send(ctx, SendRequest{Number: testNumber})
		var timedOut *SendError
		if took := time.Since(start); took != v.SMSTimeout || !errors.As(err, &timedOut) || timedOut.Kind != SendTimedOut {
			t.Errorf("got %v after %v, want a timeout after %v", err, took, v.SMSTimeout)
		}
		if !lives(&m, "000001") {
			t.Error("got the code dead, want it live: the SMS may arrive")
		}
	})
}

func TestSend_ProviderResultDecidesIfTheCodeLives(t *testing.T) {
	for _, c := range []struct {
		name   string
		result error
		kind   SendKind
		lives  bool
	}{
		{"unknown", &SendError{Kind: SendUnknown}, SendUnknown, true},
		{"timed out", &SendError{Kind: SendTimedOut}, SendTimedOut, true},
		{"not attempted", &SendError{Kind: SendNotAttempted}, SendNotAttempted, false},
		{"limited", &SendError{Kind: SendLimited}, SendLimited, false},
		{"bad number", &SendError{Kind: SendBadNumber}, SendBadNumber, false},
		{"rejected", &SendError{Kind: SendRejected}, SendRejected, false},
		{"bad request", &SendError{Kind: SendBadRequest}, SendBadRequest, false},
		{"a rejection, wrapped", fmt.Errorf("aliyun: %w", &SendError{Kind: SendLimited}), SendLimited, false},
		{"no SendError", errors.New("EOF"), SendUnknown, true},
		{"a bare deadline", context.DeadlineExceeded, SendUnknown, true},
		{"the zero SendError", &SendError{}, SendUnknown, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var m fakeStore
				sent(t, &m, "888888")
				v := newVerifier(&m, failWith(c.result))
				_, err := v.Send(t.Context(), SendRequest{Number: testNumber})
				var got *SendError
				if !errors.As(err, &got) || got.Kind != c.kind {
					t.Errorf("got %v, want a SendError of kind %d", err, c.kind)
				}
				v.Wait(t.Context())
				if got := lives(&m, "000001"); got != c.lives {
					t.Errorf("its code: got live %v, want %v", got, c.lives)
				}
				if !lives(&m, "888888") {
					t.Error("got the code of the last success dead, want it live: a failed send invalidates nothing")
				}
			})
		})
	}
}

func TestSend_SenderPanicKeepsTheCodeAndPropagates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) { panic("in the sender") })
		func() {
			defer func() {
				if got := recover(); got != "in the sender" {
					t.Errorf("got panic %v, want the sender's", got)
				}
			}()
			_, _ = v.Send(t.Context(), SendRequest{Number: testNumber})
		}()
		if !lives(&m, "000001") {
			t.Error("got the code dead, want it live: the SMS may have been sent")
		}
	})
}

func TestSend_WithoutRandomnessStoresAndSendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		v.Random = iotest.ErrReader(errors.New("no entropy"))
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); err == nil || !isOnly(t, err, nil) {
			t.Errorf("got %v, want an error that is no sentinel", err)
		}
		if len(m.history) != 0 {
			t.Errorf("got %d swaps, want none", len(m.history))
		}
	})
}

func TestSend_FullListIsRejectedBeforeTheProviderCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m fakeStore
		for i := range maxCodes {
			began(t, &m, fmt.Sprintf("%06d", 100+i))
		}
		v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
			t.Error("the provider was called, want no call")
			return Receipt{}, nil
		})
		if _, err := v.Send(t.Context(), SendRequest{Number: testNumber}); !isOnly(t, err, ErrSendInProgress) {
			t.Errorf("got %v, want %v", err, ErrSendInProgress)
		}
	})
}

func TestSend_ManyRejectedSendsKeepTheLiveCode(t *testing.T) {
	var m fakeStore
	sent(t, &m, "123456")
	var asked atomic.Int32
	v := newVerifier(&m, func(context.Context, Message) (Receipt, error) {
		asked.Add(1)
		return Receipt{}, &SendError{Kind: SendLimited}
	})
	var all sync.WaitGroup
	for range 30 {
		all.Go(func() {
			_, err := v.Send(t.Context(), SendRequest{Number: testNumber})
			var rejected *SendError
			if !errors.As(err, &rejected) && !errors.Is(err, ErrSendInProgress) {
				t.Errorf("got %v, want the rejection or %v", err, ErrSendInProgress)
			}
		})
	}
	all.Wait()
	v.Wait(t.Context())
	if asked.Load() == 0 {
		t.Error("got no call to the provider, want some")
	}
	if !lives(&m, "123456") {
		t.Error("got the live code dead, want it live")
	}
	if n := len(m.state().Codes); n != 1 {
		t.Errorf("got %d codes in the list, want 1", n)
	}
}
