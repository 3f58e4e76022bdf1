package server_test

import (
	"fmt"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const secretText = "LTAI canonical request with phone and code"

func reply(code string) dysmsapitest.Fault { return dysmsapitest.Reply(200, code, secretText) }

// For each row of the table in docs/errors.md, the test checks the status, the number of sent
// SMS, and the codes that are valid afterwards.
func TestSendSMS_EveryAliyunOutcomeHasItsStatus(t *testing.T) {
	const (
		own = "phone-number-service"
		ali = "aliyun.com"
	)
	limit := func(tier string) dysmsapitest.Fault {
		return dysmsapitest.Reply(200, "isv.BUSINESS_LIMIT_CONTROL", tier)
	}
	type row struct {
		name   string
		fault  dysmsapitest.Fault
		code   codes.Code
		domain string
		reason string
		retry  time.Duration
		sent   int // SMS; its code must be valid
		field  string
	}
	rows := []row{
		{"limit by minute", limit("触发分钟级流控Permits:1"), codes.ResourceExhausted, ali, "isv.BUSINESS_LIMIT_CONTROL", time.Minute, 0, ""},
		{"limit by hour", limit("触发小时级流控Permits:5"), codes.ResourceExhausted, ali, "isv.BUSINESS_LIMIT_CONTROL", time.Hour, 0, ""},
		{"limit by day", limit("触发天级流控Permits:10"), codes.ResourceExhausted, ali, "isv.BUSINESS_LIMIT_CONTROL", 24 * time.Hour, 0, ""},
		{"limit without a tier", limit("limited"), codes.ResourceExhausted, ali, "isv.BUSINESS_LIMIT_CONTROL", time.Minute, 0, ""},
		{
			"limit by day, in English", limit("The number has exceeded the limit for the day."), codes.ResourceExhausted, ali,
			"isv.BUSINESS_LIMIT_CONTROL", 24 * time.Hour, 0, "",
		},
		{"frequency", reply("FREQUENCY_FAIL"), codes.ResourceExhausted, ali, "FREQUENCY_FAIL", time.Minute, 0, ""},
		{"valve of the minute", reply("VALVE:M_MC"), codes.ResourceExhausted, ali, "VALVE:M_MC", time.Minute, 0, ""},
		{"valve of the hour", reply("VALVE:H_MC"), codes.ResourceExhausted, ali, "VALVE:H_MC", time.Hour, 0, ""},
		{"valve of the day", reply("VALVE:D_MC"), codes.ResourceExhausted, ali, "VALVE:D_MC", 24 * time.Hour, 0, ""},
		{
			"bad number by its old name", reply("InvalidRecNum.Malformed"), codes.InvalidArgument, ali, "InvalidRecNum.Malformed", 0, 0,
			"phone_number",
		},
		{"bad number", reply("isv.MOBILE_NUMBER_ILLEGAL"), codes.InvalidArgument, ali, "isv.MOBILE_NUMBER_ILLEGAL", 0, 0, "phone_number"},

		{"throttled", dysmsapitest.Reply(400, "Throttling.User", secretText), codes.Unavailable, ali, "Throttling.User", time.Second, 0, ""},

		{"closed after reading", dysmsapitest.CloseAfterReading(), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 0, ""},
		{"closed after sending", dysmsapitest.CloseAfterReading().ButAccepted(), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 1, ""},
		{"bad gateway", dysmsapitest.BadGateway(), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 0, ""},
		{"bad gateway after sending", dysmsapitest.BadGateway().ButAccepted(), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 1, ""},
		{"empty reply", dysmsapitest.Body(200, "application/json", ""), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 0, ""},
		{
			"empty reply after sending", dysmsapitest.Body(200, "application/json", "").ButAccepted(), codes.Unknown, own,
			"SMS_OUTCOME_UNKNOWN", 0, 1, "",
		},
		{"truncated reply", dysmsapitest.Truncated().ButAccepted(), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 1, ""},
		{
			"server error without a code", dysmsapitest.Body(503, "application/json", `{"Message":"busy"}`), codes.Unknown, own,
			"SMS_OUTCOME_UNKNOWN", 0, 0, "",
		},
		{"redirect", dysmsapitest.Redirect(307, "http://127.0.0.1:1/"), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 0, ""},
		{"OK without a BizId", dysmsapitest.OKWithoutBizID().ButAccepted(), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 1, ""},
		{"OK with HTTP 500", dysmsapitest.Reply(500, "OK", "OK"), codes.Unknown, own, "SMS_OUTCOME_UNKNOWN", 0, 0, ""},
		{"no answer", dysmsapitest.Hang(), codes.DeadlineExceeded, own, "SMS_TIMEOUT", 0, 0, ""},
		{"no answer after sending", dysmsapitest.Hang().ButAccepted(), codes.DeadlineExceeded, own, "SMS_TIMEOUT", 0, 1, ""},
	}
	for _, code := range strings.Fields(`isv.BLACK_KEY_CONTROL_LIMIT isv.CUSTOMER_REFUSED isv.DAY_LIMIT_CONTROL isv.MONTH_LIMIT_CONTROL
		isv.AMOUNT_NOT_ENOUGH isv.OUT_OF_SERVICE isv.SMS_SIGNATURE_ILLEGAL isv.SMS_TEMPLATE_ILLEGAL isv.TEMPLATE_MISSING_PARAMETERS
		isv.TEMPLATE_PARAMS_ILLEGAL isv.ONE_OF_NEXT_YEAR isp.RAM_PERMISSION_DENY SignatureDoesNotMatch InvalidAccessKeyId.NotFound
		InvalidTimeStamp.Expired MissingSecurityToken InvalidSecurityToken.Expired Forbidden.RAM Forbidden
		FUNCTION_NOT_OPENED FunctionNotSubscribed DataNotFound InvalidSignName.Malformed InvalidTemplateCode.MalFormed`) {
		rows = append(rows, row{code, reply(code), codes.FailedPrecondition, ali, code, 0, 0, ""})
	}
	for _, code := range strings.Fields(`isv.INVALID_JSON_PARAM isv.INVALID_PARAMETERS isv.MOBILE_COUNT_OVER_LIMIT InvalidAction.NotFound InvalidVersion
		InvalidTimeStamp.Format UnsupportedHTTPMethod MissingParameter InvalidParamString.MalFormed`) {
		rows = append(rows, row{code, reply(code), codes.Internal, ali, code, 0, 0, ""})
	}
	for _, code := range strings.Fields(`SignatureNonceUsed isp.SYSTEM_ERROR isp.GATEWAY_ERROR InternalError SomethingUnheardOf Some:Thing[new]`) {
		rows = append(rows, row{code, dysmsapitest.Reply(500, code, secretText).ButAccepted(), codes.Unknown, ali, code, 0, 1, ""})
	}

	db := servertest.OpenStore(t, "sqlite::memory:")
	fake := dysmsapitest.New(t)
	sender := &recorder{Sender: aliyun(t, fake)}
	r := servertest.Start(t, db, sender, func(c *server.Config) { c.Verifier.SMSTimeout = 200 * time.Millisecond })
	for i := range 2 * len(rows) {
		row, template := rows[i/2], []string{"SMS_1", "100001"}[i%2]
		t.Run(row.name+", "+template, func(t *testing.T) {
			number := servertest.FreshNumber()
			r.MustSend(t, number)
			request := servertest.SendRequest(number)
			request.TemplateCode = template
			sentBefore, requestsBefore, logBefore := len(fake.Accepted()), fake.Requests(), len(r.Log.String())

			fake.Next(row.fault)
			_, err := r.SendSMS(t.Context(), request)

			s := status.Convert(err)
			if s.Code() != row.code {
				t.Errorf("status: got %v; want %v", s.Code(), row.code)
			}
			info, retry, bad := servertest.Details(t, s)
			if info.GetDomain() != row.domain || info.GetReason() != row.reason {
				t.Errorf("ErrorInfo: got %s %s; want %s %s", info.GetDomain(), info.GetReason(), row.domain, row.reason)
			}
			if row.domain == ali && info.GetMetadata()["request_id"] == "" {
				t.Error("ErrorInfo: got no request_id; want Aliyun's")
			}
			if got := retry.GetRetryDelay().AsDuration(); got != row.retry {
				t.Errorf("RetryInfo: got %v; want %v", got, row.retry)
			}
			if row.field != "" && (len(bad.GetFieldViolations()) != 1 || bad.FieldViolations[0].Field != row.field) {
				t.Errorf("BadRequest: got %v; want the field %s", bad, row.field)
			}
			if got := fake.Requests() - requestsBefore; got != 1 {
				t.Errorf("requests to Aliyun: got %d; want 1", got)
			}
			if got := len(fake.Accepted()) - sentBefore; got != row.sent {
				t.Errorf("sent SMS: got %d; want %d", got, row.sent)
			}

			sent := sender.all()
			older, newer := sent[len(sent)-2], sent[len(sent)-1]
			for output, text := range map[string]string{"error": s.Proto().String(), "log": r.Log.String()[logBefore:]} {
				for _, secret := range []string{number, older, newer, secretText, fake.AccessKeySecret, fake.URL} {
					if strings.Contains(text, secret) {
						t.Errorf("the %s contains %q:\n%s", output, secret, text)
					}
				}
			}

			switch unknown := row.code == codes.Unknown || row.code == codes.DeadlineExceeded; {
			case older == newer: // one in a million
			case !unknown:
				// The call returns before its code is withdrawn.
				testutil.Eventually(t, "the outcome is stored", func() bool { return r.Verifier.Pending() == 0 })
				if r.IsValid(t, number, newer) {
					t.Error("the code of a rejected send: got valid; want invalid")
				}
				if !r.IsValid(t, number, older) {
					t.Error("the code before a rejected send: got invalid; want valid")
				}
			case row.sent == 1:
				if !r.IsValid(t, number, newer) {
					t.Error("the code of a sent SMS: got invalid; want valid")
				}
			default:
				if !r.IsValid(t, number, older) {
					t.Error("the code before a send of unknown outcome: got invalid; want valid")
				}
			}
		})
	}
}

func TestSendSMS_UnreachableAliyunKeepsTheOldCode(t *testing.T) {
	fake := dysmsapitest.New(t)
	untrusted := httptest.NewTLSServer(fake)
	defer untrusted.Close()
	for name, endpoint := range map[string]string{
		"connection refused": "http://" + testutil.RefusingAddress, "bad certificate": untrusted.URL,
	} {
		t.Run(name, func(t *testing.T) {
			db := servertest.OpenStore(t, "sqlite::memory:")
			sender, err := sms.NewAliyun(sms.AliyunConfig{
				Credentials: sms.Credentials{AccessKeyID: fake.AccessKeyID, AccessKeySecret: fake.AccessKeySecret}, Endpoint: endpoint,
			})
			if err != nil {
				t.Fatal(err)
			}
			good, bad := servertest.Start(t, db, aliyun(t, fake)), servertest.Start(t, db, sender)
			number := servertest.FreshNumber()
			good.MustSend(t, number)
			_, err = bad.SendSMS(t.Context(), servertest.SendRequest(number))
			s := status.Convert(err)
			info, retry, _ := servertest.Details(t, s)
			if s.Code() != codes.Unavailable || info.GetReason() != "SMS_NOT_SENT" || retry == nil {
				t.Errorf("got %v %v %v; want Unavailable, SMS_NOT_SENT and a RetryInfo", s.Code(), info, retry)
			}
			if !good.IsValid(t, number, fake.LastCode(t, number)) {
				t.Error("the code before the send: got invalid; want valid")
			}
		})
	}
}

// The usual retry: the first send times out but reaches the phone. Aliyun rejects the second for
// its limit of one SMS a minute.
func TestSendSMS_RejectedRetryKeepsTheTimedOutCode(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Limits(true)
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), aliyun(t, fake), func(c *server.Config) { c.Verifier.SMSTimeout = 200 * time.Millisecond })
	number := servertest.FreshNumber()
	fake.Next(dysmsapitest.Hang().ButAccepted())
	for _, want := range []codes.Code{codes.DeadlineExceeded, codes.ResourceExhausted, codes.ResourceExhausted} {
		if _, err := r.SendSMS(t.Context(), servertest.SendRequest(number)); status.Code(err) != want {
			t.Fatalf("SendSMS: got %v; want %v", err, want)
		}
	}
	if !r.IsValid(t, number, fake.LastCode(t, number)) {
		t.Error("the code that reached the phone: got invalid; want valid")
	}
}

