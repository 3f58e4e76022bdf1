package sms

// carrierCodes are the codes with which a carrier, or Aliyun for it, says that an SMS did not arrive. They
// are those of Aliyun's document 101347.
var carrierCodes = map[string]struct{ meaning, action string }{
	"PORT_NOT_REGISTERED": {
		"the carrier does not know the sign name: its real-name registration is not finished",
		"see its state in the console (签名管理 → 实名制报备); it takes 5 to 10 days, and until then another sign name must be used",
	},
	"SIGNATURE_BLACKLIST": {"the carrier or Aliyun blocks the sign name", "use another sign name, and ask Aliyun's support"},
	"isv.ONE_CODE_MULTIPLE_SIGN": {
		"two sign names share one extension code", "ask Aliyun's support",
	},
	"isv.CODE_EXCEED_LIMIT": {"the account has no extension code left for this sign name", "remove sign names that are not used, or ask Aliyun's support"},
	"isv.CODE_ERROR":        {"the extension code of the sign name cannot be used", "ask Aliyun's support"},

	"CONTENT_KEYWORD": {
		"the carrier blocks a word in the text or the sign name",
		"change the template; with a new sign name, check its real-name registration first",
	},
	"CONTENT_ERROR": {"the text has the form of an advertisement without a way to opt out", "use a template of the type 验证码"},
	"isv.UNSUPPORTED_CONTENT": {
		"the text has characters that the carrier cannot send", "change the template",
	},
	"isv.SMS_CONTENT_MISMATCH_TEMPLATE_TYPE": {"the text does not fit the type of the template", "use a template of the type 验证码"},
	"PARAMS_ILLEGAL": {
		"sign name, text or number has a wrong form", "check the sign name and the template in the console",
	},

	"IS_CLOSE": {"the channel to the carrier was closed", "wait: Aliyun takes another channel by itself"},
	"NO_ROUTE": {
		"Aliyun has no channel to this carrier for this text",
		"check the real-name registration of the sign name, then ask Aliyun's support",
	},
	"SP_UNKNOWN_ERROR": {
		"the carrier gave no reason",
		"if it happens to many numbers, check the real-name registration of the sign name, then ask Aliyun's support",
	},
	"REQUEST_SUCCESS": {"the carrier took the SMS and sent no receipt; usually the phone is off or out of coverage", "ask the user, and send again later"},

	"MOBILE_NOT_ON_SERVICE": {"the phone is off or out of coverage, or the number is suspended or not in use", "ask the user, and send again later"},
	"INVALID_NUMBER":        {"the number is not in use, or its phone is off", "ask the user for the number"},
	"MOBILE_ACCOUNT_ABNORMAL": {
		"the number is in arrears, or has moved to another carrier", "the user must ask the carrier",
	},
	"MOBLLE_TERMINAL_ERROR": { // Aliyun's spelling
		"the phone or its SIM card cannot store the SMS", "the user must free memory, or use another phone",
	},
	"SP_NOT_BY_INTER_SMS": {"the number gets no SMS from abroad", "the user must ask the carrier"},
	"MOBILE_SEND_LIMIT":   {"the number got too many SMS in a minute, day or month", "wait a day; if it happens to many numbers, somebody has codes sent to them"},
	"MOBILE_IN_BLACK": {
		"the number is on a block list of the carrier or Aliyun; usually its user opted out",
		"the user must ask the carrier; if it lasts, ask Aliyun's support",
	},
	"USER_REJECT": {"the user opted out", "the user must ask the carrier"},
}

// Meaning returns what an error code of a Delivery means, and what to do. Both are "" if the code is not
// known.
func Meaning(errorCode string) (meaning, action string) {
	c := carrierCodes[errorCode]
	return c.meaning, c.action
}
