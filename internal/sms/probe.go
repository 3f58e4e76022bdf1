package sms

import (
	"context"
	"encoding/json"
	"net/http"
	"regexp"
	"strings"
	"time"
)

// A Probe is the result of Aliyun.Probe.
type Probe struct {
	Failure   string        // why there is no reply, a fixed text; "" if there is one
	Code      string        // Aliyun's
	RequestID string        // Aliyun's
	Skew      time.Duration // how far Aliyun's clock is ahead, within a second
	Proxied   bool
}

// Probe asks a product to send an SMS without a phone number, a sign name or a template. So nothing is
// sent and nothing costs, and Aliyun's code shows if it accepts the credentials and the clock.
func (a *Aliyun) Probe(ctx context.Context, p Product) Probe {
	endpoint := a.endpoints[p]
	result := Probe{Proxied: endpoint.transport.Proxy != nil}
	credentials := a.credentials.Load()
	if credentials == nil {
		result.Failure = errNoCredentials.Error()
		return result
	}
	header, body, failure := endpoint.ask(ctx, actions[p], "", *credentials)
	if failure != "" {
		result.Failure = "no reply from " + endpoint.url.Host + ": " + failure
		return result
	}
	if date, err := http.ParseTime(header.Get("Date")); err == nil {
		result.Skew = time.Until(date.Add(time.Second / 2)).Round(time.Second)
	}
	var fields struct{ Code, RequestId string } //nolint:revive // Aliyun's names
	if json.Unmarshal(body, &fields) != nil || !tokenShape.MatchString(fields.Code) ||
		strings.Contains(fields.Code+fields.RequestId, credentials.AccessKeyID) {
		result.Failure = "the reply of " + endpoint.url.Host + " is not Aliyun's"
		return result
	}
	result.Code = fields.Code
	if tokenShape.MatchString(fields.RequestId) {
		result.RequestID = fields.RequestId
	}
	return result
}

// incomplete matches the codes with which Aliyun rejects a request only for its missing parameters.
var incomplete = regexp.MustCompile(`^(Missing(Parameter|PhoneNumber|SignName|Template)|InvalidParameter|(isv\.)?(INVALID_PARAMETERS|MOBILE_NUMBER_ILLEGAL)$)`)

// Accepted reports whether Aliyun accepted the credentials and the clock, and found only parameters
// missing.
func (p Probe) Accepted() bool { return p.Failure == "" && incomplete.MatchString(p.Code) }
