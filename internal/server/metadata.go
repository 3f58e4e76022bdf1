package server

import (
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Names of the optional metadata of the two calls: gRPC metadata, or HTTP headers. docs/calling.md
// describes it.
const (
	idempotencyKey      = "idempotency-key"
	verificationContext = "verification-context"
	wantDetails         = "want-details"
)

// Names of the metadata of responses.
const (
	idempotencyReplayed = "idempotency-replayed"
	codeExpiresIn       = "code-expires-in"
	resendAfter         = "resend-after"
	attemptsLeft        = "attempts-left"
	verificationOutcome = "verification-outcome"
)

var (
	requestMetadata  = []string{idempotencyKey, verificationContext, wantDetails}
	responseMetadata = []string{idempotencyReplayed, codeExpiresIn, resendAfter, attemptsLeft, verificationOutcome}
)

const maxContextBytes = 128

// keyForms matches 8 to 128 visible ASCII characters, either unquoted or as a String of RFC 9651 (the
// form of draft-ietf-httpapi-idempotency-key-header).
var keyForms = regexp.MustCompile(`^(?:([!#-~][!-~]{7,127})|"((?:[!#-\[\]-~]|\\["\\]){8,128})")$`)

var unescapeKey = strings.NewReplacer(`\"`, `"`, `\\`, `\`)

// idempotencyKey returns the idempotency key of a call, "" if there is none.
func (c *call) idempotencyKey() (string, *verify.FieldError) {
	value, invalid := c.single(idempotencyKey)
	if value == nil || invalid != nil {
		return "", invalid
	}
	m := keyForms.FindStringSubmatch(*value)
	if m == nil {
		return "", &verify.FieldError{Field: idempotencyKey, Want: "must be 8 to 128 visible ASCII characters, with or without double quotes"}
	}
	return m[1] + unescapeKey.Replace(m[2]), nil
}

// verificationContext returns the verification context of a call, "" if there is none.
func (c *call) verificationContext() (string, *verify.FieldError) {
	value, invalid := c.single(verificationContext)
	if value == nil || invalid != nil {
		return "", invalid
	}
	if *value == "" || len(*value) > maxContextBytes {
		return "", &verify.FieldError{Field: verificationContext, Want: "must be 1 to 128 bytes, or left out"}
	}
	c.hasContext = true
	return *value, nil
}

// single returns the value of metadata that a call has at most once, nil if the call does not have it.
func (c *call) single(name string) (*string, *verify.FieldError) {
	switch values := c.headers[name]; len(values) {
	case 0:
		return nil, nil
	case 1:
		return &values[0], nil
	}
	return nil, &verify.FieldError{Field: name, Want: "must be given once"}
}

// wantsDetails reports whether the response has details. Unless the command is dev, only known callers
// get details, because they show whether a code was sent to a number recently.
func (s *service) wantsDetails(c *call) bool {
	values := c.headers[wantDetails]
	return len(values) == 1 && values[0] == "true" && (c.caller != nil || s.detailsForAll)
}

// respond sets metadata of the response.
func (c *call) respond(name, value string) {
	if c.response == nil {
		c.response = map[string][]string{}
	}
	c.response[name] = []string{value}
}

// respondSeconds sets metadata of the response to a time in whole seconds, rounded up, at least 0.
func (c *call) respondSeconds(name string, d time.Duration) {
	c.respond(name, strconv.FormatFloat(max(0, math.Ceil(d.Seconds())), 'f', 0, 64))
}
