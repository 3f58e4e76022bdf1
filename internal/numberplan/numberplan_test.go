package numberplan_test

import (
	"fmt"
	"math/rand/v2"
	"regexp/syntax"
	"strings"
	"testing"

	"github.com/nyaruka/phonenumbers"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var _ verify.NumberingPlan = numberplan.Mobile

func TestMobile_ReturnsTheE164Form(t *testing.T) {
	for _, c := range []struct{ name, number, region, want string }{
		{"international, from another region", "+447400123456", "CN", "+447400123456"},
		{"as dialled at home, with the trunk zero", "07400123456", "GB", "+447400123456"},
		{"a country where mobiles and landlines share ranges", "+12015550123", "CN", "+12015550123"},
		{"Hong Kong", "51234567", "HK", "+85251234567"},
		{"Macao", "+85366123456", "CN", "+85366123456"},
		{"Taiwan, whose code begins like China's", "+886912345678", "CN", "+886912345678"},
		{"a zero that belongs to the number stays (Ivory Coast)", "+2250123456789", "CN", "+2250123456789"},
		{"Gabon's form of before 2019, with its zero", "+24103249100", "CN", "+24103249100"},
		{"Gabon's form of before 2019, without it", "+2413249100", "CN", "+24103249100"},
		{"Gabon's form of before 2019, as dialled at home", "03 24 91 00", "GA", "+24103249100"},
		{"Gabon's form of today", "+24162345678", "CN", "+24162345678"},
		{"Gabon's form of today, with a trunk zero", "+241062345678", "CN", "+24162345678"},
		{"a trunk zero after the country code (Japan)", "+8109012345678", "CN", "+819012345678"},
		{"a trunk zero after the country code (Germany)", "+49015123456789", "CN", "+4915123456789"},
		{"mainland China", "18612345678", "CN", "+8618612345678"},
		{"a satellite phone, which is of no region", "+870773111632", "US", "+870773111632"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, ok := numberplan.Mobile(c.number, c.region); !ok || got != c.want {
				t.Errorf("Mobile(%q, %q): got %q, %v; want %q, true", c.number, c.region, got, ok, c.want)
			}
		})
	}
}

func TestMobile_RejectsOtherNumbers(t *testing.T) {
	for _, c := range []struct{ name, number, region string }{
		{"nothing", "", "CN"},
		{"a plus alone", "+", "CN"},
		{"a landline", "+861082325588", "CN"},
		{"a London landline", "+442079460000", "GB"},
		{"a service number", "10086", "CN"},
		{"an emergency number", "110", "CN"},
		{"a toll-free number", "+18002345678", "US"},
		{"a toll-free number of no region", "+80012345678", "US"},
		{"no such country code", "+999123456789", "CN"},
		{"a country code that begins with zero", "+0086186", "CN"},
		{"too short", "+4474001", "GB"},
		{"too long", "+447400123456789012345", "GB"},
		{"a national number of no known region", "18612345678", "XX"},
		{"a national number of the empty region", "18612345678", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, ok := numberplan.Mobile(c.number, c.region); ok {
				t.Errorf("Mobile(%q, %q): got %q, true; want false", c.number, c.region, got)
			}
		})
	}
}

// The domain stores the state of a number under its E.164 form. So an E.164 form, parsed in any
// region, must stay the same.
func TestMobile_E164FormOfEveryRegionIsUnchanged(t *testing.T) {
	for region := range phonenumbers.GetSupportedRegions() {
		example := phonenumbers.GetExampleNumberForType(region, phonenumbers.MOBILE)
		if example == nil {
			continue
		}
		national := phonenumbers.Format(example, phonenumbers.NATIONAL)
		want := phonenumbers.Format(example, phonenumbers.E164)
		// The library's national form of an Argentine number cannot be dialled.
		if got, ok := numberplan.Mobile(national, region); region != "AR" && (!ok || got != want) {
			t.Errorf("Mobile(%q, %q): got %q, %v; want %q, true", national, region, got, ok, want)
		}
		for _, from := range []string{"CN", "US", region} {
			if got, ok := numberplan.Mobile(want, from); !ok || got != want {
				t.Errorf("Mobile(%q, %q): got %q, %v; want it unchanged", want, from, got, ok)
			}
		}
	}
}

