package ramrole

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/sms/ramrole/ststest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// start runs a Renewer until the test ends.
func start(t *testing.T, source Source, use func(sms.Credentials) error) (*Renewer, *testutil.Output) {
	log := &testutil.Output{}
	r := NewRenewer(source, use, slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { r.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return r, log
}

// A service sends SMS of both products with the credentials of a source.
type service struct {
	gateway *dysmsapitest.Server
	aliyun  *sms.Aliyun
	renewer *Renewer
	log     *testutil.Output
}

func startService(t *testing.T, fake *ststest.Server, source Source) service {
	gateway := dysmsapitest.New(t)
	gateway.SetIssuer(fake.Issued)
	a, err := sms.NewAliyun(sms.AliyunConfig{Endpoint: gateway.URL, PNVSEndpoint: gateway.PNVSURL, CodeTTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	s := service{gateway: gateway, aliyun: a}
	s.renewer, s.log = start(t, source, a.ReplaceCredentials)
	a.OnExpired = s.renewer.Expired
	return s
}

func (s service) waitUntilReady(t *testing.T) {
	t.Helper()
	testutil.Eventually(t, "the first credentials are in use", func() bool { return s.aliyun.Ready() == nil })
}

func (s service) send(t *testing.T, template string) error {
	_, err := s.aliyun.Send(t.Context(), verify.Message{Number: "+8618612345678", SignName: "签名", TemplateCode: template, Code: "493817"})
	return err
}

func TestRenewer_RenewsUnderLoadWithoutAFailedSend(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"oidc_role_arn", "ecs_ram_role"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			fake := ststest.New(t)
			fake.SetLifetime(5 * time.Second)
			var source Source
			for _, source = range sources(t, fake) {
				if source.Provider() == kind {
					break
				}
			}
			s := startService(t, fake, source)
			s.waitUntilReady(t)
			var load sync.WaitGroup
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			for i := range 8 {
				load.Go(func() {
					for ctx.Err() == nil {
						if err := s.send(t, []string{"SMS_1", "100001"}[i%2]); err != nil {
							t.Errorf("got %v; want nil", err)
						}
					}
				})
			}
			const lifetimes = 2
			begun := time.Now()
			testutil.Eventually(t, "two lifetimes of credentials are over", func() bool { return time.Since(begun) > lifetimes*5*time.Second })
			stop()
			load.Wait()
			sets := strings.Count(s.log.String(), "fetched Aliyun credentials")
			if sets < 4*lifetimes-2 {
				t.Errorf("got %d sets in %d lifetimes; want one for each quarter", sets, lifetimes)
			}
			t.Logf("%d sends with %d sets", len(s.gateway.Accepted()), sets)
			for _, secret := range fake.Secrets() {
				if strings.Contains(s.log.String(), secret) {
					t.Errorf("the log has %s; want no secret", secret)
				}
			}
		})
	}
}

// The outage begins before a set is renewed, and is longer than the set's life.
func TestRenewer_UsesASetWhileItLastsInAnOutage(t *testing.T) {
	t.Parallel()
	fake := ststest.New(t)
	const lifetime = 4 * time.Second
	fake.SetLifetime(lifetime)
	source, _ := oidc(t, fake)
	s := startService(t, fake, source)
	s.waitUntilReady(t)
	fetched := time.Now()
	fake.Break(ststest.Body(503, `{"Code":"ServiceUnavailable"}`))
	for time.Since(fetched) < lifetime-500*time.Millisecond {
		if err := s.send(t, "SMS_1"); err != nil {
			t.Fatalf("%v after the fetch: got %v; want nil while the set lasts", time.Since(fetched), err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	var e *verify.SendError
	testutil.Eventually(t, "the set has ended", func() bool { return errors.As(s.send(t, "SMS_1"), &e) })
	if e.ProviderCode != "InvalidSecurityToken.Expired" || e.Kind != verify.SendRejected {
		t.Errorf("got %s, kind %v; want InvalidSecurityToken.Expired, rejected", e.ProviderCode, e.Kind)
	}
	if err := s.aliyun.Ready(); err != nil {
		t.Errorf("after the set's end: got %v; want ready, since codes can be checked", err)
	}
	fake.Break(nil)
	testutil.Eventually(t, "sends work again", func() bool { return s.send(t, "SMS_1") == nil })
	if !s.log.Contains(`failed to fetch Aliyun credentials" provider=oidc_role_arn error="STS: HTTP 503, ServiceUnavailable"`) {
		t.Errorf("got the log %q; want the cause of the failure", s.log)
	}
}

func TestRenewer_ExpiredAnswerRenewsAtOnceAndOnce(t *testing.T) {
	t.Parallel()
	fake := ststest.New(t)
	source, _ := oidc(t, fake)
	s := startService(t, fake, source)
	s.waitUntilReady(t)
	// The gateway has another opinion of the first set's end than STS.
	var mu sync.Mutex
	ended := map[string]bool{}
	s.gateway.SetIssuer(func(id string) (dysmsapitest.Issued, bool) {
		issued, ok := fake.Issued(id)
		mu.Lock()
		defer mu.Unlock()
		if ended[id] {
			issued.Expires = time.Now()
		}
		return issued, ok
	})
	end := func() {
		mu.Lock()
		defer mu.Unlock()
		for _, id := range fake.Secrets() {
			ended[id] = true
		}
	}
	end()
	if s.send(t, "SMS_1") == nil {
		t.Fatal("the first send after the end: got nil; want an error")
	}
	testutil.Eventually(t, "sends work again", func() bool { return s.send(t, "SMS_1") == nil })
	if n := fake.Requests(); n != 2 {
		t.Errorf("got %d requests to STS; want 2: the first fetch and one renewal", n)
	}

	// If STS is down, further rejections of the same set cause no further request at once.
	fake.Break(ststest.HangUp)
	end()
	for range 100 {
		s.send(t, "100001")
	}
	testutil.Eventually(t, "STS was asked", func() bool { return fake.Requests() >= 3 })
	// On a slow machine the renewer may retry, after 1, 3, 7 seconds and so on.
	if n := fake.Requests(); n > 10 {
		t.Errorf("got %d requests to STS after 100 rejected sends; want 3 and some retries", n)
	}
}

// A scriptedSource issues sets without a network, for tests in a bubble with its own time.
type scriptedSource struct {
	lifetime time.Duration
	down     func() bool
	fetches  atomic.Int64
}

func (s *scriptedSource) Provider() string { return "scripted" }

func (s *scriptedSource) Fetch(context.Context) (Set, error) {
	n := s.fetches.Add(1)
	if s.down() {
		return Set{}, errors.New("down")
	}
	return Set{
		Credentials: sms.Credentials{AccessKeyID: fmt.Sprint("STS.N", n), AccessKeySecret: "secret", SecurityToken: "token"},
		Expires:     time.Now().Add(s.lifetime), Lifetime: s.lifetime,
	}, nil
}

// An hour is the default lifetime. Wherever an outage of an hour begins, three quarters of a set's
// life are left, and a new set is there a minute after its end.
func TestRenewer_OutageOfAnHourLeavesThreeQuarters(t *testing.T) {
	for begin := time.Duration(0); begin < 30*time.Minute; begin += 5 * time.Minute {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			outage := func() bool {
				at := time.Since(began)
				return at >= begin+time.Second && at < begin+time.Second+time.Hour
			}
			source := &scriptedSource{lifetime: time.Hour, down: outage}
			var ends atomic.Int64 // when the set in use ends
			left := func() time.Duration { return time.Until(time.Unix(ends.Load(), 0)) }
			start(t, source, func(sms.Credentials) error { ends.Store(time.Now().Add(time.Hour).Unix()); return nil })
			time.Sleep(begin + time.Second)
			synctest.Wait()
			if left() < 44*time.Minute {
				t.Errorf("outage at %v: got %v left of the set; want 45 minutes", begin, left())
			}
			before := source.fetches.Load()
			time.Sleep(time.Hour)
			synctest.Wait()
			if tries := source.fetches.Load() - before; tries > 70 {
				t.Errorf("got %d fetches in the outage; want one a minute", tries)
			}
			time.Sleep(maxRetryWait)
			synctest.Wait()
			if left() < 58*time.Minute {
				t.Errorf("a minute after the outage: got a set with %v left; want a new one", left())
			}
		})
	}
}

// A reply with a wrong time can claim any lifetime.
func TestRenewer_AsksOnceAnHourAtLeast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &scriptedSource{lifetime: 10000 * time.Hour, down: func() bool { return false }}
		start(t, source, func(sms.Credentials) error { return nil })
		time.Sleep(3*time.Hour + time.Minute)
		synctest.Wait()
		if n := source.fetches.Load(); n != 4 {
			t.Errorf("got %d fetches in three hours; want 4", n)
		}
	})
}

