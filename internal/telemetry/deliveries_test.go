package telemetry

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var sampled = verify.Message{Number: "+8618612345678", SignName: "Acme", TemplateCode: "SMS_1", Code: "493817"}

func TestDeliveries_AskUpToThreeTimes(t *testing.T) {
	const never = time.Hour
	for name, c := range map[string]struct {
		answers time.Duration // when the carrier answers
		err     error         // of each question
		want    []time.Duration
		outcome string
	}{
		"an answer at once":     {0, nil, []time.Duration{15 * time.Second}, "delivered"},
		"an answer in time":     {30 * time.Second, nil, []time.Duration{15 * time.Second, time.Minute}, "delivered"},
		"a late answer":         {2 * time.Minute, nil, []time.Duration{15 * time.Second, time.Minute, 5 * time.Minute}, "delivered"},
		"no answer":             {never, nil, []time.Duration{15 * time.Second, time.Minute, 5 * time.Minute}, "waiting"},
		"a question that fails": {0, &sms.QueryError{}, []time.Duration{15 * time.Second, time.Minute, 5 * time.Minute}, "unknown"},
		"no right":              {0, &sms.QueryError{Code: "NoPermission"}, []time.Duration{15 * time.Second}, "unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				var asked []time.Duration
				m := NewMetrics("test")
				ask := func(_ context.Context, p sms.Product, n verify.Number, day time.Time, bizID string) ([]sms.Delivery, error) {
					asked = append(asked, time.Since(start))
					if p != sms.SMS || n != sampled.Number || !day.Equal(start) || bizID != "1^0" {
						t.Errorf("asked for %s, %s, %v, %s; want %s, %s, %v, 1^0", p, n, day, bizID, sms.SMS, sampled.Number, start)
					}
					switch {
					case c.err != nil:
						return nil, c.err
					case time.Since(start) < c.answers:
						return []sms.Delivery{{Status: sms.Waiting, SentAt: start}}, nil
					}
					return []sms.Delivery{{Status: sms.Delivered, ErrorCode: "DELIVERED", SentAt: start, ReceivedAt: start.Add(c.answers)}}, nil
				}
				d := NewDeliveries(t.Context(), ask, 1, slog.New(slog.DiscardHandler))
				m.Register(d.Collectors()...)
				d.Accepted(t.Context(), sampled, verify.Receipt{BizID: "1^0"})
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if !slices.Equal(asked, c.want) {
					t.Errorf("got questions after %v; want %v", asked, c.want)
				}
				got := scrape(t, m)
				if strings.Count(got, "\nphonenumber_deliveries_total{") != 1 || !strings.Contains(got, `outcome="`+c.outcome+`",product="sms"} 1`) {
					t.Errorf("got other metrics than one %s:\n%s", c.outcome, got)
				}
			})
		})
	}
}

// followed returns Deliveries, and the times at which they began to follow an SMS.
func followed(ctx context.Context, share float64) (d *Deliveries, times func() []time.Time) {
	var mu sync.Mutex
	var all []time.Time
	d = NewDeliveries(ctx, func(context.Context, sms.Product, verify.Number, time.Time, string) ([]sms.Delivery, error) {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, time.Now().Add(-d.after[0]))
		return []sms.Delivery{{Status: sms.Delivered}}, nil
	}, share, slog.New(slog.DiscardHandler))
	return d, func() []time.Time {
		time.Sleep(d.after[0])
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

func TestDeliveries_FollowTheShare(t *testing.T) {
	for share, c := range map[float64]struct{ sends, least, most int }{
		0: {1000, 0, 0}, 0.02: {1000, 1, 60}, 1: {50, 50, 50},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			d, times := followed(ctx, share)
			for range c.sends {
				d.Accepted(ctx, sampled, verify.Receipt{BizID: "1^0"})
			}
			before := len(times())
			if before < c.least || before > c.most {
				t.Errorf("share %v of %d sends at once: got %d; want %d to %d", share, c.sends, before, c.least, c.most)
			}
			d.Accepted(ctx, sampled, verify.Receipt{BizID: "1^0"})
			stop()
			if got := len(times()); got != before {
				t.Errorf("share %v, after the end: got %d more questions; want none", share, got-before)
			}
		})
	}
}

