// Package numberplan knows the world's telephone numbers, by the metadata of
// Google's libphonenumber.
package numberplan

import (
	"strconv"

	"github.com/nyaruka/phonenumbers"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const gabon = 241

// Mobile returns the E.164 form of number as dialled in region (ISO 3166 alpha-2,
// upper case); false where that is no number that can be a mobile. Some
// countries, the United States among them, give both kinds from one range. Gabon's
// numbers of before 2019 are valid with their leading zero and without it, and get it:
// one person has one number.
func Mobile(number, region string) (e164 string, ok bool) {
	parsed, err := phonenumbers.Parse(number, region)
	if err != nil || !isMobile(parsed) {
		return "", false
	}
	if parsed.GetCountryCode() == gabon {
		withZero := &phonenumbers.PhoneNumber{
			CountryCode: parsed.CountryCode, NationalNumber: parsed.NationalNumber,
			ItalianLeadingZero: new(true),
		}
		if isMobile(withZero) {
			parsed = withZero
		}
	}
	return phonenumbers.Format(parsed, phonenumbers.E164), true
}

func isMobile(n *phonenumbers.PhoneNumber) bool {
	if !phonenumbers.IsValidNumber(n) {
		return false
	}
	kind := phonenumbers.GetNumberType(n)
	return kind == phonenumbers.MOBILE || kind == phonenumbers.FIXED_LINE_OR_MOBILE
}

// KnownRegion reports whether region is one that numbers can be dialled in.
func KnownRegion(region string) bool { return phonenumbers.GetSupportedRegions()[region] }

// Countries are all that Country returns.
func Countries() map[string]bool {
	all := map[string]bool{}
	for code := range phonenumbers.GetSupportedCallingCodes() {
		all[phonenumbers.GetRegionCodeForCountryCode(code)] = true
	}
	return all
}

// Country returns the ISO 3166 code of the main country of a number's country code:
// US for all of +1, and 001 for the codes of no country.
func Country(n verify.Number) string {
	if n.Mainland() {
		return "CN"
	}
	const longest = 3
	for digits := 1; digits <= longest && digits < len(n); digits++ {
		if code, err := strconv.Atoi(string(n[1 : 1+digits])); err == nil {
			if region := phonenumbers.GetRegionCodeForCountryCode(code); region != phonenumbers.UNKNOWN_REGION {
				return region
			}
		}
	}
	return phonenumbers.UNKNOWN_REGION
}
