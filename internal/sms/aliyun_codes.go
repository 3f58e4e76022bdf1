package sms

import (
	"encoding/json"
	"regexp"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// codeKinds maps Aliyun's codes to kinds. A code is matched by prefix without its "isv.", so that
// it includes the international API's variants (BUSINESS_LIMIT_HOUR, OUT_OF_SERVICE). The first
// match counts.
var codeKinds = []struct {
	kind     verify.SendKind
	prefixes string
}{
	{verify.SendLimited, "BUSINESS_LIMIT_ VALVE: InvalidSendSms FREQUENCY_FAIL"},
	{verify.SendBadNumber, "MOBILE_NUMBER_ILLEGAL InvalidRecNum PhoneNumber.Illegal"},
	{verify.SendNotAttempted, "Throttling QPS_LIMIT_CONTROL"},
	// The gateway: keys, permissions, our clock.
	{verify.SendRejected, "SignatureDoesNotMatch IncompleteSignature InvalidAccessKeyId MissingAccessKeyId InvalidSecurityToken MissingSecurityToken " +
		"InvalidTimeStamp.Expired Forbidden NoPermission isp.RAM_PERMISSION_DENY"},
	// The gateway: the form of our request.
	{verify.SendBadRequest, "INVALID_JSON_PARAM INVALID_PARAMETERS MOBILE_COUNT_OVER_LIMIT InvalidAction InvalidApi InvalidParameter InvalidProduct InvalidProtocol " +
		"InvalidRegion InvalidSignatureMethod InvalidTimeStamp InvalidVersion IllegalTimestamp Missing NoSuchVersion UnsupportedHTTPMethod UnsupportedParameter " +
		"ContentLengthDoesNotMatch ContentMD5NotMatched"},
	// The API before 2017: sign name, template, account.
	{verify.SendRejected, "InvalidSignName InvalidTemplateCode InvalidParamStringTemplate InvalidDayu"},
	{verify.SendBadRequest, "InvalidParamString"},
	// PNVS: the account and its sign names and templates.
	{verify.SendRejected, "FUNCTION_NOT_OPENED FunctionNotSubscribed DataNotFound"},
	// The international API: account, sign name, template, recipient. List each code: one that
	// means a failure at Aliyun must stay unknown.
	{verify.SendRejected, "ACCOUNT_ AMOUNT_NOT_ENOUGH BLACK_KEY_CONTROL_LIMIT CONTENT_MISSING_PARAMETERS CUSTOMER_REFUSED " +
		"DAY_LIMIT_CONTROL FORBIDDEN_ACTION INVALID_SENDERID MONTH_LIMIT_CONTROL NOT_SUPPORTED_COUNTRY OUT_OF_SERVICE PARAM_ " +
		"PRODUCT_NOT_SUBSCRIBED PRODUCT_UN RAM_PERMISSION_DENY SENDERID_ SIGN_ SMS_CONTENT_ SMS_SECURITY_INTERCEPTED SMS_SIGN SMS_TEMPLATE TEMPLATE_ " +
		"Account.Abnormal Amount.NotEnough DayLimitControl MonthLimitControl OutOfService Unknown.CountryCode Unsupport.CountryCode"},
}

func classify(code string) verify.SendKind {
	name, isv := strings.CutPrefix(code, "isv.")
	for _, row := range codeKinds {
		for prefix := range strings.FieldsSeq(row.prefixes) {
			if strings.HasPrefix(name, prefix) {
				return row.kind
			}
		}
	}
	if isv {
		return verify.SendRejected // every isv code means that nothing was sent
	}
	return verify.SendUnknown
}

// retryAfter returns the period of the limit that the message or the code names.
func retryAfter(code, message string) time.Duration {
	switch code = strings.TrimPrefix(code, "isv."); {
	case strings.Contains(message, "天级") || strings.Contains(message, "for the day") || strings.HasSuffix(code, "_DAY") ||
		code == "VALVE:D_MC":
		return 24 * time.Hour
	case strings.Contains(message, "小时级") || strings.Contains(message, "for the hour") || strings.HasSuffix(code, "_HOUR") ||
		code == "VALVE:H_MC":
		return time.Hour
	}
	return time.Minute
}

// tokenShape matches Aliyun's codes and IDs: printable ASCII without the characters of a sentence, a
// path, markup, base64 or a query. It allows other punctuation, so that no code is dropped.
var tokenShape = regexp.MustCompile(`^[A-Za-z0-9_.:;,^~@#$*!|()\[\]-]{1,64}$`)

// ReadReply turns a whole reply to m into a receipt or a *verify.SendError. The reply is not
// trusted: ReadReply keeps only tokens that quote neither m's number nor its code.
func ReadReply(m verify.Message, status int, body []byte) (verify.Receipt, error) {
	var fields map[string]any // keys matched exactly, unlike a struct's
	malformed := json.Unmarshal(body, &fields) != nil
	text := func(field string) string {
		s, _ := fields[field].(string)
		return s
	}
	token := func(s string) string {
		if !tokenShape.MatchString(s) || containsSecret(s, m.Code) || containsSecret(s, aliyunNumber(m.Number)) {
			return ""
		}
		return s
	}

	e := &verify.SendError{ProviderCode: token(text("Code")), RequestID: token(text("RequestId")), HTTPStatus: status}
	ids := fields
	if ProductOf(m.TemplateCode) == PNVS {
		ids, _ = fields["Model"].(map[string]any)
	}
	bizID, _ := ids["BizId"].(string)
	ok := e.ProviderCode == "OK"
	if ok {
		e.ProviderCode = "" // OK is not the reason of an error
	}
	switch {
	case len(body) > maxReplyBytes:
		e.Detail = "reply over 64 KiB"
	case len(body) == 0:
		e.Detail = "empty reply"
	case malformed:
		e.Detail = "reply is no JSON object"
	case ok && status == 200 && bizID != "":
		return verify.Receipt{BizID: token(bizID), RequestID: e.RequestID}, nil
	case ok:
		e.Detail = "OK without HTTP 200 and a BizId"
	case e.ProviderCode == "":
		e.Detail = "reply without a code"
	default:
		e.Kind = classify(e.ProviderCode)
		e.Detail = "rejected by Aliyun"
		switch e.Kind {
		case verify.SendUnknown:
			e.Detail = "failed at Aliyun"
		case verify.SendLimited:
			e.RetryAfter = retryAfter(e.ProviderCode, text("Message"))
		}
	}
	return verify.Receipt{}, e
}

func containsSecret(s, secret string) bool { return secret != "" && strings.Contains(s, secret) }
