package sms

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var quietLog = log.New(io.Discard, "", 0)

// The codes are those of Aliyun's documents and of practice, each with its HTTP statuses.
func TestSend_EveryAliyunCodeHasItsKind(t *testing.T) {
	const ok, bad, forbidden, missing, broken = http.StatusOK, http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound,
		http.StatusServiceUnavailable
	fake := dysmsapitest.New(t)
	a := sender(t, fake, "")
	requests := 0
	for _, c := range []struct {
		kind     verify.SendKind
		statuses []int
		codes    []string
	}{
		{verify.SendBadNumber, []int{ok}, []string{"isv.MOBILE_NUMBER_ILLEGAL", "MOBILE_NUMBER_ILLEGAL", "PhoneNumber.Illegal"}},
		{verify.SendBadNumber, []int{ok, bad}, []string{"InvalidRecNum.Malformed", "isv.InvalidRecNum.Malformed"}},
		{verify.SendRejected, []int{ok}, []string{ // the recipient
			"isv.BLACK_KEY_CONTROL_LIMIT", "isv.CUSTOMER_REFUSED", "BLACK_KEY_CONTROL_LIMIT", "NOT_SUPPORTED_COUNTRY"}},
		{verify.SendRejected, []int{ok}, []string{ // the account
			"isv.DAY_LIMIT_CONTROL", "isv.MONTH_LIMIT_CONTROL", "isv.AMOUNT_NOT_ENOUGH", "isv.OUT_OF_SERVICE", "isv.PRODUCT_UN_SUBSCRIPT",
			"isv.PRODUCT_UNSUBSCRIBE", "isv.ACCOUNT_NOT_EXISTS", "isv.ACCOUNT_ABNORMAL", "isv.SECURITY_FROZEN_ACCOUNT", "isv.DENY_IP_RANGE",
			"isp.RAM_PERMISSION_DENY", "RAM_PERMISSION_DENY", "AMOUNT_NOT_ENOUGH", "OUT_OF_SERVICE", "ACCOUNT_NOT_EXISTS", "ACCOUNT_ILLEGAL",
			"PRODUCT_NOT_SUBSCRIBED", "FORBIDDEN_ACTION",
		}},
		{verify.SendRejected, []int{ok}, []string{ // sign name and template
			"isv.SMS_SIGNATURE_ILLEGAL", "isv.SMS_SIGN_ILLEGAL", "isv.SIGN_STATE_ILLEGAL", "isv.SIGN_NAME_ILLEGAL", "isv.SIGNATURE_BLACKLIST",
			"isv.SMS_SIGNATURE_SCENE_ILLEGAL", "isv.SMS_TEMPLATE_ILLEGAL", "isv.DOMESTIC_NUMBER_NOT_SUPPORTED", "isv.SMS_TEST_SIGN_TEMPLATE_LIMIT",
			"isv.SMS_TEST_NUMBER_LIMIT", "isv.SMS_TEST_TEMPLATE_PARAMS_ILLEGAL", "isv.EXTEND_CODE_ERROR", "isv.ONE_CODE_MULTIPLE_SIGN",
			"isv.CODE_EXCEED_LIMIT", "isv.CODE_ERROR", "SMS_SIGN_NAME_ILLEGAL", "SMS_SIGNATURE_ILLEGAL", "SMS_TEMPLATE_ILLEGAL",
			"SMS_CONTENT_CODE_ILLEGAL", "INVALID_SENDERID", "SMS_SECURITY_INTERCEPTED",
		}},
		{verify.SendRejected, []int{ok}, []string{ // a template that is not for codes
			"isv.TEMPLATE_MISSING_PARAMETERS", "isv.TEMPLATE_PARAMS_ILLEGAL", "isv.PARAM_LENGTH_LIMIT", "isv.PARAM_NOT_SUPPORT_URL",
			"isv.SMS_CONTENT_ILLEGAL", "isv.UNSUPPORTED_CONTENT", "isv.SMS_CONTENT_MISMATCH_TEMPLATE_TYPE", "CONTENT_MISSING_PARAMETERS",
			"PARAM_LENGTH_LIMIT",
		}},
		{verify.SendRejected, []int{ok, broken}, []string{"isv.NOT_YET_INVENTED", "isv.missing-thing:a,b(c)[d]#1"}},
		{verify.SendRejected, []int{ok}, []string{ // the dotted names of the international API
			"Account.Abnormal", "Amount.NotEnough", "OutOfService", "DayLimitControl", "MonthLimitControl", "Unsupport.CountryCode",
			"Unknown.CountryCode",
		}},
		{verify.SendRejected, []int{ok, bad}, []string{ // the API of before 2017
			"InvalidSignName.Malformed", "isv.InvalidSignName.Malformed", "InvalidTemplateCode.MalFormed", "InvalidParamStringTemplate.Malformed",
			"InvalidDayuStatus.Malformed", "InvalidDayu.Malformed",
		}},
		{verify.SendRejected, []int{bad, forbidden, missing, broken}, []string{ // key and clock
			"SignatureDoesNotMatch", "InvalidAccessKeyId.NotFound", "InvalidAccessKeyId.Inactive", "MissingAccessKeyId", "IncompleteSignature",
			"InvalidSecurityToken.Expired", "MissingSecurityToken", "InvalidTimeStamp.Expired", "Forbidden.RAM", "Forbidden.AccessKeyDisabled",
			"NoPermission",
		}},
		{verify.SendBadRequest, []int{ok}, []string{
			"isv.INVALID_JSON_PARAM", "isv.INVALID_PARAMETERS", "isv.MOBILE_COUNT_OVER_LIMIT",
			"INVALID_PARAMETERS",
		}},
		{verify.SendBadRequest, []int{bad, missing}, []string{
			"InvalidAction.NotFound", "InvalidVersion", "NoSuchVersion", "InvalidTimeStamp.Format", "IllegalTimestamp", "UnsupportedHTTPMethod",
			"UnsupportedParameter",
			"MissingParameter", "MissingParameter.To", "MissingPhoneNumbers", "MissingSignName", "InvalidParameter", "InvalidParameter.Format",
			"InvalidApi.NotFound", "InvalidProduct.NotFound", "InvalidProtocol.NeedSsl", "InvalidRegion.NotFound", "InvalidSignatureMethod",
			"ContentLengthDoesNotMatch", "ContentMD5NotMatched", "InvalidParamString.MalFormed",
		}},
		{
			verify.SendNotAttempted,
			[]int{bad, http.StatusTooManyRequests, broken},
			[]string{"Throttling", "Throttling.User", "Throttling.Api", "QPS_LIMIT_CONTROL"},
		},
		{verify.SendRejected, []int{bad, forbidden}, []string{ // PNVS
			"FUNCTION_NOT_OPENED", "FunctionNotSubscribed", "DataNotFound", "Forbidden",
		}},
		{verify.SendUnknown, []int{ok, bad, http.StatusInternalServerError, http.StatusBadGateway, broken}, []string{
			"SignatureNonceUsed", "isp.SYSTEM_ERROR", "isp.GATEWAY_ERROR", "SYSTEM_ERROR", "InternalError", "ServiceUnavailable",
			"ONLINE_BILLING_FAILED", "Unlisted", "InvalidResponse",
			"Odd:Code", "Odd#Code@x~1", "a;b,c|d!*$(e)[f]",
		}},
	} {
		for _, code := range c.codes {
			for _, status := range c.statuses {
				for _, m := range []verify.Message{message, pnvsMessage} {
					t.Run(fmt.Sprint(code, " ", status, " ", ProductOf(m.TemplateCode)), func(t *testing.T) {
						// The text has a number and a code, so it must not be passed on.
						fake.Next(dysmsapitest.Reply(status, code, "18612345678 493817 触发天级流控"))
						got := failureOf(t.Context(), t, a, m)
						matches(t, got, verify.SendError{Kind: c.kind, ProviderCode: code, HTTPStatus: status})
						requests++
						checkSent(t, fake, 0, requests)
						if want := fake.RequestIDs()[requests-1]; got.RequestID != want {
							t.Errorf("got request id %q; want %q", got.RequestID, want)
						}
					})
				}
			}
		}
	}
}

