package server

import (
	"context"
	"errors"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// service implements the two calls: it validates the fields, calls package verify, and adds attributes
// to the log line. It returns the errors of package verify, which errors.go converts to statuses. In
// the API, the field signature is Aliyun's SMS sign name.
type service struct {
	pb.UnimplementedPhoneNumberServiceServer
	verifier         *verify.Verifier
	numbers          verify.NumberParser
	metrics          *telemetry.Metrics
	optionalTemplate bool // only in dev: template code and sign name may be empty
	detailsForAll    bool // only in dev: callers need not be known
}

// fieldErrors lists all invalid fields of one request.
type fieldErrors []*verify.FieldError

func (e fieldErrors) Error() string {
	texts := make([]string, len(e))
	for i, f := range e {
		texts[i] = f.Error()
	}
	return strings.Join(texts, "; ")
}

// templateCode matches the template codes of both products. Only PNVS has template codes of digits alone,
// and these have six digits.
var templateCode = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)

func isTemplateCode(s string) bool {
	return templateCode.MatchString(s) && (sms.ProductOf(s) == sms.PNVS || strings.Trim(s, "0123456789") != "")
}

func (s *service) SendSMS(ctx context.Context, r *pb.SendSMSRequest) (*pb.Empty, error) {
	c := callFrom(ctx)
	var invalid fieldErrors
	number, err := s.numbers.Parse(r.GetPhoneNumber())
	c.number = number // "" if err is not nil
	if err != nil {
		invalid = append(invalid, err)
	}
	if n := r.GetSignature(); (n != "" || !s.optionalTemplate) && !isSignName(n) {
		invalid = append(invalid, &verify.FieldError{Field: "signature", Want: "must be the Aliyun SMS sign name, 1 to 64 printable characters"})
	}
	template := r.GetTemplateCode()
	if (template != "" || !s.optionalTemplate) && !isTemplateCode(template) {
		invalid = append(invalid, &verify.FieldError{Field: "template_code", Want: `must be the code of an Aliyun template: of SMS, 1 to 64 letters, digits and underscores, for example "SMS_123456789"; or of PNVS, six digits, for example "100001"`})
	}
	key, err := c.idempotencyKey()
	if err != nil {
		invalid = append(invalid, err)
	}
	verificationCtx, err := c.verificationContext()
	if err != nil {
		invalid = append(invalid, err)
	}
	if invalid != nil {
		return nil, invalid
	}
	if err := sms.CheckSend(number, template, s.verifier.Rules.CodeTTL); err != nil {
		return nil, err
	}
	c.product = sms.ProductOf(template)
	if err := c.caller.AuthorizeSend(r.GetSignature(), template, numberplan.Country(number)); err != nil {
		return nil, err
	}
	allow := c.caller.AllowSend
	if key == "" { // reject a call over the rate without a statement of the database
		if err := allow(); err != nil {
			return nil, err
		}
		allow = nil
	}
	sent, sendErr := s.verifier.Send(ctx, verify.SendRequest{
		Number: number, SignName: r.GetSignature(), TemplateCode: template, Context: verificationCtx, IdempotencyKey: key,
		Caller: auth.NameOf(c.caller), Allow: allow,
	})
	c.receipt = sent.Receipt
	if _, limited := errors.AsType[*auth.RateError](sendErr); key != "" && !limited {
		c.idempotency = idempotencyOf(sent, sendErr)
		s.metrics.ObserveIdempotency(ctx, c.idempotency)
	}
	if sent.Replayed {
		c.respond(idempotencyReplayed, "true")
	}
	if sendErr != nil {
		return nil, sendErr
	}
	if s.wantsDetails(c) {
		age := s.verifier.Now().Sub(sent.BegunAt)
		c.respondSeconds(codeExpiresIn, s.verifier.Rules.CodeTTL-age)
		if interval := sms.SendInterval(number); interval != 0 {
			if !sent.Replayed {
				age = 0 // Aliyun accepted the SMS just now
			}
			c.respondSeconds(resendAfter, interval-age)
		}
	}
	return &pb.Empty{}, nil
}

// idempotencyOf classifies a send with an idempotency key, for the metric and the log line.
func idempotencyOf(sent verify.SendResult, err error) string {
	switch {
	case sent.Replayed:
		return "replayed"
	case errors.Is(err, verify.ErrKeyInProgress):
		return "in_progress"
	case errors.Is(err, verify.ErrKeyReused):
		return "reused"
	}
	return "new"
}

func (s *service) Valid(ctx context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
	c := callFrom(ctx)
	var invalid fieldErrors
	number, fieldErr := s.numbers.Parse(r.GetPhoneNumber())
	c.number = number // "" if fieldErr is not nil
	if fieldErr != nil {
		invalid = append(invalid, fieldErr)
	}
	verificationCtx, fieldErr := c.verificationContext()
	if fieldErr != nil {
		invalid = append(invalid, fieldErr)
	}
	if invalid != nil {
		return nil, invalid
	}
	checked, err := s.verifier.Check(ctx, number, r.GetCode(), verificationCtx)
	if err != nil {
		return nil, err
	}
	s.metrics.ObserveCheck(ctx, number, checked)
	c.outcome = checked.Result.String()
	if s.wantsDetails(c) {
		outcome := checked.Result
		if outcome == verify.OtherContext { // a caller must not learn of other contexts
			outcome = verify.NoCode
		}
		c.respond(verificationOutcome, outcome.String())
		c.respond(attemptsLeft, strconv.Itoa(checked.AttemptsLeft))
	}
	return &pb.ValidResponse{Valid: checked.Valid()}, nil
}

// isSignName reports whether s has the form of an Aliyun SMS sign name: 1 to 64 printable characters,
// not only spaces. It does not check whether Aliyun has approved it.
func isSignName(s string) bool {
	n := utf8.RuneCountInString(s)
	return strings.TrimSpace(s) != "" && utf8.ValidString(s) && n <= 64 && !strings.ContainsFunc(s, neverPrinted)
}

// neverPrinted reports whether r is not printable in any version of Unicode. These are control, format
// and private-use characters, separators other than ' ', noncharacters, and code points that are reserved
// to be invisible. neverPrinted returns false if r is only unassigned in the Unicode version of this
// program. A later version can assign r to a Chinese character, which a sign name can contain.
func neverPrinted(r rune) bool {
	return !unicode.IsPrint(r) && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Z,
		unicode.Noncharacter_Code_Point, unicode.Other_Default_Ignorable_Code_Point)
}
