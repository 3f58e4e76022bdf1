// Package numberplan parses and classifies phone numbers of all countries, by the metadata of
// Google's libphonenumber. It is a package so that only one imports this metadata.
package numberplan

import (
	"strconv"

	"github.com/nyaruka/phonenumbers"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

const gabon = 241

// Mobile returns the E.164 form of a number that is dialled in region (ISO 3166 alpha-2, upper case).
// It returns false if the number cannot be a mobile number. Some countries, such as the United
// States, use one range for mobile and fixed numbers. A number of Gabon from before 2019 is valid with
// and without its leading zero. Mobile adds the zero, so that one phone has one form.
func Mobile(number, region string) (e164 string, ok bool) {
	parsed, err := phonenumbers.Parse(number, region)
	if err != nil || !isMobile(parsed) {
		return "", false
	}
	if parsed.GetCountryCode() == gabon {
		withZero := &phonenumbers.PhoneNumber{
			CountryCode: parsed.CountryCode, NationalNumber: parsed.NationalNumber, ItalianLeadingZero: new(true),
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

// KnownRegion reports whether libphonenumber knows region (ISO 3166 alpha-2, upper case).
func KnownRegion(region string) bool { return phonenumbers.GetSupportedRegions()[region] }

// Countries returns all results of Country.
func Countries() map[string]bool {
	all := map[string]bool{}
	for code := range phonenumbers.GetSupportedCallingCodes() {
		all[phonenumbers.GetRegionCodeForCountryCode(code)] = true
	}
	return all
}

// Country returns the ISO 3166 code of the main country of a number's country code: US for all
// numbers of +1, and 001 for country codes that belong to no country.
func Country(n verify.Number) string {
	if n.Mainland() {
		return "CN" // fast path
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
