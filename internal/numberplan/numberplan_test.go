package numberplan_test

import (
	"testing"

	"github.com/nyaruka/phonenumbers"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

var _ verify.NumberingPlan = numberplan.Mobile

func TestMobileReturnsTheE164FormOfAMobileNumber(t *testing.T) {
	for _, c := range []struct{ name, number, region, want string }{
		{"international, from another region", "+447400123456", "CN", "+447400123456"},
		{"as dialled at home, with the trunk zero", "07400123456", "GB", "+447400123456"},
		{"a country where mobiles and landlines share ranges", "+12015550123", "CN", "+12015550123"},
		{"Hong Kong", "51234567", "HK", "+85251234567"},
		{"Macao", "+85366123456", "CN", "+85366123456"},
		{"Taiwan, whose code begins like China's", "+886912345678", "CN", "+886912345678"},
		{"a zero that belongs to the number stays (Ivory Coast)", "+2250123456789", "CN", "+2250123456789"},
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

func TestMobileRefusesWhatIsNoMobileNumber(t *testing.T) {
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

// The domain keeps one state a number under its E.164 form, so that form has to be
// the same when it is typed itself, from anywhere.
func TestTheE164FormOfEveryRegionIsItsOwnE164Form(t *testing.T) {
	for region := range phonenumbers.GetSupportedRegions() {
		example := phonenumbers.GetExampleNumberForType(region, phonenumbers.MOBILE)
		if example == nil {
			continue
		}
		national := phonenumbers.Format(example, phonenumbers.NATIONAL)
		want := phonenumbers.Format(example, phonenumbers.E164)
		// The library writes Argentina's national form so that nobody can dial it.
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

func TestKnownRegionTakesUpperCaseTwoLetterCodesOnly(t *testing.T) {
	for region, want := range map[string]bool{
		"CN": true, "HK": true, "US": true, "GB": true,
		"": false, "cn": false, "CHN": false, "XX": false, "UK": false, "001": false, "86": false,
	} {
		if got := numberplan.KnownRegion(region); got != want {
			t.Errorf("KnownRegion(%q): got %v, want %v", region, got, want)
		}
	}
}

func TestCountryIsThatOfTheCountryCode(t *testing.T) {
	for number, want := range map[verify.Number]string{
		"+8618612345678": "CN", "+12025550123": "US", "+16135550123": "US", "+447400123456": "GB", "+85251234567": "HK",
		"+6591234567": "SG", "+79161234567": "RU", "+88212345678": "001", "+2101234567": "ZZ", "+8": "ZZ",
	} {
		if got := numberplan.Country(number); got != want {
			t.Errorf("%s: got %s, want %s", number, got, want)
		}
	}
}
