package verify

import (
	"regexp"
	"strings"
)

// Number is a mobile number in E.164 form, with a leading plus: "+8618612345678".
type Number string

// Masked returns the form of the number for logs. It hides the four digits before the last four:
// "+86186****5678". It hides all digits of a short number.
func (n Number) Masked() string {
	const hidden, shown = 4, 4
	if len(n) < len("+1")+hidden+shown {
		return "+****"
	}
	return string(n[:len(n)-hidden-shown]) + "****" + string(n[len(n)-shown:])
}

// Mainland reports whether the number belongs to mainland China. Aliyun has default limits only for
// these numbers, and accepts only these without the country code.
func (n Number) Mainland() bool { return strings.HasPrefix(string(n), "+86") }

// NumberingPlan returns the E.164 form of a number as it is dialled in region (ISO 3166 alpha-2).
// ok is false if the number is not a mobile number. number consists of ASCII digits, with a leading
// plus if they begin with a country code.
type NumberingPlan func(number, region string) (e164 string, ok bool)

// NumberParser parses the field phone_number into a Number. All forms of one number give the
// same Number, so that a person cannot get more attempts by writing it in another form.
type NumberParser struct {
	Region string // ISO 3166 alpha-2; for numbers without a country code
	Plan   NumberingPlan
}

const (
	maxNumberInput = 64
	numberWanted   = `must be one mobile number, for example "+8618612345678"`
)

var (
	mainlandMobile = regexp.MustCompile(`^1[3-9][0-9]{9}$`)
	e164           = regexp.MustCompile(`^\+[1-9][0-9]{6,14}$`)
)

// IsMainlandMobile reports whether digits have the form of a mobile number of mainland China
// without a country code. It checks only the form, since China assigns new ranges before the
// metadata of the numbering plan has them.
func IsMainlandMobile(digits string) bool { return mainlandMobile.MatchString(digits) }

// isFiller reports whether c only formats a number: a space, a hyphen, a parenthesis, or an
// invisible character. Contact apps put invisible characters around a number, so that it is
// displayed from left to right and on one line.
func isFiller(c rune) bool {
	return strings.ContainsRune(" -()\u00a0\u202f\u2060\ufeff", c) ||
		'\u200b' <= c && c <= '\u200f' || '\u202a' <= c && c <= '\u202e' || '\u2066' <= c && c <= '\u2069'
}

// Parse returns the Number of raw. It removes filler characters. A leading plus means that the
// country code follows. Without a plus, raw is the number as it is dialled in the parser's region.
//
// Parse rejects a number that begins with 00 if it is ambiguous: if another number results from +
// in place of the 00. People in every region write 00 for +, even if 00 begins a different prefix
// there. An error never repeats the input.
func (p NumberParser) Parse(raw string) (Number, *FieldError) {
	if raw == "" {
		return "", &FieldError{"phone_number", "is required: " + strings.TrimPrefix(numberWanted, "must be ")}
	}
	if len(raw) > maxNumberInput {
		return "", &FieldError{"phone_number", numberWanted + "; this is too long"}
	}
	kept := make([]byte, 0, len(raw))
	for _, c := range raw {
		switch {
		case isFiller(c):
		case c >= '0' && c <= '9' || c == '+' && len(kept) == 0:
			kept = append(kept, byte(c))
		default:
			return "", &FieldError{"phone_number", numberWanted + "; only digits, a leading +, spaces, hyphens and parentheses are allowed"}
		}
	}
	number := string(kept)
	n, err := p.read(number)
	// 0011 is Australia's prefix for international calls, and has no other meaning. With + in
	// place of 00 the number would begin with +11, but no area code of +1 begins with 1.
	if international, ok := strings.CutPrefix(number, "00"); ok && err == nil && !strings.HasPrefix(international, "11") {
		if other, err := p.read("+" + international); err == nil && other != n {
			return "", &FieldError{"phone_number", numberWanted + "; this one begins with 00, and can be read as two numbers: write + and the country code"}
		}
	}
	return n, err
}

// read parses ASCII digits, with a leading plus if they begin with a country code.
func (p NumberParser) read(number string) (Number, *FieldError) {
	// Only CN is handled here. In another region, 00 can begin a longer prefix (in Hong
	// Kong 001 and 0060, for example); the Plan has these prefixes.
	if rest, ok := strings.CutPrefix(number, "00"); ok && p.Region == "CN" {
		number = "+" + rest
	}
	if p.Region == "CN" && number != "" && number[0] != '+' {
		// A leading 86 is the country code, since no mobile number begins with 8.
		number = "+86" + strings.TrimPrefix(number, "86")
	}
	if !strings.HasPrefix(number, "+86") {
		var ok bool
		if strings.HasPrefix(number, "+0") { // invalid, but a Plan may accept it
			number = ""
		}
		if number, ok = p.Plan(number, p.Region); !ok || !e164.MatchString(number) {
			return "", &FieldError{"phone_number", numberWanted +
				"; this is not a mobile number of region " + p.Region + " or of its country code"}
		}
	}
	if national, ok := strings.CutPrefix(number, "+86"); ok {
		// The zero of 0138… is a trunk prefix: the number is not a landline, since no area
		// code begins with 013 to 019.
		national = strings.TrimPrefix(national, "0")
		if !IsMainlandMobile(national) {
			return "", &FieldError{"phone_number", numberWanted + "; in mainland China it is 1, then 3 to 9, then nine digits (numbers of other countries begin with + and the country code)"}
		}
		number = "+86" + national
	}
	return Number(number), nil
}
