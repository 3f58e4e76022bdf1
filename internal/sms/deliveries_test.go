package sms

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// noon is a time on a day in Beijing that has another date in UTC for eight hours.
var noon = time.Date(2026, 11, 25, 12, 0, 0, 0, Beijing)

// deliveries returns the records of a day.
func deliveries(t *testing.T, a *Aliyun, p Product, n verify.Number, day time.Time, bizID string) []Delivery {
	t.Helper()
	all, err := a.Deliveries(t.Context(), p, n, day, bizID)
	if err != nil {
		t.Fatalf("%s, %s: %v", p, n, err)
	}
	return all
}

func TestDeliveries_TellWhatBecameOfEachSMS(t *testing.T) {
	for _, m := range []verify.Message{
		message, pnvsMessage,
		{Number: "+85261234567", SignName: "Acme", TemplateCode: "SMS_1", Code: "493817"},
		{Number: "+13012345678", SignName: "Acme", TemplateCode: "SMS_1", Code: "493817"},
	} {
		fake, now := dysmsapitest.New(t), noon
		fake.SetClock(func() time.Time { return now })
		a, product := sender(t, fake, ""), ProductOf(m.TemplateCode)
		template := map[Product]string{SMS: "SMS_1"}[product]
		send := func(r dysmsapitest.Receipt) (bizID string) {
			t.Helper()
			fake.SetReceipts(func(dysmsapitest.Accepted) dysmsapitest.Receipt { return r })
			receipt, err := a.Send(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			return receipt.BizID
		}
		send(dysmsapitest.Receipt{})
		delayed := send(dysmsapitest.Receipt{After: 90 * time.Second})
		send(dysmsapitest.Receipt{Code: "PORT_NOT_REGISTERED", After: 2 * time.Second})
		now = now.Add(10 * time.Second)
		record := func(status DeliveryStatus, code string, received time.Time) Delivery {
			return Delivery{product, template, status, code, noon, received}
		}
		want := []Delivery{ // the newest first
			record(Failed, "PORT_NOT_REGISTERED", noon.Add(2*time.Second)), record(Waiting, "", time.Time{}), record(Delivered, dysmsapitest.Delivered, noon),
		}
		if got := deliveries(t, a, product, m.Number, now, ""); !slices.Equal(got, want) {
			t.Errorf("%s: got %+v; want %+v", m.Number, got, want)
		}
		now = now.Add(80 * time.Second)
		want = []Delivery{record(Delivered, dysmsapitest.Delivered, noon.Add(90*time.Second))}
		if got := deliveries(t, a, product, m.Number, now, delayed); !slices.Equal(got, want) {
			t.Errorf("%s: with a BizId: got %+v; want %+v", m.Number, got, want)
		}
		for name, got := range map[string][]Delivery{
			"another number":    deliveries(t, a, product, "+8613900000000", now, ""),
			"another BizId":     deliveries(t, a, product, m.Number, now, "1^0"),
			"the day before":    deliveries(t, a, product, m.Number, now.AddDate(0, 0, -1), ""),
			"the other product": deliveries(t, a, map[Product]Product{SMS: PNVS, PNVS: SMS}[product], m.Number, now, ""),
		} {
			if len(got) > 0 {
				t.Errorf("%s: %s: got %+v; want no record", m.Number, name, got)
			}
		}
	}
}

// The days are those of Beijing, in whose small hours UTC has the date of the day before.
func TestDeliveries_TakeTheDayInBeijing(t *testing.T) {
	fake := dysmsapitest.New(t)
	early := time.Date(2026, 11, 25, 0, 30, 0, 0, Beijing).UTC()
	fake.SetClock(func() time.Time { return early })
	a := sender(t, fake, "")
	if _, err := a.Send(t.Context(), message); err != nil {
		t.Fatal(err)
	}
	got := deliveries(t, a, SMS, message.Number, early, "")
	if len(got) != 1 || !got[0].SentAt.Equal(early) {
		t.Errorf("got %+v; want one record, sent at %v", got, early)
	}
}

func TestDeliveries_NeverReturnTheTextOrACode(t *testing.T) {
	const number = "18612345678"
	records := func(p Product, errorCode, template string) string {
		one := fmt.Sprintf(`[{"PhoneNum":%q,"SendStatus":"2","ErrCode":%q,"TemplateCode":%q,"Content":"code 493817","content":"493817","SendDate":"2026-11-25 12:00:00","ReceiveDate":"493817","OutId":"493817"}]`, number, errorCode, template)
		if p == PNVS {
			return `{"Code":"OK","Message":"493817","Model":` + one + `}`
		}
		return `{"Code":"OK","Message":"493817","SmsSendDetailDTOs":{"SmsSendDetailDTO":` + one + `}}`
	}
	for _, p := range []Product{SMS, PNVS} {
		for _, c := range [][2]string{
			{"E", "SMS_1"}, {"493817", "493817"}, {"X:493817", "SMS_493817x"}, {number, number}, {"您的验证码为493817", "您的验证码"},
		} {
			fake := dysmsapitest.New(t)
			fake.FailQueries(dysmsapitest.Body(http.StatusOK, "application/json", records(p, c[0], c[1])))
			got := deliveries(t, sender(t, fake, ""), p, message.Number, noon, "")
			if text := fmt.Sprintf("%+v", got); strings.Contains(text, "493817") || strings.Contains(text, number) || strings.Contains(text, "验证码") {
				t.Errorf("%s, %v: got %s; want no code, number or text", p, c, text)
			}
			if len(got) != 1 || got[0].Status != Failed || !got[0].SentAt.Equal(noon) {
				t.Errorf("%s, %v: got %+v; want one failed SMS", p, c, got)
			}
		}
	}
}

func TestDeliveries_ShowCodesThatAreNotKnown(t *testing.T) {
	for code, want := range map[string]string{
		"MK:0001":               "MK:0001",
		"ID:1/42":               "ID:1/42",
		"no route":              "no route",
		"网关拒绝 (12345)":          "网关拒绝 (12345)",
		" E1 \n":                "E1",
		"":                      "",
		strings.Repeat("网", 64): strings.Repeat("网", 64),
		strings.Repeat("x", 65): HiddenCode,
		"493817":                HiddenCode,
		"验证码493817":             HiddenCode,
		"４９３８１７":                HiddenCode, // the same digits in another script
		"E\x1b[31m":             HiddenCode,
		"E\u202e1":              HiddenCode,
		"a\nb":                  HiddenCode,
	} {
		body, err := json.Marshal(map[string]any{"Code": "OK", "Model": []map[string]any{{"SendStatus": 2, "ErrCode": code}}})
		if err != nil {
			t.Fatal(err)
		}
		fake := dysmsapitest.New(t)
		fake.FailQueries(dysmsapitest.Body(http.StatusOK, "application/json", string(body)))
		got := deliveries(t, sender(t, fake, ""), PNVS, message.Number, noon, "")
		if len(got) != 1 || got[0].ErrorCode != want {
			t.Errorf("%q: got %+v; want one SMS with %q", code, got, want)
		}
	}
}

// Of a number without an SMS, a product can leave out the list.
func TestDeliveries_AcceptAReplyWithoutAList(t *testing.T) {
	for _, p := range []Product{SMS, PNVS} {
		for _, reply := range []string{
			`{"Code":"OK"}`, `{"Code":"OK","Model":null,"SmsSendDetailDTOs":null}`, `{"Code":"OK","Model":[],"SmsSendDetailDTOs":{}}`,
		} {
			fake := dysmsapitest.New(t)
			fake.FailQueries(dysmsapitest.Body(http.StatusOK, "application/json", reply))
			if got := deliveries(t, sender(t, fake, ""), p, message.Number, noon, ""); len(got) != 0 {
				t.Errorf("%s, %s: got %+v; want no record", p, reply, got)
			}
		}
	}
}

func TestDeliveries_SayWhyThereAreNoRecords(t *testing.T) {
	for name, c := range map[string]struct {
		fault   dysmsapitest.Fault
		want    string
		noRight bool
	}{
		"no right":            {dysmsapitest.Reply(200, "isp.RAM_PERMISSION_DENY", "RAM权限不足 18612345678"), "rejected by Aliyun, code isp.RAM_PERMISSION_DENY, RequestId ", true},
		"no right to PNVS":    {dysmsapitest.Reply(403, "NoPermission", "x"), "rejected by Aliyun, code NoPermission, RequestId ", true},
		"an error":            {dysmsapitest.Reply(200, "isv.X", "参数异常"), "rejected by Aliyun, code isv.X, RequestId ", false},
		"a code that is none": {dysmsapitest.Reply(200, "18612345678", "x"), "rejected by Aliyun, RequestId ", false},
		"a proxy's page":      {dysmsapitest.BadGateway(), "the reply is not Aliyun's", false},
		"no reply":            {dysmsapitest.CloseAfterReading(), "connection lost after the request was written", false},
		"half a reply":        {dysmsapitest.Truncated(), "connection lost after the request was written", false},
		"a huge reply":        {dysmsapitest.Huge(1 << 20), "reply over 256 KiB", false},
		"a redirect":          {dysmsapitest.Redirect(307, "http://127.0.0.1:1/"), "the reply is not Aliyun's", false},
	} {
		t.Run(name, func(t *testing.T) {
			fake := dysmsapitest.New(t)
			fake.FailQueries(c.fault)
			_, err := sender(t, fake, "").Deliveries(t.Context(), SMS, message.Number, time.Now(), "")
			var e *QueryError
			if !errors.As(err, &e) || !strings.HasPrefix(e.Error(), c.want) || strings.Contains(e.Error(), "18612345678") {
				t.Fatalf("got %v; want %s…", err, c.want)
			}
			if e.NoRight() != c.noRight {
				t.Errorf("%v: got no right %t; want %t", err, e.NoRight(), c.noRight)
			}
		})
	}
	a, err := NewAliyun(AliyunConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Deliveries(t.Context(), SMS, message.Number, time.Now(), ""); err == nil || err.Error() != errNoCredentials.Error() {
		t.Errorf("no credentials: got %v; want %v", err, errNoCredentials)
	}
}

// A gateway that answers twice can give the second copy of a rejection to the next request.
func TestSend_IgnoresTheRejectionOfAQuery(t *testing.T) {
	fake := dysmsapitest.New(t)
	a := sender(t, fake, "")
	rejection := dysmsapitest.Body(403, "application/json", `{"Code":"NoPermission","RequestId":"1-2-3"}`)
	fake.FailQueries(rejection)
	if _, err := a.Deliveries(t.Context(), SMS, message.Number, time.Now(), ""); err == nil {
		t.Fatal("got no error; want a rejection")
	}
	fake.Next(rejection.ButAccepted())
	if e := failure(t.Context(), t, a); e.Kind != verify.SendUnknown {
		t.Errorf("got kind %v; want %v", e.Kind, verify.SendUnknown)
	}
}

// A service without a send for an hour may only ask.
func TestDeliveries_ReportExpiredCredentials(t *testing.T) {
	fake := dysmsapitest.New(t)
	a := sender(t, fake, "")
	var expired []string
	a.OnExpired = func(c Credentials) { expired = append(expired, c.AccessKeyID) }
	ask := func(p Product, reply string) {
		t.Helper()
		fake.FailQueries(dysmsapitest.Body(400, "application/json", reply))
		if _, err := a.Deliveries(t.Context(), p, message.Number, time.Now(), ""); err == nil {
			t.Errorf("%s: got nil; want an error", reply)
		}
	}
	ask(SMS, `{"Code":"InvalidSecurityToken.MismatchWithAccessKey","RequestId":"1"}`)
	if len(expired) > 0 {
		t.Errorf("a token of another key: got %d reports; want none", len(expired))
	}
	for i, p := range []Product{SMS, PNVS} {
		reply := fmt.Sprintf(`{"Code":"InvalidSecurityToken.Expired","RequestId":"2-%d"}`, i)
		ask(p, reply)
		ask(p, reply) // the copy of a reply says nothing of the credentials in use
	}
	if want := []string{fake.AccessKeyID, fake.AccessKeyID}; !slices.Equal(expired, want) {
		t.Errorf("got reports of %v; want %v", expired, want)
	}
}
