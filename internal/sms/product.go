package sms

import (
	"errors"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A Product is one of Aliyun's APIs that send a code. Its value is the label of metrics and logs.
type Product string

// The products. The form of a template code names its product.
const (
	// SMS is the Short Message Service (dysmsapi), for enterprises: SMS_123456789.
	SMS Product = "sms"
	// PNVS is the Phone Number Verification Service (dypnsapi), whose sign names and templates
	// are Aliyun's: 100001. The service sends its own code, so Aliyun checks none.
	PNVS Product = "pnvs"
)

// ProductOf returns the product that has a template.
func ProductOf(templateCode string) Product {
	if len(templateCode) == 6 && strings.Trim(templateCode, "0123456789") == "" {
		return PNVS
	}
	return SMS
}

// ErrCodeTTL means that the text of a template has the lifetime of codes in minutes, and that it is
// under a minute.
var ErrCodeTTL = errors.New("the lifetime of codes is under a minute")

// CheckSend returns an error if the product of a template cannot send a code of this lifetime to n:
// a *verify.FieldError or ErrCodeTTL. A call checks this before its code is stored.
func CheckSend(n verify.Number, templateCode string, ttl time.Duration) error {
	switch {
	case ProductOf(templateCode) == SMS:
		return nil
	case !n.Mainland():
		return &verify.FieldError{
			Field: "phone_number",
			Want:  "must be a number in mainland China if the template code is of PNVS (six digits); an SMS_ template can send to other countries",
		}
	case ttl < time.Minute:
		return ErrCodeTTL
	}
	return nil
}

// SendInterval returns the time between two sends to n that Aliyun asks for by default, 0 if it asks for
// none.
func SendInterval(n verify.Number) time.Duration {
	if n.Mainland() {
		return time.Minute
	}
	return 0
}

// actions are the names of the requests that send an SMS.
var actions = map[Product]string{SMS: "SendSms", PNVS: "SendSmsVerifyCode"}

// parameters returns the query of the request for m, sorted by name. Without AutoRetry=0, PNVS may send
// an SMS again by another carrier or with another sign name, and a call could cause two.
func (a *Aliyun) parameters(m verify.Message) string {
	number, rest := aliyunNumber(m.Number), "&SignName="+url.QueryEscape(m.SignName)+
		"&TemplateCode="+url.QueryEscape(m.TemplateCode)+"&TemplateParam="
	if ProductOf(m.TemplateCode) == PNVS {
		minutes := strconv.Itoa(int(a.codeTTL / time.Minute))
		return "AutoRetry=0&PhoneNumber=" + number + rest + url.QueryEscape(`{"code":"`+m.Code+`","min":"`+minutes+`"}`)
	}
	return "PhoneNumbers=" + number + rest + url.QueryEscape(`{"`+a.variable+`":"`+m.Code+`"}`)
}

// aliyunNumber returns n in Aliyun's form: eleven digits in mainland China, country code and
// number elsewhere.
func aliyunNumber(n verify.Number) string {
	if n.Mainland() {
		return strings.TrimPrefix(string(n), "+86")
	}
	digits := strings.TrimPrefix(string(n), "+")
	if verify.IsMainlandMobile(digits) {
		// Without a prefix, +1 301 234 5678 would be read as a number in mainland China. The
		// older of Aliyun's two forms, with 00 before the country code, is unambiguous.
		return "00" + digits
	}
	return digits
}