func TestSendSMS_WithoutDatabaseSendsNothing(t *testing.T) {
	fake := dysmsapitest.New(t)
	db := servertest.OpenStore(t, "sqlite::memory:")
	r := servertest.Start(t, db, aliyun(t, fake))
	db.Close()
	_, sendErr := r.SendSMS(t.Context(), servertest.SendRequest(servertest.FreshNumber()))
	if got := reasonOf(t, sendErr); got != "Unavailable STORE_UNAVAILABLE" {
		t.Errorf("SendSMS: got %s; want Unavailable STORE_UNAVAILABLE", got)
	}
	if n := fake.Requests(); n != 0 {
		t.Errorf("requests to Aliyun: got %d; want 0", n)
	}
}

func TestSendSMS_NinthInFlightIsAborted(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Always(dysmsapitest.Hang())
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), aliyun(t, fake), func(c *server.Config) { c.Verifier.SMSTimeout = 3 * time.Second })
	number := servertest.FreshNumber()
	var inFlight sync.WaitGroup
	defer inFlight.Wait()
	for range 8 {
		inFlight.Go(func() { r.SendSMS(t.Context(), servertest.SendRequest(number)) })
	}
	testutil.Eventually(t, "eight sends are at Aliyun", func() bool { return fake.Requests() == 8 })
	_, last := r.SendSMS(t.Context(), servertest.SendRequest(number))
	if got := reasonOf(t, last); got != "Aborted SEND_IN_PROGRESS" {
		t.Errorf("the ninth send in flight: got %s; want Aborted SEND_IN_PROGRESS", got)
	}
}

func TestSendSMS_UnknownSenderErrorKeepsTheCode(t *testing.T) {
	var code string
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), senderFunc(func(m verify.Message) (verify.Receipt, error) {
		code = m.Code
		return verify.Receipt{}, fmt.Errorf("%s to %s", m.Code, m.Number)
	}))
	number := servertest.FreshNumber()
	_, err := r.SendSMS(t.Context(), servertest.SendRequest(number))
	if got := reasonOf(t, err); got != "Unknown SMS_OUTCOME_UNKNOWN" {
		t.Errorf("got %s; want Unknown SMS_OUTCOME_UNKNOWN", got)
	}
	if log := r.Log.String(); strings.Contains(log, code) || strings.Contains(log, number) {
		t.Errorf("the log contains the number or the code:\n%s", log)
	}
	if !r.IsValid(t, number, code) {
		t.Error("the code after an unknown outcome: got invalid; want valid")
	}
}

// reasonOf returns the status code of err and the reason of its ErrorInfo.
func reasonOf(t *testing.T, err error) string {
	t.Helper()
	s := status.Convert(err)
	info, _, _ := servertest.Details(t, s)
	return s.Code().String() + " " + info.GetReason()
}