func TestSend_LimitHasARetryDelay(t *testing.T) {
	for _, c := range []struct {
		code, message string
		want          time.Duration
	}{
		{"isv.BUSINESS_LIMIT_CONTROL", "触发分钟级流控Permits:1", time.Minute},
		{"isv.BUSINESS_LIMIT_CONTROL", "触发小时级流控Permits:5", time.Hour},
		{"isv.BUSINESS_LIMIT_CONTROL", "触发天级流控Permits:10", 24 * time.Hour},
		{"isv.BUSINESS_LIMIT_CONTROL", "", time.Minute},
		{"isv.BUSINESS_LIMIT_CONTROL", "too many today", time.Minute},
		{"BUSINESS_LIMIT_CONTROL", "触发小时级流控Permits:5", time.Hour},
		{"BUSINESS_LIMIT_MINUTE", "", time.Minute},
		{"BUSINESS_LIMIT_HOUR", "", time.Hour},
		{"isv.BUSINESS_LIMIT_DAY", "", 24 * time.Hour},
		{"isv.BUSINESS_LIMIT_CONTROL", "The number has exceeded the limit for the day.", 24 * time.Hour},
		{"BUSINESS_LIMIT_CONTROL", "The number has exceeded the limit for the hour.", time.Hour},
		{"VALVE:M_MC", "重复过滤", time.Minute},
		{"VALVE:H_MC", "重复过滤", time.Hour},
		{"VALVE:D_MC", "重复过滤", 24 * time.Hour},
		{"isv.VALVE:D_MC", "", 24 * time.Hour},
		{"VALVE:M", "", time.Minute},
		{"InvalidSendSms", "触发业务流控", time.Minute},
		{"FREQUENCY_FAIL", "Check frequency fail.", time.Minute},
	} {
		fake := dysmsapitest.New(t)
		a := sender(t, fake, "")
		for _, m := range []verify.Message{message, pnvsMessage} {
			fake.Next(dysmsapitest.Reply(200, c.code, c.message))
			matches(t, failureOf(t.Context(), t, a, m),
				verify.SendError{Kind: verify.SendLimited, ProviderCode: c.code, HTTPStatus: 200, RetryAfter: c.want})
		}
		checkSent(t, fake, 0, 2)
	}
}
