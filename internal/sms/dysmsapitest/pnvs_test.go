package dysmsapitest

import (
	"net/url"
	"slices"
	"testing"
	"time"
)

func pnvsCall(s *Server, number, signName, template, param string) *call {
	c := validCall(s)
	c.url = s.PNVSURL
	c.header.Set("X-Acs-Action", "SendSmsVerifyCode")
	c.rawQuery = url.Values{
		"AutoRetry": {"0"}, "PhoneNumber": {number}, "SignName": {signName}, "TemplateCode": {template}, "TemplateParam": {param},
	}.Encode()
	return c
}

func TestPNVS_AcceptsOneCodeToOneMainlandNumber(t *testing.T) {
	const number, name, template, param = "18612345678", "速通互联验证码", "100001", `{"code":"493817","min":"10"}`
	as := func(number, name, template, param string) func(*Server) *call {
		return func(s *Server) *call { return pnvsCall(s, number, name, template, param) }
	}
	also := func(more string) func(*Server) *call {
		return func(s *Server) *call {
			c := pnvsCall(s, number, name, template, param)
			c.rawQuery += more
			return c
		}
	}
	with := func(field, value string) func(*Server) *call {
		return func(s *Server) *call {
			c := pnvsCall(s, number, name, template, param)
			query, _ := url.ParseQuery(c.rawQuery)
			query.Set(field, value)
			c.rawQuery = query.Encode()
			return c
		}
	}
	for what, x := range map[string]struct {
		call   func(*Server) *call
		status int
		code   string
	}{
		"valid":             {as(number, name, template, param), 200, "OK"},
		"one minute":        {as(number, name, template, `{"code":"493817","min":"1"}`), 200, "OK"},
		"no number":         {as("", name, template, param), 400, "MissingPhoneNumber"},
		"no sign name":      {as(number, "", template, param), 400, "MissingSignName"},
		"no template":       {as(number, name, "", param), 400, "MissingTemplateCode"},
		"no parameters":     {as(number, name, template, ""), 400, "MissingTemplateParam"},
		"no AutoRetry":      {with("AutoRetry", ""), 400, "isv.INVALID_PARAMETERS"},
		"AutoRetry":         {with("AutoRetry", "1"), 400, "isv.INVALID_PARAMETERS"},
		"another field":     {also("&ReturnVerifyCode=true"), 400, "isv.INVALID_PARAMETERS"},
		"a field twice":     {also("&PhoneNumber=18612345679"), 400, "isv.INVALID_PARAMETERS"},
		"a field of SMS":    {also("&PhoneNumbers=18612345679"), 400, "isv.INVALID_PARAMETERS"},
		"two numbers":       {as(number+",18612345679", name, template, param), 400, "isv.MOBILE_NUMBER_ILLEGAL"},
		"a foreign number":  {as("85261234567", name, template, param), 400, "isv.MOBILE_NUMBER_ILLEGAL"},
		"a country code":    {as("+86"+number, name, template, param), 400, "isv.MOBILE_NUMBER_ILLEGAL"},
		"unknown sign name": {as(number, "unknown", template, param), 400, "isv.SMS_SIGNATURE_ILLEGAL"},
		"unknown template":  {as(number, name, "100002", param), 400, "DataNotFound"},
		"template of SMS":   {as(number, name, "SMS_1", param), 400, "DataNotFound"},
		"no JSON":           {as(number, name, template, "493817"), 400, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		"Aliyun's own code": {as(number, name, template, `{"code":"##code##","min":"10"}`), 400, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		"no minutes":        {as(number, name, template, `{"code":"493817"}`), 400, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		"zero minutes":      {as(number, name, template, `{"code":"493817","min":"0"}`), 400, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		"minutes as number": {as(number, name, template, `{"code":"493817","min":10}`), 400, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		"a fraction":        {as(number, name, template, `{"code":"493817","min":"1.5"}`), 400, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		"another variable":  {as(number, name, template, `{"code":"493817","min":"10","x":"1"}`), 400, "isv.TEMPLATE_PARAMS_ILLEGAL"},
		"the action of SMS": {func(s *Server) *call {
			c := validCall(s)
			c.url = s.PNVSURL
			return c
		}, 404, "InvalidAction.NotFound"},
		"the endpoint of SMS": {func(s *Server) *call {
			c := pnvsCall(s, number, name, template, param)
			c.url = s.URL
			return c
		}, 404, "InvalidAction.NotFound"},
	} {
		s := New(t)
		s.AllowSign(name)
		s.AllowTemplate(template, "SMS_1")
		c := x.call(s)
		c.sign()
		status, a := c.send(t)
		if status != x.status || a.Code != x.code {
			t.Errorf("%s: got HTTP %d %s; want %d %s", what, status, a.Code, x.status, x.code)
		}
		if want := map[bool]int{true: 1}[x.code == "OK"]; len(s.Accepted()) != want {
			t.Errorf("%s: got %d sent messages; want %d", what, len(s.Accepted()), want)
		}
	}
}

func TestServer_TellsWhichMessageWasNotSent(t *testing.T) {
	const number, name = "18612345678", "Acme"
	for template, call := range map[string]func(*Server) *call{
		"SMS_1":  validCall,
		"100001": func(s *Server) *call { return pnvsCall(s, number, name, "100001", `{"code":"493817","min":"10"}`) },
	} {
		s := New(t)
		s.AllowTemplate("other")
		var got []string
		s.OnUnsent(func(phoneNumber, _, code string) { got = append(got, phoneNumber, code) })
		c := call(s)
		c.sign()
		c.send(t)
		if want := []string{number, "493817"}; !slices.Equal(got, want) {
			t.Errorf("%s: got %v; want %v", template, got, want)
		}
	}
}

func TestServer_ChecksTheSecurityToken(t *testing.T) {
	for _, x := range []struct {
		sent   string // token; none if ""
		issued Issued
		code   string
	}{
		{"token", Issued{SecurityToken: "token", Expires: time.Now().Add(time.Hour)}, "OK"},
		{"token", Issued{SecurityToken: "token", Expires: time.Now()}, "InvalidSecurityToken.Expired"},
		{"other", Issued{SecurityToken: "token"}, "InvalidSecurityToken.MismatchWithAccessKey"},
		{"", Issued{SecurityToken: "token"}, "MissingSecurityToken"},
		{"token", Issued{}, "InvalidSecurityToken.MismatchWithAccessKey"},
	} {
		s := New(t)
		x.issued.AccessKeySecret = s.AccessKeySecret
		s.SetIssuer(func(id string) (Issued, bool) { return x.issued, id == s.AccessKeyID })
		c := validCall(s)
		if x.sent != "" {
			c.header.Set("X-Acs-Security-Token", x.sent)
		}
		c.sign()
		if _, a := c.send(t); a.Code != x.code {
			t.Errorf("sent %q of %+v: got %s; want %s", x.sent, x.issued, a.Code, x.code)
		}
		c.header.Set("X-Acs-Signature-Nonce", "another")
		c.sign()
		c.header.Set("X-Acs-Security-Token", "changed")
		if _, a := c.send(t); a.Code == "OK" {
			t.Errorf("%q changed after signing: got OK; want a rejection", x.sent)
		}
	}
}