// If people may write or omit the first digit, as a trunk prefix or by an older plan, one person
// could have two numbers. So a mobile number without its first digit must not be another mobile
// number. The exceptions have numbers of several lengths, and both are real, different numbers.
// If the test finds another exception, check the plan of that region.
func TestMobile_FirstDigitIsNoSecondForm(t *testing.T) {
	exceptions := map[string]bool{
		"BR 1": true, "BR 8": true, "BR 9": true, "HR 9": true, "ID 8": true, "KH 1": true, "KH 8": true, "KH 9": true, "KR 1": true,
		"MM 9": true, "MY 1": true, "SO 9": true, "ZA 1": true,
	}
	metadata, err := phonenumbers.MetadataCollection()
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	tried := 0
	for _, region := range metadata.GetMetadata() {
		shape, err := syntax.Parse(region.GetMobile().GetNationalNumberPattern(), syntax.Perl)
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			number := fmt.Sprintf("+%d%s", region.GetCountryCode(), draw(random, shape))
			e164, ok := numberplan.Mobile(number, "ZZ")
			if !ok {
				continue
			}
			tried++
			code := len(fmt.Sprint("+", region.GetCountryCode()))
			first, rest := number[code:code+1], number[:code]+number[code+1:]
			if !strings.Contains("0189", first) || exceptions[region.GetId()+" "+first] {
				continue
			}
			if other, ok := numberplan.Mobile(rest, "ZZ"); ok && other != e164 {
				t.Errorf("%s: %s is %s; got %s without its first digit, want the same or none", region.GetId(), number, e164, other)
			}
		}
	}
	if tried < 10_000 {
		t.Errorf("got %d numbers; want 10,000 or more", tried)
	}
}

// draw returns a random text that matches shape. It has the operators that the patterns of the
// metadata use.
func draw(r *rand.Rand, shape *syntax.Regexp) (text string) {
	switch shape.Op {
	case syntax.OpLiteral:
		return string(shape.Rune)
	case syntax.OpCharClass:
		var all []rune
		for i := 0; i < len(shape.Rune); i += 2 {
			for c := shape.Rune[i]; c <= shape.Rune[i+1]; c++ {
				all = append(all, c)
			}
		}
		return string(all[r.IntN(len(all))])
	case syntax.OpAlternate:
		return draw(r, shape.Sub[r.IntN(len(shape.Sub))])
	case syntax.OpQuest, syntax.OpRepeat:
		least, most := shape.Min, shape.Max
		if shape.Op == syntax.OpQuest {
			least, most = 0, 1
		}
		for range least + r.IntN(most-least+1) {
			text += draw(r, shape.Sub[0])
		}
		return text
	case syntax.OpConcat, syntax.OpCapture:
		for _, sub := range shape.Sub {
			text += draw(r, sub)
		}
		return text
	case syntax.OpEmptyMatch:
		return ""
	}
	panic(shape.Op)
}

func TestKnownRegion_AcceptsUpperCaseTwoLetterCodesOnly(t *testing.T) {
	for region, want := range map[string]bool{
		"CN": true, "HK": true, "US": true, "GB": true,
		"": false, "cn": false, "CHN": false, "XX": false, "UK": false, "001": false, "86": false,
	} {
		if got := numberplan.KnownRegion(region); got != want {
			t.Errorf("KnownRegion(%q): got %v, want %v", region, got, want)
		}
	}
}

func TestCountry_IsThatOfTheCountryCode(t *testing.T) {
	for number, want := range map[verify.Number]string{
		"+8618612345678": "CN", "+12025550123": "US", "+16135550123": "US", "+447400123456": "GB", "+85251234567": "HK",
		"+6591234567": "SG", "+79161234567": "RU", "+88212345678": "001", "+2101234567": "ZZ", "+8": "ZZ",
	} {
		if got := numberplan.Country(number); got != want {
			t.Errorf("%s: got %s, want %s", number, got, want)
		}
	}
}
