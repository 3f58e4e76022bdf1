// Package numberplan knows the world's telephone numbers, by the metadata of
// Google's libphonenumber.
package numberplan

import "github.com/nyaruka/phonenumbers"

// Mobile returns the E.164 form of number as dialled in region (ISO 3166 alpha-2,
// upper case); false where that is no number that can be a mobile. Some
// countries, the United States among them, give both kinds from one range.
func Mobile(number, region string) (e164 string, ok bool) {
	parsed, err := phonenumbers.Parse(number, region)
	if err != nil || !phonenumbers.IsValidNumber(parsed) {
		return "", false
	}
	switch phonenumbers.GetNumberType(parsed) {
	case phonenumbers.MOBILE, phonenumbers.FIXED_LINE_OR_MOBILE:
		return phonenumbers.Format(parsed, phonenumbers.E164), true
	default:
		return "", false
	}
}

// KnownRegion reports whether region is one that numbers can be dialled in.
func KnownRegion(region string) bool { return phonenumbers.GetSupportedRegions()[region] }