// A cachingSource returns one set until the test renews it, as the metadata service does. It records the
// fetches, and the sets in use.
type cachingSource struct {
	began   time.Time
	renewAt int // the number of the fetch that gets a new set

	mu      sync.Mutex
	number  int             // of the set
	fetches []time.Duration // the times since began
	used    []string
}

func (s *cachingSource) Provider() string { return "caching" }

func (s *cachingSource) Fetch(context.Context) (Set, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fetches = append(s.fetches, time.Since(s.began))
	if len(s.fetches) == s.renewAt {
		s.number++
	}
	const lifetime = 6 * time.Hour
	return Set{
		Credentials: sms.Credentials{AccessKeyID: fmt.Sprint("STS.N", s.number)}, Expires: s.began.Add(lifetime), Lifetime: lifetime,
	}, nil
}

func (s *cachingSource) use(c sms.Credentials) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used = append(s.used, c.AccessKeyID)
	return nil
}

// give makes later fetches return the set with a number.
func (s *cachingSource) give(number int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.number = number
}

// seen returns the fetches and the sets in use after all goroutines are blocked.
func (s *cachingSource) seen() (fetches []time.Duration, used []string) {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.fetches), slices.Clone(s.used)
}

func TestRenewer_RetriesWhileItGetsTheRejectedSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &cachingSource{began: time.Now(), renewAt: 3}
		r, log := start(t, source, source.use)
		for range 10 { // a send of each minute is rejected, until there is a new set
			time.Sleep(time.Minute)
			if _, used := source.seen(); used[len(used)-1] == "STS.N0" {
				r.Expired(sms.Credentials{AccessKeyID: "STS.N0"})
			}
		}
		fetches, _ := source.seen()
		if want := []time.Duration{0, time.Minute, time.Minute + minWait}; !slices.Equal(fetches, want) {
			t.Errorf("got fetches after %v; want %v", fetches, want)
		}
		want := `level=WARN msg="failed to fetch Aliyun credentials" provider=caching error="` + errRejected.Error() + `"`
		if got := log.Count(want); got != 1 {
			t.Errorf("got %d lines %s; want 1:\n%s", got, want, log)
		}

		r.Expired(sms.Credentials{AccessKeyID: "STS.N1"})
		time.Sleep(30 * time.Minute)
		later, _ := source.seen()
		if n := len(later) - len(fetches); n < 30 || n > 40 {
			t.Errorf("half an hour without a new set: got %d fetches; want one a minute", n)
		}
		source.give(2)
		time.Sleep(maxRetryWait)
		if _, used := source.seen(); !slices.Equal(used, []string{"STS.N0", "STS.N1", "STS.N2"}) {
			t.Errorf("a minute after there is a new set: got %v in use; want three sets in turn", used)
		}
	})
}

