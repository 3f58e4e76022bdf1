package cli

import (
	"slices"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// inspected is the time of inspect in these tests. A day in Beijing has begun, and none in UTC.
var inspected = time.Date(2026, 11, 25, 2, 0, 0, 0, sms.Beijing)

// deliveriesOf sends an SMS at each of the times before inspected, with the products in turn, and
// returns the report of inspect. The last send is stored as accepted.
func deliveriesOf(t *testing.T, fake *dysmsapitest.Server, ago ...time.Duration) report {
	t.Helper()
	const number = "+8618612345678"
	t.Setenv("ALIYUN_ACCESS_KEY_ID", fake.AccessKeyID)
	t.Setenv("ALIYUN_ACCESS_KEY_SECRET", fake.AccessKeySecret)
	settings := config.Aliyun{Endpoint: fake.URL, PNVSEndpoint: fake.PNVSURL}
	sender, _, err := newAliyun(settings, time.Minute, map[string]string{
		config.AccessKeyID: fake.AccessKeyID, config.AccessKeySecret: fake.AccessKeySecret,
	})
	if err != nil {
		t.Fatal(err)
	}
	r := report{number: number, now: inspected}
	for i, d := range ago {
		at := inspected.Add(-d)
		fake.SetClock(func() time.Time { return at })
		m := verify.Message{Number: number, SignName: "Acme", TemplateCode: []string{"SMS_1", "100001"}[i%2], Code: "493817"}
		if _, err := sender.Send(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		r.History.Accepted.At = at.UnixMicro()
	}
	fake.SetClock(func() time.Time { return inspected })
	(&inspectCommand{Rules: config.Rules{CodeTTL: time.Minute}, Aliyun: settings}).askAliyun(t.Context(), &r)
	if len(r.unanswered) > 0 {
		t.Fatalf("got %+v; want an answer to each question", r.unanswered)
	}
	return r
}

func TestInspect_ShowsTheLastAcceptedSend(t *testing.T) {
	const day = 24 * time.Hour
	for ago, c := range map[time.Duration]struct{ shown, queries int }{
		time.Hour:          {1, 4}, // today and yesterday, of both products
		3 * time.Hour:      {1, 4}, // yesterday in Beijing
		day + time.Hour:    {1, 4},
		40 * time.Hour:     {1, 6}, // two days ago in Beijing: also that day
		2 * day:            {1, 6},
		29 * day:           {1, 6},
		30*day + time.Hour: {0, 4}, // Aliyun has no record of it
	} {
		fake := dysmsapitest.New(t)
		r := deliveriesOf(t, fake, ago)
		if len(r.deliveries) != c.shown || c.shown == 1 && !r.deliveries[0].SentAt.Equal(inspected.Add(-ago)) {
			t.Errorf("%v ago: got %+v; want %d", ago, r.deliveries, c.shown)
		}
		if n := fake.Queries(); n != c.queries {
			t.Errorf("%v ago: got %d questions; want %d", ago, n, c.queries)
		}
	}
}

func TestInspect_ShowsTheTenNewestSends(t *testing.T) {
	var ago []time.Duration
	for i := range 11 { // on three days
		ago = append(ago, time.Duration(50-5*i)*time.Hour)
	}
	// The last accepted send of the row is the oldest, as after lost answers.
	r := deliveriesOf(t, dysmsapitest.New(t), append(ago[1:], ago[0])...)
	var got []time.Duration
	for _, d := range r.deliveries {
		got = append(got, inspected.Sub(d.SentAt))
	}
	want := ago[1:]
	slices.Reverse(want)
	if !slices.Equal(got, want) {
		t.Errorf("got sends %v ago; want %v", got, want)
	}
}
