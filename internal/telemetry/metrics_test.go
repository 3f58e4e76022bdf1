package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func mustHave(t *testing.T, scraped string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains(scraped, "\n"+line+"\n") {
			t.Errorf("got metrics without %s", line)
		}
	}
}

type sender struct {
	receipt verify.Receipt
	err     error
}

func (s sender) Send(context.Context, verify.Message) (verify.Receipt, error) {
	return s.receipt, s.err
}

func TestMetrics_CountSendsByResultCodeAndCountry(t *testing.T) {
	m := NewMetrics("test")
	steps := Telemetry{Metrics: m, Log: slog.New(slog.DiscardHandler)}
	for _, c := range []struct {
		number verify.Number
		err    error
	}{
		{"+8618600000000", nil},
		{"+12025550123", nil},
		{"+85251234567", &verify.SendError{Kind: verify.SendLimited, ProviderCode: "isv.BUSINESS_LIMIT_CONTROL"}},
		{"+8618600000000", &verify.SendError{Kind: verify.SendTimedOut}},
		{"+8618600000000", errors.New("654321 to +8618600000000")},
	} {
		_, err := steps.Sender(sender{err: c.err}).Send(t.Context(), verify.Message{Number: c.number, Code: "654321"})
		if !errors.Is(err, c.err) {
			t.Errorf("got %v, want the error of the sender", err)
		}
	}
	scraped := scrape(t, m)
	mustHave(t, scraped,
		`phonenumber_sends_total{aliyun_code="OK",caller="",country="CN",product="sms",result="accepted"} 1`,
		`phonenumber_sends_total{aliyun_code="OK",caller="",country="US",product="sms",result="accepted"} 1`,
		`phonenumber_sends_total{aliyun_code="isv.BUSINESS_LIMIT_CONTROL",caller="",country="HK",product="sms",result="limited"} 1`,
		`phonenumber_sends_total{aliyun_code="none",caller="",country="CN",product="sms",result="timed_out"} 1`,
		`phonenumber_sends_total{aliyun_code="none",caller="",country="CN",product="sms",result="unknown"} 1`,
		`phonenumber_aliyun_duration_seconds_count{product="sms",result="accepted"} 2`,
	)
	if strings.Contains(scraped, "654321") || strings.Contains(scraped, "18600000000") {
		t.Error("got a code or a number in the metrics, want none")
	}
}

func TestMetrics_BoundTheAliyunCodes(t *testing.T) {
	m := NewMetrics("test")
	maxAliyunCodes := m.aliyunCodes.max
	steps := Telemetry{Metrics: m, Log: slog.New(slog.DiscardHandler)}
	for i := range 10 * maxAliyunCodes {
		steps.Sender(sender{err: &verify.SendError{Kind: verify.SendRejected, ProviderCode: fmt.Sprint("isv.", i)}}).Send(t.Context(),
			verify.Message{Number: "+8618600000000"})
	}
	scraped := scrape(t, m)
	if got := strings.Count(scraped, "phonenumber_sends_total{"); got != maxAliyunCodes+1 {
		t.Errorf("got %d series, want %d, and one for all other codes", got, maxAliyunCodes)
	}
	mustHave(t, scraped, fmt.Sprintf(`phonenumber_sends_total{aliyun_code="other",caller="",country="CN",product="sms",result="rejected"} %d`, 9*maxAliyunCodes))
}

func TestMetrics_CountVerificationsByOutcome(t *testing.T) {
	m := NewMetrics("test")
	for _, found := range []verify.Verification{
		{},
		{Result: verify.Mismatch},
		{Result: verify.Expired},
		{Result: verify.Exhausted},
		{Result: verify.Match, After: 7 * time.Second},
	} {
		m.ObserveCheck(t.Context(), "+8618600000000", found)
	}
	scraped := scrape(t, m)
	for _, outcome := range []string{"no_code", "match", "mismatch", "expired", "exhausted"} {
		mustHave(t, scraped, `phonenumber_verifications_total{caller="",country="CN",outcome="`+outcome+`"} 1`)
	}
	mustHave(t, scraped, `phonenumber_send_to_verification_seconds_bucket{le="5"} 0`,
		`phonenumber_send_to_verification_seconds_bucket{le="10"} 1`, `phonenumber_send_to_verification_seconds_count 1`)
}

type storeOf struct {
	done bool
	err  error
}

func (s storeOf) Load(context.Context, verify.Number) (verify.Record, error) {
	return verify.Record{}, s.err
}

func (s storeOf) Swap(context.Context, verify.Number, verify.Version, verify.Record) (bool, error) {
	return s.done, s.err
}

