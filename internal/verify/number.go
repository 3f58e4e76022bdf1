package verify

import (
	"regexp"
	"strings"
)

// A Number is one mobile number in E.164 form with its plus: "+8618612345678".
type Number string

// Masked returns the number for logs, with four digits hidden: "+86186****5678".
func (n Number) Masked() string {
	const hidden, shown = 4, 4
	if len(n) < len("+1")+hidden+shown {
		return "+****"
	}
	return string(n[:len(n)-hidden-shown]) + "****" + string(n[len(n)-shown:])
}

// Mainland reports whether the number belongs to mainland China, for which Aliyun's
// limits and its eleven-digit form apply.
func (n Number) Mainland() bool { return strings.HasPrefix(string(n), "+86") }

// NumberingPlan returns the E.164 form of number as dialled in region (ISO 3166
// alpha-2), and false if it is not a mobile number. number is ASCII digits, after a plus
// if it is international.
type NumberingPlan func(number, region string) (e164 string, ok bool)

// NumberParser parses the field phone_number into a Number, so that every spelling of a
// number gives the same Number.
type NumberParser struct {
	Region string // for numbers without country code, ISO 3166 alpha-2
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

// IsMainlandMobile reports whether digits have the form of a mobile number within
// mainland China: 1, then 3 to 9, then nine digits. It checks only the form, since new
// ranges are assigned there faster than the metadata is updated.
func IsMainlandMobile(digits string) bool { return mainlandMobile.MatchString(digits) }

// isFiller reports whether c only formats a number: a space, a hyphen, a parenthesis, or
// one of the invisible characters that contact apps put around numbers so that they are
// shown from left to right and on one line.
func isFiller(c rune) bool {
	switch c {
	case ' ', '-', '(', ')', '\u00a0', '\u202f', '\u2060', '\ufeff':
		return true
	}
	return '\u200b' <= c && c <= '\u200f' || '\u202a' <= c && c <= '\u202e' || '\u2066' <= c && c <= '\u2069'
}

// Parse removes filler characters. It reads "+" as the start of a country code, and any
// other number as dialled in the parser's region. It rejects a number that begins with 00
// if replacing the 00 by + gives another number: people write 00 for + in every region,
// even if 00 begins another prefix there. Its error never repeats the input.
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
			return "", &FieldError{"phone_number", numberWanted + "; only digits, a leading +, spaces, hyphens and parentheses may stand in it"}
		}
	}
	number := string(kept)
	n, err := p.read(number)
	// 0011 is only Australia's prefix: no area code of +1 begins with 1.
	if international, ok := strings.CutPrefix(number, "00"); ok && err == nil && !strings.HasPrefix(international, "11") {
		if other, err := p.read("+" + international); err == nil && other != n {
			return "", &FieldError{"phone_number", numberWanted + "; this one, with its 00, can be read as two numbers: write + and the country code"}
		}
	}
	return n, err
}

// read parses ASCII digits, after a plus if they are international.
func (p NumberParser) read(number string) (Number, *FieldError) {
	// In other regions 00 can begin another prefix (Hong Kong dials 001, 0060 and
	// more), which the plan knows.
	if rest, ok := strings.CutPrefix(number, "00"); ok && p.Region == "CN" {
		number = "+" + rest
	}
	if p.Region == "CN" && number != "" && number[0] != '+' {
		number = "+86" + strings.TrimPrefix(number, "86") // no mobile number begins with 86
	}
	if !strings.HasPrefix(number, "+86") {
		var ok bool
		if strings.HasPrefix(number, "+0") { // some plans accept it
			number = ""
		}
		if number, ok = p.Plan(number, p.Region); !ok || !e164.MatchString(number) {
			return "", &FieldError{"phone_number", numberWanted +
				"; this is no mobile number of region " + p.Region + " or of the country code it begins with"}
		}
	}
	if national, ok := strings.CutPrefix(number, "+86"); ok {
		national = strings.TrimPrefix(national, "0") // a trunk zero: no area code begins with 013 to 019
		if !IsMainlandMobile(national) {
			return "", &FieldError{"phone_number", numberWanted + "; in mainland China that is 1, then 3 to 9, then nine digits (numbers of other countries begin with + and the country code)"}
		}
		number = "+86" + national
	}
	return Number(number), nil
}