func TestDeliveries_Follow60InAnyMinute(t *testing.T) {
	for name, perSecond := range map[string]int{"one send a second": 1, "ten sends a second": 10, "a thousand sends a second": 1000} {
		synctest.Test(t, func(t *testing.T) {
			d, times := followed(t.Context(), 1)
			const minutes = 5
			for range 60 * minutes {
				for range perSecond {
					d.Accepted(t.Context(), sampled, verify.Receipt{BizID: "1^0"})
				}
				time.Sleep(time.Second)
			}
			all := times()
			if len(all) != 60*minutes {
				t.Errorf("%s: got %d in %d minutes; want 60 a minute", name, len(all), minutes)
			}
			for i := range max(0, len(all)-60) {
				if between := all[i+60].Sub(all[i]); between < time.Minute {
					t.Errorf("%s: got 61 within %v; want at most 60 in a minute", name, between)
					break
				}
			}
		})
	}
}

// newAliyun returns a Sender for the gateways of fake.
func newAliyun(t *testing.T, fake *dysmsapitest.Server) *sms.Aliyun {
	t.Helper()
	aliyun, err := sms.NewAliyun(sms.AliyunConfig{
		Credentials: sms.Credentials{AccessKeyID: fake.AccessKeyID, AccessKeySecret: fake.AccessKeySecret},
		Endpoint:    fake.URL, PNVSEndpoint: fake.PNVSURL, CodeTTL: time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	return aliyun
}

func TestDeliveries_AreCountedAndLoggedWithoutCodes(t *testing.T) {
	fake := dysmsapitest.New(t)
	aliyun := newAliyun(t, fake)
	var log testutil.Output
	m := NewMetrics("test")
	d := NewDeliveries(t.Context(), aliyun.Deliveries, 1, slog.New(NewLogHandler(slog.NewTextHandler(&log, nil))))
	d.after = []time.Duration{time.Millisecond}
	m.Register(d.Collectors()...)
	aliyun.OnAccepted = d.Accepted
	healthy := dysmsapitest.Delay(0)
	for i, c := range []struct {
		number, template string
		receipt          dysmsapitest.Receipt
		fault            dysmsapitest.Fault
		labels, line     string
	}{
		{
			"+8618612345678", "SMS_1",
			dysmsapitest.Receipt{},
			healthy,
			`error_code="DELIVERED",country="CN",outcome="delivered",product="sms"`, "",
		},
		{
			"+8618612345678", "100001",
			dysmsapitest.Receipt{Code: "MOBILE_NOT_ON_SERVICE"},
			healthy,
			`error_code="MOBILE_NOT_ON_SERVICE",country="CN",outcome="failed",product="pnvs"`,
			`msg="SMS not delivered" outcome=failed error_code=MOBILE_NOT_ON_SERVICE number=+86186****5678 country=CN product=pnvs ` +
				`sign_name=Acme template_code=100001 biz_id=`,
		},
		{
			"+85261234567", "SMS_1",
			dysmsapitest.Receipt{After: time.Hour},
			healthy,
			`error_code="none",country="HK",outcome="waiting",product="sms"`,
			`msg="SMS not delivered" outcome=waiting error_code=none number=+852****4567 country=HK product=sms ` +
				`sign_name=Acme template_code=SMS_1 biz_id=`,
		},
		{
			"+8618612345678", "SMS_1",
			dysmsapitest.Receipt{},
			dysmsapitest.Reply(200, "isp.RAM_PERMISSION_DENY", "493817"),
			`error_code="isp.RAM_PERMISSION_DENY",country="CN",outcome="unknown",product="sms"`,
			`msg="failed to ask if an SMS was delivered" product=sms needs=dysms:QuerySendDetails ` +
				`error="rejected by Aliyun, code isp.RAM_PERMISSION_DENY" request_id=`,
		},
		{
			"+85261234567", "SMS_1",
			dysmsapitest.Receipt{Code: "网关 拒绝"},
			healthy,
			`error_code="other",country="HK",outcome="failed",product="sms"`,
			`msg="SMS not delivered" outcome=failed error_code="网关 拒绝" number=`,
		},
		{
			"+85261234567", "SMS_1",
			dysmsapitest.Receipt{Code: "X493817"},
			healthy,
			`error_code="hidden",country="HK",outcome="failed",product="sms"`,
			`msg="SMS not delivered" outcome=failed error_code=hidden number=`,
		},
		{
			"+85261234567", "SMS_1",
			dysmsapitest.Receipt{},
			dysmsapitest.Body(200, "application/json", `{"Code":"OK","SmsSendDetailDTOs":{"SmsSendDetailDTO":[`+
				`{"SendStatus":3,"ErrCode":"DELIVERED","SendDate":"2026-11-25 12:00:00"}]}}`),
			`error_code="DELIVERED",country="HK",outcome="delivered",product="sms"`, "",
		},
	} {
		fake.SetReceipts(func(dysmsapitest.Accepted) dysmsapitest.Receipt { return c.receipt })
		fake.FailQueries(c.fault)
		before := log.String()
		_, err := aliyun.Send(WithCaller(t.Context(), "shop"), verify.Message{
			Number: verify.Number(c.number), SignName: "Acme", TemplateCode: c.template, Code: "493817",
		})
		if err != nil {
			t.Fatal(err)
		}
		var scraped string
		testutil.Eventually(t, fmt.Sprintf("%d outcomes", i+1), func() bool {
			scraped = scrape(t, m)
			return strings.Count(scraped, "\nphonenumber_deliveries_total{") == i+1
		})
		for _, label := range strings.Split(c.labels, ",") {
			if !strings.Contains(scraped, label) {
				t.Errorf("%s: got metrics without %s", c.labels, label)
			}
		}
		if c.line == "" {
			continue
		}
		testutil.Eventually(t, "a log line", func() bool { return log.String() != before })
		if got := strings.TrimPrefix(log.String(), before); !strings.Contains(got, c.line) || !strings.Contains(got, "caller=shop") {
			t.Errorf("got the line %s; want %s… and the caller", got, c.line)
		}
		if strings.Contains(log.String()+scraped, "493817") || strings.Contains(log.String(), "12345678") {
			t.Errorf("got a code or a number in\n%s%s", log.String(), scraped)
		}
	}
	mustHave(t, scrape(t, m), `phonenumber_send_to_delivery_seconds_count{country="CN",product="sms"} 1`)
	if strings.Contains(scrape(t, m), `phonenumber_send_to_delivery_seconds_count{country="HK"`) {
		t.Error("a record without the time of delivery: got a duration; want none")
	}
}

// Each answer has its own RequestId, so it must not be in an attribute that the handler compares.
func TestDeliveries_EqualFailuresAreSuppressed(t *testing.T) {
	fake := dysmsapitest.New(t)
	aliyun := newAliyun(t, fake)
	fake.FailQueries(dysmsapitest.Reply(200, "isp.RAM_PERMISSION_DENY", "x"))
	var log testutil.Output
	handler := NewLogHandler(slog.NewTextHandler(&log, nil))
	d := NewDeliveries(t.Context(), aliyun.Deliveries, 1, slog.New(handler))
	d.after = []time.Duration{0}
	const more = 5
	for range maxPerWindow + more {
		d.follow(t.Context(), sampled, "1^0", time.Now())
	}
	handler.Flush()
	const line = `msg="failed to ask if an SMS was delivered"`
	if got := log.Count(line); got != maxPerWindow {
		t.Errorf("got %d lines; want %d:\n%s", got, maxPerWindow, &log)
	}
	if got := log.Count("similar log lines suppressed"); got != 1 || log.Count(fmt.Sprint(" count=", more, " ")) != 1 {
		t.Errorf("got %d lines with the number of the others; want 1 of %d:\n%s", got, more, &log)
	}
	for _, id := range fake.RequestIDs()[:maxPerWindow] {
		if !log.Contains("request_id=" + id) {
			t.Errorf("got no line of the RequestId %s; want one", id)
		}
	}
}
