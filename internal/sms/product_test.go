package sms

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var pnvsMessage = verify.Message{Number: "+8618612345678", SignName: "速通互联验证码", TemplateCode: "100001", Code: "493817"}

func TestProductOf_SixDigitsArePNVS(t *testing.T) {
	for template, want := range map[string]Product{
		"100001": PNVS, "000000": PNVS, "SMS_1": SMS, "SMS_100001": SMS, "10000": SMS, "1000011": SMS, "10000a": SMS, "": SMS, "１０００01": SMS,
	} {
		if got := ProductOf(template); got != want {
			t.Errorf("%q: got %s; want %s", template, got, want)
		}
	}
}

func TestCheckSend_RejectsWhatPNVSCannotSend(t *testing.T) {
	for _, c := range []struct {
		number   verify.Number
		template string
		ttl      time.Duration
		field    string // of the error
		err      error
	}{
		{"+8618612345678", "100001", time.Minute, "", nil},
		{"+8618612345678", "100001", time.Minute - 1, "", ErrCodeTTL},
		{"+85261234567", "100001", time.Minute, "phone_number", nil},
		{"+13012345678", "100001", time.Second, "phone_number", nil},
		{"+85261234567", "SMS_1", time.Second, "", nil},
	} {
		err := CheckSend(c.number, c.template, c.ttl)
		var field *verify.FieldError
		errors.As(err, &field)
		if field != nil && field.Field == c.field {
			continue
		}
		if c.field != "" || !errors.Is(err, c.err) {
			t.Errorf("%s, %s, %v: got %v; want the field %q or %v", c.number, c.template, c.ttl, err, c.field, c.err)
		}
	}
}

