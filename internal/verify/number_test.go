package verify_test

import (
	"errors"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/nyaruka/phonenumbers"
	"pgregory.net/rapid"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var china = verify.NumberParser{Region: "CN", Plan: numberplan.Mobile}

func TestParse_EverySpellingIsOneNumber(t *testing.T) {
	for _, raw := range []string{
		"18612345678", "+86 186 1234 5678", "8618612345678", "008618612345678", "(186) 1234-5678", // docs/calling.md
		"+8618612345678", "86 186 1234 5678", "0086 186-1234-5678", "00 86 18612345678", "(0086)18612345678",
		"(+86) 186 1234 5678", "+86-186-1234-5678", " 18612345678 ", "1-8-6-1-2-3-4-5-6-7-8", "+ 86 18612345678",
		"018612345678", "+86 (0)186 1234 5678", "+86018612345678", "86018612345678", "0086 0186-1234-5678", "(0186) 1234 5678", // a trunk zero
		"\u202a+86 186 1234 5678\u202c", "\u202d18612345678\u202c", "\u206618612345678\u2069", "\ufeff18612345678", // as contact apps copy it
		"186\u200b1234\u200c56\u200d78\u200e\u200f", "\u2068+86\u00a0186\u202f1234\u20605678\u2069",
	} {
		t.Run(raw, func(t *testing.T) {
			if got, err := china.Parse(raw); err != nil || got != "+8618612345678" {
				t.Errorf("got %q, %v, want +8618612345678", got, err)
			}
		})
	}
}

func TestParse_MainlandRanges13To19AreMobile(t *testing.T) {
	for second := '3'; second <= '9'; second++ {
		for third := '0'; third <= '9'; third++ {
			raw := "1" + string(second) + string(third) + "00000000"
			if got, err := china.Parse(raw); err != nil || got != verify.Number("+86"+raw) {
				t.Errorf("%s: got %q, %v, want +86%s", raw, got, err, raw)
			}
		}
	}
}

func TestParse_OtherCountriesFollowTheirPlan(t *testing.T) {
	for _, c := range []struct{ region, raw, want string }{
		{"CN", "+852 5123 4567", "+85251234567"},
		{"CN", "00852 5123 4567", "+85251234567"},
		{"CN", "+886 912 345 678", "+886912345678"}, // Taiwan, not +86
		{"CN", "+1 (201) 555-0123", "+12015550123"},
		{"CN", "+44 7400 123456", "+447400123456"},
		{"HK", "5123 4567", "+85251234567"},
		{"GB", "07400 123456", "+447400123456"},
		{"US", "(201) 555-0123", "+12015550123"},
		{"HK", "+8618612345678", "+8618612345678"},
		{"HK", "001 86 186 1234 5678", "+8618612345678"},
		{"US", "011 86 186 1234 5678", "+8618612345678"},
		{"SG", "+86 199 0000 0000", "+8619900000000"},
		// A longer prefix is not 00. If it were read as 00, the SMS would reach another person in +1.
		{"AU", "0011 65 9234 5678", "+6592345678"},
		{"HK", "001 44 7400 123456", "+447400123456"},
		{"AU", "0011 1 201 555 0123", "+12015550123"},
	} {
		t.Run(c.region+" "+c.raw, func(t *testing.T) {
			p := verify.NumberParser{Region: c.region, Plan: numberplan.Mobile}
			if got, err := p.Parse(c.raw); err != nil || string(got) != c.want {
				t.Errorf("got %q, %v, want %s", got, err, c.want)
			}
		})
	}
}

func TestParse_AmbiguousDoubleZeroIsRejected(t *testing.T) {
	for _, c := range []struct{ region, raw string }{
		{"HK", "0091 81234 56789"}, // 009, +1 812 345 6789
		{"HK", "(00) 91-81234-56789"},
		{"HK", "001 65 9234 5678"}, // 001, +65 9234 5678, or 00, +1 659 234 5678
		{"SG", "0091 81234 56789"},
	} {
		p := verify.NumberParser{Region: c.region, Plan: numberplan.Mobile}
		if got, err := p.Parse(c.raw); err == nil || !strings.Contains(err.Error(), "write + and the country code") {
			t.Errorf("%s %s: got %q, %v; want an error with the valid form", c.region, c.raw, got, err)
		}
	}
}

// People write 00 for + in every region. Such a number must never reach another person.
func TestParse_DoubleZeroNeverReachesAnotherNumber(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	shapes := []string{ // of mobile numbers: CN, IN, JP, GB, SG, US, TW
		"861[3-9]xxxxxxxxx", "91[6-9]xxxxxxxxx", "81[7-9]0[1-9]xxxxxxx", "447[4-9]xxxxxxxx", "65[89]xxxxxxx", "1[2-9][0-8]x[2-9]xxxxxx",
		"8869xxxxxxxx",
	}
	tried, rejected := 0, 0
	for region := range phonenumbers.GetSupportedRegions() {
		p := verify.NumberParser{Region: region, Plan: numberplan.Mobile}
		for _, shape := range shapes {
			for range 3 {
				digits := draw(random, shape)
				want, err := p.Parse("+" + digits)
				if err != nil {
					continue
				}
				tried++
				got, err := p.Parse("00" + digits)
				if err != nil {
					rejected++
				} else if got != want {
					t.Errorf("%s: 00%s reaches %s; want %s, or an error", region, digits, got, want)
				}
			}
		}
	}
	if tried < 2500 || rejected == 0 || rejected == tried {
		t.Errorf("got %d numbers, %d of them rejected; want 2,500 or more, and some rejected", tried, rejected)
	}
}

// draw returns a random text of shape: x stands for a digit, [2-9] for one of these.
func draw(r *rand.Rand, shape string) string {
	return regexp.MustCompile(`x|\[[0-9]+(-[0-9])?\]`).ReplaceAllStringFunc(shape, func(class string) string {
		switch {
		case class == "x":
			return strconv.Itoa(r.IntN(10))
		case strings.Contains(class, "-"):
			return string(rune(int(class[1]) + r.IntN(int(class[3]-class[1])+1)))
		default:
			return string(class[1+r.IntN(len(class)-2)])
		}
	})
}

func TestParse_ErrorNamesTheFieldAndHidesTheInput(t *testing.T) {
	for name, raw := range map[string]string{
		"empty":                                "",
		"whitespace":                           "   ",
		"two numbers by a comma":               "18612345678,18612345679",
		"a trailing comma":                     "18612345678,",
		"a control character":                  "1861234\x075678",
		"a tab":                                "186\t12345678",
		"a line break":                         "18612345678\n",
		"a carriage return":                    "18612345678\r",
		"NUL":                                  "18612345678\x00",
		"a delete character":                   "18612345678\x7f",
		"full-width digits":                    "１８６１２３４５６７８",
		"one full-width digit":                 "1861234567８",
		"a full-width plus":                    "＋8618612345678",
		"Arabic-Indic digits":                  "١٨٦١٢٣٤٥٦٧٨",
		"an emoji":                             "1861234567📱",
		"a keycap emoji":                       "1861234567" + "8️⃣",
		"a letter":                             "1861234567a",
		"letters of a vanity number":           "+1800FLOWERS",
		"an extension":                         "+12015550123;ext=5",
		"invisible characters alone":           "\u200b\ufeff\u00a0",
		"an em space":                          "186\u200312345678",
		"an ideographic space":                 "186\u300012345678",
		"a soft hyphen":                        "186\u00ad12345678",
		"an invisible plus":                    "\u20648618612345678",
		"a line separator":                     "18612345678\u2028",
		"a tag":                                "18612345678\U000e0031",
		"a variation selector":                 "1861234567" + "8\ufe0e",
		"a plus after an invisible character":  "1\u200b+8618612345678",
		"half of a UTF-8 sequence":             "18612345678\xe2\x80",
		"an en dash":                           "186–1234–5678",
		"a dot":                                "186.1234.5678",
		"invalid UTF-8":                        "1861234567\xff",
		"SQL":                                  "18612345678' OR '1'='1",
		"an SQL comment":                       "18612345678/*",
		"an SQL wildcard":                      "186%",
		"a semicolon":                          "18612345678;",
		"too short":                            "1391234567",
		"too long":                             "186123456789",
		"too short with the country code":      "+86139123456",
		"too long with the country code":       "+86186123456789",
		"the country code twice":               "+868618612345678",
		"the country code twice, bare":         "868618612345678",
		"two trunk zeros":                      "0018612345678",
		"two trunk zeros after the code":       "+860018612345678",
		"a trunk zero before the code":         "08618612345678",
		"a trunk zero and a landline":          "+86 (0)10 8232 5588",
		"a trunk zero and an area of 10 to 12": "+86 (0)12012345678",
		"2 KB of digits":                       strings.Repeat("1", 2048),
		"2 KB of spaces round a number":        "18612345678" + strings.Repeat(" ", 2048),
		"a landline":                           "010-82325588",
		"a landline with the country code":     "+86 10 8232 5588",
		"a service number":                     "10086",
		"a service number, international":      "+8610086",
		"an emergency number":                  "110",
		"a toll-free number":                   "400-810-8888",
		"a range that is no mobile's":          "12012345678",
		"a plus alone":                         "+",
		"two pluses":                           "++8618612345678",
		"a plus inside":                        "86+18612345678",
		"a plus at the end":                    "18612345678+",
		"zeros":                                "00",
		"a country code that begins with zero": "+0086186" + "12345678",
		"no such country":                      "+999 123 456 789",
		"a landline of another country":        "+44 20 7946 0000",
		"a mainland number with a plus for 00": "+008618612345678",
		"hyphens":                              "---",
		"parentheses":                          "()",
	} {
		t.Run(name, func(t *testing.T) {
			got, err := china.Parse(raw)
			var field *verify.FieldError
			if !errors.As(err, &field) || field.Field != "phone_number" || got != "" {
				t.Fatalf("got %q, %v, want a FieldError of phone_number", got, err)
			}
			if len(raw) > 3 && strings.TrimSpace(raw) != "" && strings.Contains(err.Error(), raw) {
				t.Errorf("got %q, want an error without the input", err)
			}
		})
	}
}

// The plan is called only with ASCII digits, perhaps after a plus.
func TestParse_PlanGetsOnlyDialledDigits(t *testing.T) {
	dialled := regexp.MustCompile(`^\+?[0-9]*$`)
	p := verify.NumberParser{Region: "US", Plan: func(number, _ string) (string, bool) {
		if !dialled.MatchString(number) {
			t.Errorf("got %q for the plan, want ASCII digits, perhaps after a plus", number)
		}
		return "+12015550123", true
	}}
	for _, raw := range []string{"(201) 555-0123", "+1 201", "201;ext=1", "２０１", "201 a", "00 1 201", "201+5550123", "++1201"} {
		_, _ = p.Parse(raw)
	}
}

// A plan cannot return a number that is not E.164, or a mainland number.
func TestParse_RejectsAnInvalidResultOfThePlan(t *testing.T) {
	for _, result := range []string{
		"", "+", "12015550123", "+0201555", "+1201555012345678", "+1201555a", "+1201555,0123", "+8610082325588",
		"+12015550123\n",
	} {
		p := verify.NumberParser{Region: "US", Plan: func(string, string) (string, bool) { return result, true }}
		if got, err := p.Parse("2015550123"); err == nil {
			t.Errorf("a plan that returns %q: got %q, want a FieldError", result, got)
		}
	}
}

func TestMasked_HidesFourDigits(t *testing.T) {
	for number, want := range map[verify.Number]string{
		"+8618612345678":    "+86186****5678",
		"+12015550123":      "+120****0123",
		"+85251234567":      "+852****4567",
		"+123456789":        "+1****6789",
		"+12345678":         "+****", // too short to show digits
		"+1234567":          "+****",
		"":                  "+****",
		"+1234567890123456": "+12345678****3456",
	} {
		if got := number.Masked(); got != want {
			t.Errorf("%s: got %s, want %s", number, got, want)
		}
	}
}

func TestMainland_IsCountryCode86(t *testing.T) {
	for number, want := range map[verify.Number]bool{
		"+8618612345678": true, "+85251234567": false, "+886912345678": false,
		"+85366123456": false,
	} {
		if got := number.Mainland(); got != want {
			t.Errorf("%s: got %v, want %v", number, got, want)
		}
	}
}

// Every spelling of a mainland number that G6 (docs/guarantees.md) allows is one number.
func TestParse_RandomSpellingsOfOneNumberAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		national := rapid.StringMatching(`1[3-9][0-9]{9}`).Draw(t, "number")
		digits := rapid.SampledFrom([]string{"", "86", "0086", "+86"}).Draw(t, "prefix") + rapid.SampledFrom([]string{"", "0"}).Draw(t,
			"trunk") + national
		var raw strings.Builder
		for _, d := range digits {
			raw.WriteString(rapid.SampledFrom([]string{"", "", " ", "-", "(", ")", "\u200e", "\u00a0"}).Draw(t, "filler"))
			raw.WriteRune(d)
		}
		if got, err := china.Parse(raw.String()); err != nil || string(got) != "+86"+national {
			t.Fatalf("%q: got %q, %v, want +86%s", raw.String(), got, err, national)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, raw := range []string{
		"18612345678", "+86 186 1234 5678", "008618612345678", "(186) 1234-5678", "10086", "",
		"+12015550123", "+5491123456789", "+5215512345678", "+390312345678", "+2250123456789", "+447400123456",
		"１８６１２３４５６７８", "18612345678,18612345679", "+1 684 733 1234", "\x00", "+86 (0)186\u00a01234 5678", "0091 81234 56789",
		"\u202a018612345678\u202c", "+24103249100", "+870773111632", "+262692123456",
	} {
		f.Add(raw, "CN")
		f.Add(raw, "US")
	}
	want := regexp.MustCompile(`^\+[1-9][0-9]{6,14}$`)
	f.Fuzz(func(t *testing.T, raw, region string) {
		p := verify.NumberParser{Region: region, Plan: numberplan.Mobile}
		n, err := p.Parse(raw)
		if err != nil {
			var field *verify.FieldError
			if !errors.As(err, &field) || n != "" {
				t.Fatalf("%q: got %q, %v, want a FieldError", raw, n, err)
			}
			return
		}
		if !want.MatchString(string(n)) {
			t.Fatalf("%q: got %q, want E.164", raw, n)
		}
		spellings := []string{
			string(n), " " + string(n[:3]) + "-(" + string(n[3:]) + ")",
			"\u202a" + string(n[:4]) + "\u00a0" + string(n[4:]) + "\u202c",
		}
		if n.Mainland() {
			spellings = append(spellings, "+86 (0)"+string(n[3:]))
		}
		if region == "CN" {
			spellings = append(spellings, "00"+string(n[1:]))
		}
		for _, spelling := range spellings {
			if again, err := p.Parse(spelling); err != nil || again != n {
				t.Fatalf("%q is %s; its spelling %q: got %q, %v; want the same number", raw, n, spelling, again, err)
			}
		}
		if masked := n.Masked(); strings.Count(masked, "*") != 4 {
			t.Fatalf("%s masked: got %s, want four digits hidden", n, masked)
		}
	})
}
