package config

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/net/idna"
)

// browserOrigins parses the list of origins of a setting. Its error quotes no origin, because an origin
// can contain a password by mistake.
func browserOrigins(setting, list string) ([]string, error) {
	origins := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
	if len(origins) == 0 {
		return nil, fmt.Errorf("%s holds no origin; leave it unset for none", setting)
	}
	var errs []error
	for i, given := range origins {
		var ok bool
		if origins[i], ok = browserOrigin(given); !ok {
			errs = append(errs, fmt.Errorf("%s: origin %d cannot match a web page; it must be such as https://app.example.org, http://localhost:3000 or http://[::1]:3000: "+
				"http or https, a host name or an IP address in full, a port from 1 to 65535 if it is not the scheme's own; no user, path, %% or *", setting, i+1))
		}
	}
	return origins, errors.Join(errs...)
}

var (
	// hostNames maps names as browsers do: UTS 46, without transitional processing.
	hostNames = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.StrictDomainName(false), idna.CheckHyphens(false))
	hostName  = regexp.MustCompile(`^([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?$`)
	// numericEnd matches names that browsers parse as an IPv4 address.
	numericEnd = regexp.MustCompile(`(^|\.)([0-9]+|0x[0-9a-f]*)\.?$`)
)

// browserOrigin returns an origin in the form of the header Origin, and false if no page can
// have this origin. In another form, it would never match.
func browserOrigin(given string) (string, bool) {
	scheme, authority, _ := strings.Cut(given, "://")
	scheme = strings.ToLower(scheme)
	defaultPort, known := map[string]string{"http": "80", "https": "443"}[scheme]
	u, err := url.Parse("//" + authority)
	if !known || err != nil || strings.ContainsAny(authority, `/\?#@%*`) {
		return "", false
	}
	host, port := u.Hostname(), u.Port()
	if strings.HasPrefix(authority, "[") {
		addr, err := netip.ParseAddr(host)
		if err != nil || addr.Is4In6() { // netip and browsers write it differently
			return "", false
		}
		host = "[" + addr.String() + "]"
	} else {
		if host, err = hostNames.ToASCII(host); err != nil || !hostName.MatchString(host) {
			return "", false
		}
		if addr, err := netip.ParseAddr(host); numericEnd.MatchString(host) && (err != nil || addr.String() != host) {
			return "", false
		}
	}
	if port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return "", false
		}
		port = strconv.FormatUint(n, 10)
	}
	if port == "" || port == defaultPort {
		return scheme + "://" + host, true
	}
	return scheme + "://" + host + ":" + port, true
}
