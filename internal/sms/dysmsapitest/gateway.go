package dysmsapitest

import (
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

const maxClockSkew = 15 * time.Minute

var authorizationShape = regexp.MustCompile(`^ACS3-HMAC-SHA256 Credential=([^,]+),SignedHeaders=([a-z0-9;-]+),Signature=([0-9a-f]{64})$`)

// checkGateway checks a request as the gateway does before the product. It returns the query's
// parameters, or a rejection with a Code. It shares no code with the sender, so that an error there
// is found.
func (s *Server) checkGateway(r *http.Request, body []byte, action string) (url.Values, reply) {
	params, err := url.ParseQuery(r.URL.RawQuery)
	signed := headersToSign(r)
	hash := fmt.Sprintf("%x", sha256.Sum256(body))
	canonical := canonicalRequest(r.Method, params, signed, hash)
	parts := authorizationShape.FindStringSubmatch(r.Header.Get("Authorization"))
	date, _ := time.Parse("2006-01-02T15:04:05Z", signed["x-acs-date"])
	nonce := signed["x-acs-signature-nonce"]
	var issued Issued
	known := false
	if parts != nil {
		issued, known = s.issuer(parts[1])
	}
	switch {
	case r.Method != http.MethodPost || r.URL.Path != "/":
		return nil, reply{Status: 405, Code: "UnsupportedHTTPMethod", Message: "This http method is not supported."}
	case signed["x-acs-action"] != action:
		return nil, reply{Status: 404, Code: "InvalidAction.NotFound", Message: "Specified api is not found, please check your url and method."}
	case signed["x-acs-version"] != "2017-05-25":
		return nil, reply{Status: 400, Code: "InvalidVersion", Message: "Specified parameter Version is not valid."}
	case parts == nil || nonce == "" || parts[2] != strings.Join(slices.Sorted(maps.Keys(signed)), ";"):
		return nil, reply{Status: 400, Code: "IncompleteSignature", Message: "The request signature does not conform to Aliyun standards."}
	case !known:
		return nil, reply{Status: 404, Code: "InvalidAccessKeyId.NotFound", Message: "Specified access key is not found."}
	case signed["x-acs-security-token"] == "" && issued.SecurityToken != "":
		return nil, reply{Status: 400, Code: "MissingSecurityToken", Message: "SecurityToken is mandatory for this action."}
	case signed["x-acs-security-token"] != issued.SecurityToken:
		const message = "Specified SecurityToken mismatch with the AccessKey."
		return nil, reply{Status: 400, Code: "InvalidSecurityToken.MismatchWithAccessKey", Message: message}
	case !issued.Expires.IsZero() && !time.Now().Before(issued.Expires):
		return nil, reply{Status: 400, Code: "InvalidSecurityToken.Expired", Message: "Specified SecurityToken is expired."}
	case time.Now().Add(s.skew).Sub(date).Abs() > maxClockSkew:
		return nil, reply{Status: 400, Code: "InvalidTimeStamp.Expired", Message: "Specified time stamp or date value is expired."}
	case s.nonces[nonce]:
		return nil, reply{Status: 400, Code: "SignatureNonceUsed", Message: "Specified signature nonce was used already."}
	case err != nil || signed["x-acs-content-sha256"] != hash || !hmac.Equal([]byte(parts[3]), []byte(signature(issued.AccessKeySecret, canonical))):
		// Aliyun also quotes the whole request, with number and code.
		return nil, reply{Status: 400, Code: "SignatureDoesNotMatch", Message: "Specified signature is not matched with our calculation. server string to sign is:" + canonical}
	}
	s.nonces[nonce] = true
	return params, reply{}
}

// headersToSign returns the headers that a signature must cover, by lower-case name. The values
// of a repeated header are joined to one that no client signs.
func headersToSign(r *http.Request) map[string]string {
	signed := map[string]string{"host": r.Host}
	for name, values := range r.Header {
		if name = strings.ToLower(name); name == "content-type" || strings.HasPrefix(name, "x-acs-") {
			signed[name] = strings.Join(values, "\n")
		}
	}
	return signed
}

// canonicalRequest returns the text that is signed: the parameters sorted by name, with all
// bytes percent-encoded but RFC 3986's unreserved ones, then the headers.
func canonicalRequest(method string, params url.Values, signed map[string]string, hash string) string {
	encode := func(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
	var pairs []string
	for name, values := range params {
		for _, value := range values {
			pairs = append(pairs, encode(name)+"="+encode(value))
		}
	}
	slices.Sort(pairs)
	names := slices.Sorted(maps.Keys(signed))
	headers := ""
	for _, name := range names {
		headers += name + ":" + signed[name] + "\n"
	}
	return strings.Join([]string{method, "/", strings.Join(pairs, "&"), headers, strings.Join(names, ";"), hash}, "\n")
}

func signature(secret, canonical string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	fmt.Fprintf(mac, "ACS3-HMAC-SHA256\n%x", sha256.Sum256([]byte(canonical)))
	return fmt.Sprintf("%x", mac.Sum(nil))
}
