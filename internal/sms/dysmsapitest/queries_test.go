package dysmsapitest

import (
	"net/url"
	"testing"
	"time"
)

func TestQueries_CheckEveryParameter(t *testing.T) {
	today := time.Now().In(beijing).Format("20060102")
	valid := url.Values{"PhoneNumber": {"18612345678"}, "SendDate": {today}, "PageSize": {"50"}, "CurrentPage": {"1"}}
	with := func(name string, values ...string) url.Values {
		changed := url.Values{}
		for n, v := range valid {
			changed[n] = v
		}
		changed[name] = values
		return changed
	}
	const invalid = "isv.INVALID_PARAMETERS"
	for _, x := range []struct {
		query url.Values
		code  string
	}{
		{valid, "OK"},
		{with("BizId", "1^0"), "OK"},
		{with("PhoneNumber", "85261234567"), "OK"},
		{with("SendDate", time.Now().In(beijing).AddDate(0, 0, -30).Format("20060102")), "OK"},
		{with("SendDate", time.Now().In(beijing).AddDate(0, 0, -32).Format("20060102")), invalid},
		{with("SendDate", time.Now().In(beijing).AddDate(0, 0, 2).Format("20060102")), invalid},
		{with("SendDate", "2026-11-25"), invalid},
		{with("PageSize", "51"), invalid},
		{with("PageSize", "0"), invalid},
		{with("CurrentPage", "0"), invalid},
		{with("PhoneNumber", "18612345678", "18612345679"), invalid},
		{with("SignName", "Acme"), invalid},
		{with("PhoneNumber"), "MissingPhoneNumber"},
		{with("SendDate"), "MissingSendDate"},
		{with("PageSize"), "MissingPageSize"},
		{with("CurrentPage"), "MissingCurrentPage"},
	} {
		s := New(t)
		for _, address := range []string{s.URL, s.PNVSURL} {
			c := validCall(s)
			c.url, c.rawQuery = address, x.query.Encode()
			c.header.Set("X-Acs-Action", queryAction)
			c.sign()
			if _, a := c.send(t); a.Code != x.code {
				t.Errorf("%v: got %s; want %s", x.query, a.Code, x.code)
			}
			c.rawQuery += "&CurrentPage=2" // after signing
			if _, a := c.send(t); a.Code == "OK" {
				t.Errorf("%v: changed after signing: got OK; want a rejection", x.query)
			}
		}
		if got := s.Queries(); got != 4 {
			t.Errorf("got %d queries; want 4", got)
		}
		if got := s.Requests() + len(s.Accepted()); got != 0 {
			t.Errorf("got %d sends; want none", got)
		}
	}
}