// The set in use is a newer one, so the rejected one must not replace it.
func TestRenewer_NeverReturnsToARejectedSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &cachingSource{began: time.Now(), renewAt: 2}
		r, _ := start(t, source, source.use)
		synctest.Wait()
		r.Expired(sms.Credentials{AccessKeyID: "STS.N0"})
		synctest.Wait()
		source.give(0)
		time.Sleep(2 * maxWait)
		if _, used := source.seen(); !slices.Equal(used, []string{"STS.N0", "STS.N1"}) {
			t.Errorf("got %v in use; want STS.N0, then STS.N1", used)
		}
	})
}

func TestRenewer_FetchesTheFirstSetUntilItSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		down.Store(true)
		var got sms.Credentials
		source := &scriptedSource{lifetime: time.Hour, down: down.Load}
		r, _ := start(t, source, func(c sms.Credentials) error { got = c; return nil })
		time.Sleep(time.Hour)
		synctest.Wait()
		if got != (sms.Credentials{}) {
			t.Errorf("without a set: got %+v in use; want none", got)
		}
		down.Store(false)
		time.Sleep(maxRetryWait)
		synctest.Wait()
		if got == (sms.Credentials{}) {
			t.Error("with a set: got none in use; want it")
		}
		var m dto.Metric
		if err := r.expiry.WithLabelValues().Write(&m); err != nil {
			t.Fatal(err)
		}
		if left := time.Until(time.Unix(int64(m.GetGauge().GetValue()), 0)); left < 59*time.Minute-maxRetryWait || left > time.Hour {
			t.Errorf("the metric: got an end in %v; want an hour", left)
		}
	})
}
