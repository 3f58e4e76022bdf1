package server_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestLog_EveryCallHasOneLineWithAMaskedNumber(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Limits(true)
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), aliyun(t, fake))
	r.MustSend(t, "18699998888")
	code := fake.LastCode(t, "18699998888")
	r.IsValid(t, "18699998888", code)
	r.Post(t, "Valid", `{"phone_number":"+86 186 9999 8888","code":"`+code+`"}`)
	r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "10086"})
	r.SendSMS(t.Context(), servertest.SendRequest("18699998888")) // within the minute
	var calls []string
	for line := range strings.Lines(r.Log.String()) {
		if strings.Contains(line, "msg=call") {
			calls = append(calls, line)
		}
	}
	wants := [][]string{
		{
			"level=INFO", "method=SendSMS", "status=OK", "duration_ms=", "peer=127.0.0.1", "number=+86186****8888", "country=CN", "result=accepted",
			"aliyun_code=OK", "biz_id=" + fake.Accepted()[0].BizID, "request_id=" + fake.RequestIDs()[0],
		},
		{"method=Valid", "status=OK", "peer=127.0.0.1", "number=+86186****8888", "outcome=match"},
		{"method=Valid", "status=OK", "peer=127.0.0.1", "number=+86186****8888", "outcome=no_code"},
		{"method=Valid", "status=InvalidArgument", "peer=127.0.0.1", "error=\"phone_number must be one mobile number"},
		{
			"method=SendSMS", "status=ResourceExhausted", "number=+86186****8888", "result=limited", "aliyun_code=isv.BUSINESS_LIMIT_CONTROL",
			"request_id=" + fake.RequestIDs()[1], "error=\"sms: rejected by Aliyun",
		},
	}
	if len(calls) != len(wants) {
		t.Fatalf("log lines of calls: got %d; want %d:\n%s", len(calls), len(wants), strings.Join(calls, ""))
	}
	for i, want := range wants {
		for _, w := range want {
			if !strings.Contains(calls[i], w) {
				t.Errorf("line %d: got %s; want %s", i+1, calls[i], w)
			}
		}
	}
	for _, secret := range []string{code, "99998888"} {
		if strings.Contains(strings.Join(calls, ""), secret) {
			t.Errorf("the log contains %s", secret)
		}
	}
}

// A call whose deadline passes during a slow Load is logged at INFO as the caller's doing.
func TestLog_CallerDeadlineIsNoDatabaseOutage(t *testing.T) {
	db := servertest.OpenStore(t, "sqlite::memory:")
	r := servertest.Start(t, db, &dev.Inbox{}, func(c *server.Config) { c.Verifier.Store = slowStore{db} })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	r.SendSMS(ctx, servertest.SendRequest("18600000000"))
	testutil.Eventually(t, "the log reports that the caller went away", func() bool {
		log := r.Log.String()
		return strings.Contains(log, "level=INFO msg=call method=SendSMS") && strings.Contains(log, "the caller went away")
	})
}

// A slowStore takes 100 ms for a Load.
type slowStore struct{ verify.Store }

func (s slowStore) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	time.Sleep(time.Second)
	return s.Store.Load(ctx, n)
}
