package server_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestSendSMS_TemplateChoosesTheProduct(t *testing.T) {
	fake := dysmsapitest.New(t)
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), aliyun(t, fake))
	for template, product := range map[string]string{"SMS_1": "sms", "100001": "pnvs"} {
		number := servertest.FreshNumber()
		request := servertest.SendRequest(number)
		request.TemplateCode = template
		if _, err := r.SendSMS(t.Context(), request); err != nil {
			t.Fatal(err)
		}
		if !r.IsValid(t, number, fake.LastCode(t, number)) {
			t.Errorf("%s: the sent code: got invalid; want valid", template)
		}
		for _, want := range []string{"msg=call", "msg=step"} {
			found := false
			for line := range strings.Lines(r.Log.String()) {
				found = found || strings.Contains(line, want) && strings.Contains(line, "product="+product)
			}
			if !found {
				t.Errorf("%s: got no line with %s and product=%s; want one", template, want, product)
			}
		}
	}
}

// A send that PNVS cannot make is rejected before its code is stored.
func TestSendSMS_ForPNVSIsCheckedBeforeItIsStored(t *testing.T) {
	const soon, minute = time.Minute - time.Millisecond, time.Minute
	for _, c := range []struct {
		name, number, template string
		ttl                    time.Duration
		code                   codes.Code
		reason, field          string
	}{
		{"a number abroad", "+85261234567", "100001", minute, codes.InvalidArgument, "INVALID_FIELD", "phone_number"},
		{"a lifetime under a minute", "+8618612345678", "100001", soon, codes.FailedPrecondition, "CODE_TTL_TOO_SHORT", ""},
		{"five digits", "+8618612345678", "10001", minute, codes.InvalidArgument, "INVALID_FIELD", "template_code"},
		{"seven digits", "+8618612345678", "1000001", minute, codes.InvalidArgument, "INVALID_FIELD", "template_code"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fake, db := dysmsapitest.New(t), servertest.OpenStore(t, "sqlite::memory:")
			r := servertest.Start(t, db, aliyun(t, fake), func(s *server.Config) { s.Verifier.Rules.CodeTTL = c.ttl })
			_, err := r.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: c.number, Signature: "速通互联验证码", TemplateCode: c.template})
			s := status.Convert(err)
			info, _, bad := servertest.Details(t, s)
			if s.Code() != c.code || info.GetReason() != c.reason {
				t.Errorf("got %v %s; want %v %s", s.Code(), info.GetReason(), c.code, c.reason)
			}
			if c.field != "" && (len(bad.GetFieldViolations()) != 1 || bad.FieldViolations[0].Field != c.field) {
				t.Errorf("BadRequest: got %v; want the field %s", bad, c.field)
			}
			if record, err := db.Load(t.Context(), verify.Number(c.number)); err != nil || record.Version != (verify.Version{}) {
				t.Errorf("got the record %+v, %v; want none", record, err)
			}
			if n := fake.Requests(); n != 0 {
				t.Errorf("got %d requests to Aliyun; want none", n)
			}
		})
	}
}