// The lifetime in an SMS is in whole minutes, rounded down, so that no code ends before the SMS says.
func TestSend_PNVSMessageArrivesUnchanged(t *testing.T) {
	for ttl, minutes := range map[time.Duration]string{
		time.Minute: "1", 2*time.Minute - 1: "1", 10 * time.Minute: "10",
	} {
		fake := dysmsapitest.New(t)
		a := sender(t, fake, "")
		a.codeTTL = ttl
		for _, name := range []string{"速通互联验证码", `*~+%/&=?#"\`} {
			m := pnvsMessage
			m.SignName = name
			receipt, err := a.Send(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			sent := fake.Accepted()
			got := sent[len(sent)-1]
			want := dysmsapitest.Accepted{
				PhoneNumber: "18612345678", SignName: name, TemplateCode: "100001", Code: "493817", Minutes: minutes,
				BizID: got.BizID, At: got.At,
			}
			if got != want {
				t.Errorf("got %+v; want %+v", got, want)
			}
			if ids := fake.RequestIDs(); receipt != (verify.Receipt{BizID: got.BizID, RequestID: ids[len(ids)-1]}) {
				t.Errorf("got receipt %+v; want BizId %s of Model and RequestId %s", receipt, got.BizID, ids[len(ids)-1])
			}
		}
	}
}

func TestSend_ReadsTheBizIDOfItsProduct(t *testing.T) {
	const top, inModel = `{"Code":"OK","BizId":"1^0"}`, `{"Code":"OK","Success":true,"Model":{"BizId":"1^0","VerifyCode":"493817"}}`
	for _, c := range []struct {
		m     verify.Message
		reply string
		known bool
	}{
		{message, top, true},
		{message, inModel, false},
		{pnvsMessage, inModel, true},
		{pnvsMessage, top, false},
		{pnvsMessage, `{"Code":"OK","Model":{"BizId":""}}`, false},
		{pnvsMessage, `{"Code":"OK","Model":{"BizId":1}}`, false},
		{pnvsMessage, `{"Code":"OK","Model":"1^0"}`, false},
		{pnvsMessage, `{"Code":"OK","Model":null}`, false},
		{pnvsMessage, `{"Code":"OK","Model":[{"BizId":"1^0"}]}`, false},
	} {
		fake := dysmsapitest.New(t)
		fake.Next(dysmsapitest.Body(200, "application/json", c.reply))
		receipt, err := sender(t, fake, "").Send(t.Context(), c.m)
		if want := (verify.Receipt{BizID: "1^0"}); c.known && (err != nil || receipt != want) {
			t.Errorf("%s, %s: got %+v, %v; want %+v", ProductOf(c.m.TemplateCode), c.reply, receipt, err, want)
		}
		var e *verify.SendError
		if !c.known && (!errors.As(err, &e) || e.Kind != verify.SendUnknown) {
			t.Errorf("%s, %s: got %+v, %v; want an unknown outcome", ProductOf(c.m.TemplateCode), c.reply, receipt, err)
		}
	}
}

// The fake gateway rejects these requests by its own rules.
func TestSend_PNVSRejectionsHaveTheirKind(t *testing.T) {
	for _, c := range []struct {
		name  string
		setUp func(*dysmsapitest.Server, *Aliyun)
		want  verify.SendError
	}{
		{"unknown template", func(s *dysmsapitest.Server, _ *Aliyun) { s.AllowTemplate("100002") }, verify.SendError{
			Kind: verify.SendRejected, ProviderCode: "DataNotFound", HTTPStatus: 400,
		}},
		{"a second send within a minute", func(s *dysmsapitest.Server, a *Aliyun) {
			s.Limits(true)
			a.Send(t.Context(), pnvsMessage)
		}, verify.SendError{Kind: verify.SendLimited, ProviderCode: "FREQUENCY_FAIL", HTTPStatus: 400, RetryAfter: time.Minute}},
		{"the eleventh send of a day", func(s *dysmsapitest.Server, a *Aliyun) {
			s.Limits(true)
			now := time.Now()
			s.SetClock(func() time.Time { now = now.Add(2 * time.Hour); return now })
			for range 10 {
				a.Send(t.Context(), pnvsMessage)
			}
		}, verify.SendError{Kind: verify.SendLimited, ProviderCode: "BUSINESS_LIMIT_CONTROL", HTTPStatus: 400, RetryAfter: 24 * time.Hour}},
		{"the endpoint of the other product", func(_ *dysmsapitest.Server, a *Aliyun) { a.endpoints[PNVS].url = a.endpoints[SMS].url }, verify.SendError{
			Kind: verify.SendBadRequest, ProviderCode: "InvalidAction.NotFound", HTTPStatus: 404,
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			fake := dysmsapitest.New(t)
			a := sender(t, fake, "")
			c.setUp(fake, a)
			matches(t, failureOf(t.Context(), t, a, pnvsMessage), c.want)
		})
	}
}

func TestSend_NamesTheTemplatesVariable(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.SetVariable("verify_Code1")
	a := sender(t, fake, "")
	a.variable = "verify_Code1"
	for _, m := range []verify.Message{message, pnvsMessage} { // the variables of PNVS have fixed names
		if _, err := a.Send(t.Context(), m); err != nil {
			t.Errorf("%s: got %v; want nil", ProductOf(m.TemplateCode), err)
		}
	}
	checkSent(t, fake, 2, 2)
}

func TestSend_SignsTheSecurityToken(t *testing.T) {
	const secret, token = "SecretOfASet0123", "CAIS/+token=="
	issued := dysmsapitest.Issued{AccessKeySecret: secret, SecurityToken: token, Expires: time.Now().Add(time.Hour)}
	set := Credentials{AccessKeyID: "STS.NTest", AccessKeySecret: secret, SecurityToken: token, Provider: "oidc_role_arn"}
	for _, c := range []struct {
		name string
		edit func(*dysmsapitest.Issued, *Credentials)
		code string
	}{
		{"valid", func(*dysmsapitest.Issued, *Credentials) {}, ""},
		{"expired", func(i *dysmsapitest.Issued, _ *Credentials) { i.Expires = time.Now() }, "InvalidSecurityToken.Expired"},
		{"another token", func(_ *dysmsapitest.Issued, c *Credentials) { c.SecurityToken = "other" }, "InvalidSecurityToken.MismatchWithAccessKey"},
		{"no token", func(_ *dysmsapitest.Issued, c *Credentials) { c.SecurityToken = "" }, "MissingSecurityToken"},
		{"another secret", func(_ *dysmsapitest.Issued, c *Credentials) { c.AccessKeySecret = "other" }, "SignatureDoesNotMatch"},
	} {
		for _, m := range []verify.Message{message, pnvsMessage} {
			t.Run(fmt.Sprint(c.name, " ", ProductOf(m.TemplateCode)), func(t *testing.T) {
				fake := dysmsapitest.New(t)
				a := sender(t, fake, "")
				i, used := issued, set
				c.edit(&i, &used)
				fake.SetIssuer(func(id string) (dysmsapitest.Issued, bool) { return i, id == set.AccessKeyID })
				if err := a.ReplaceCredentials(used); err != nil {
					t.Fatal(err)
				}
				var expired []Credentials
				a.OnExpired = func(c Credentials) { expired = append(expired, c) }
				if c.code == "" {
					if _, err := a.Send(t.Context(), m); err != nil {
						t.Fatal(err)
					}
					checkSent(t, fake, 1, 1)
					return
				}
				e := failureOf(t.Context(), t, a, m)
				if e.Kind != verify.SendRejected || e.ProviderCode != c.code || strings.Contains(e.Error(), token) {
					t.Errorf("got kind %v, code %s, %s; want rejected, %s, no token", e.Kind, e.ProviderCode, e, c.code)
				}
				if told := len(expired) == 1 && expired[0] == used; told != strings.HasSuffix(c.code, "Expired") {
					t.Errorf("%s: got OnExpired called with %d sets; want it only for an expired one", c.code, len(expired))
				}
			})
		}
	}
}

// The metric of the port's certificate has the same name, and is registered elsewhere.
func TestCollectors_RegisterBesideThePortsCertificate(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(sender(t, dysmsapitest.New(t), "").Collectors()...)
	port := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "phonenumber_certificate_expiry_timestamp_seconds", Help: CertificateHelp,
		ConstLabels: prometheus.Labels{"certificate": "server"},
	})
	if err := registry.Register(port); err != nil {
		t.Errorf("got %v; want nil", err)
	}
}

func TestSend_WithoutCredentialsIsNotAttempted(t *testing.T) {
	fake := dysmsapitest.New(t)
	a, err := NewAliyun(AliyunConfig{Endpoint: fake.URL, PNVSEndpoint: fake.PNVSURL})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []verify.Message{message, pnvsMessage} {
		_, err := a.Send(t.Context(), m)
		var e *verify.SendError
		if !errors.As(err, &e) || e.Kind != verify.SendNotAttempted {
			t.Errorf("got %v; want SendNotAttempted", err)
		}
	}
	checkSent(t, fake, 0, 0)
}