func TestMetrics_CountDatabaseStepsByResult(t *testing.T) {
	m := NewMetrics("test")
	steps := Telemetry{Metrics: m, Log: slog.New(slog.DiscardHandler)}
	for _, s := range []storeOf{{done: true}, {}, {err: errors.New("1205")}, {err: fmt.Errorf("lost: %w", verify.ErrOutcomeUnknown)}} {
		w := steps.Store(s)
		if done, err := w.Swap(t.Context(), "+1", verify.Version{}, verify.Record{}); done != s.done || !errors.Is(err, s.err) {
			t.Errorf("Swap = %v, %v; want %v, %v as from the store", done, err, s.done, s.err)
		}
		if _, err := w.Load(t.Context(), "+1"); !errors.Is(err, s.err) {
			t.Errorf("Load = %v; want %v as from the store", err, s.err)
		}
	}
	mustHave(t, scrape(t, m),
		`phonenumber_database_duration_seconds_count{operation="swap",result="ok"} 1`,
		`phonenumber_database_duration_seconds_count{operation="swap",result="conflict"} 1`,
		`phonenumber_database_duration_seconds_count{operation="swap",result="error"} 1`,
		`phonenumber_database_duration_seconds_count{operation="swap",result="unknown"} 1`,
		`phonenumber_database_duration_seconds_count{operation="load",result="ok"} 2`,
		`phonenumber_database_duration_seconds_count{operation="load",result="error"} 1`,
	)
}

func TestMetrics_DropRemovedCallers(t *testing.T) {
	m := NewMetrics("test")
	steps := Telemetry{Metrics: m, Log: slog.New(slog.DiscardHandler)}
	for _, name := range []string{"login", "shop", auth.Unknown} {
		ctx := WithCaller(t.Context(), name)
		_, end := steps.BeginCall(ctx, "/phonenumberservice.PhoneNumberService/Valid")
		end(codes.OK, "")
		m.ObserveCheck(ctx, "+8618600000000", verify.Verification{})
		steps.Sender(sender{}).Send(ctx, verify.Message{Number: "+8618600000000"})
	}
	m.KeepCallers([]string{"shop"})
	scraped := scrape(t, m)
	if strings.Contains(scraped, `caller="login"`) {
		t.Error("got the removed caller login in the metrics, want it gone")
	}
	for _, kept := range []string{"shop", auth.Unknown} {
		mustHave(t, scraped,
			`phonenumber_call_duration_seconds_count{caller="`+kept+`",method="Valid",status="OK"} 1`,
			`phonenumber_verifications_total{caller="`+kept+`",country="CN",outcome="no_code"} 1`,
			`phonenumber_sends_total{aliyun_code="OK",caller="`+kept+`",country="CN",product="sms",result="accepted"} 1`)
	}
}

// Callers that come and go never fill the set. Each has its own label while fewer callers than
// the maximum are in use.
func TestMetrics_GiveARemovedCallersPlaceToANewOne(t *testing.T) {
	m := NewMetrics("test")
	for i := range 3 * m.callers.max {
		name := fmt.Sprint("caller-", i)
		if got := m.caller(WithCaller(t.Context(), name)); got != name {
			t.Fatalf("caller %d: got %q; want its name", i, got)
		}
		m.KeepCallers(nil)
	}
}

// Client certificates with new names are issued without end, and there is no callers file whose
// changes remove a name.
func TestMetrics_GiveAnIdleCallersPlaceToANewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics("test")
		tel := Telemetry{Metrics: m}
		call := func(name string) {
			_, end := tel.BeginCall(WithCaller(t.Context(), name), "/phonenumberservice.PhoneNumberService/Valid")
			end(codes.OK, "")
		}
		for i := range m.callers.max {
			call(fmt.Sprint("caller-", i))
		}
		time.Sleep(labelIdleTime - time.Second)
		for i := range m.callers.max - 1 {
			call(fmt.Sprint("caller-", i))
		}
		call("early")
		time.Sleep(time.Second)
		call("late")
		call("later")
		const of = `phonenumber_call_duration_seconds_count{caller="%s",method="Valid",status="OK"} %d`
		scraped := scrape(t, m)
		mustHave(t, scraped, fmt.Sprintf(of, "caller-0", 2), fmt.Sprintf(of, "late", 1), fmt.Sprintf(of, auth.Other, 2))
		if idle := fmt.Sprintf(`caller="caller-%d"`, m.callers.max-1); strings.Contains(scraped, idle) {
			t.Errorf("got %s in the metrics; want it gone after an hour without a call", idle)
		}
	})
}

func TestMetrics_CountUnknownApartIfTheSetIsFull(t *testing.T) {
	m := NewMetrics("test")
	for i := range 2 * m.callers.max {
		m.caller(WithCaller(t.Context(), fmt.Sprint("caller-", i)))
	}
	for name, want := range map[string]string{"one more": auth.Other, auth.Unknown: auth.Unknown} {
		if got := m.caller(WithCaller(t.Context(), name)); got != want {
			t.Errorf("%s: got %q; want %q", name, got, want)
		}
	}
}
