package server

import (
	"context"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

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
	verifier           *verify.Verifier
	numbers            verify.NumberParser
	metrics            *telemetry.Metrics
	allowEmptyTemplate bool // only in dev: the template code and the sign name may be empty
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

// templateCode matches the codes of both products. A code of digits alone can only be of PNVS, where it
// has six.
var templateCode = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)

func isTemplateCode(s string) bool {
	return templateCode.MatchString(s) && (sms.ProductOf(s) == sms.PNVS || strings.Trim(s, "0123456789") != "")
}

func (s *service) SendSMS(ctx context.Context, r *pb.SendSMSRequest) (*pb.Empty, error) {
	var invalid fieldErrors
	number, err := s.number(ctx, r.GetPhoneNumber())
	if err != nil {
		invalid = append(invalid, err)
	}
	if n := r.GetSignature(); (n != "" || !s.allowEmptyTemplate) && !isSignName(n) {
		invalid = append(invalid, &verify.FieldError{Field: "signature", Want: "must be the Aliyun SMS sign name, 1 to 64 printable characters"})
	}
	template := r.GetTemplateCode()
	if (template != "" || !s.allowEmptyTemplate) && !isTemplateCode(template) {
		invalid = append(invalid, &verify.FieldError{Field: "template_code", Want: `must be the code of an Aliyun template: of SMS, 1 to 64 letters, digits and underscores, for example "SMS_123456789"; or of PNVS, six digits, for example "100001"`})
	}
	if invalid != nil {
		return nil, invalid
	}
	if err := sms.CheckSend(number, template, s.verifier.Rules.CodeTTL); err != nil {
		return nil, err
	}
	c := callFrom(ctx)
	c.product = sms.ProductOf(template)
	if err := c.caller.AuthorizeSend(r.GetSignature(), template, numberplan.Country(number)); err != nil {
		return nil, err
	}
	if err := c.caller.AllowSend(); err != nil {
		return nil, err
	}
	receipt, sendErr := s.verifier.Send(ctx, number, r.GetSignature(), template)
	c.receipt = receipt
	if sendErr != nil {
		return nil, sendErr
	}
	return &pb.Empty{}, nil
}

func (s *service) Valid(ctx context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
	number, invalid := s.number(ctx, r.GetPhoneNumber())
	if invalid != nil {
		return nil, invalid
	}
	checked, err := s.verifier.Check(ctx, number, r.GetCode())
	if err != nil {
		return nil, err
	}
	s.metrics.ObserveCheck(ctx, number, checked)
	callFrom(ctx).outcome = checked.Result.String()
	return &pb.ValidResponse{Valid: checked.Valid()}, nil
}

// number parses a phone number, and sets it as the number of the call for the log line.
func (s *service) number(ctx context.Context, raw string) (verify.Number, *verify.FieldError) {
	n, invalid := s.numbers.Parse(raw)
	if invalid == nil {
		callFrom(ctx).number = n
	}
	return n, invalid
}

// isSignName reports whether s has the form of an Aliyun SMS sign name: 1 to 64 printable characters,
// not only spaces. It does not check whether Aliyun has approved it.
func isSignName(s string) bool {
	n := utf8.RuneCountInString(s)
	return strings.TrimSpace(s) != "" && utf8.ValidString(s) && n <= 64 && !strings.ContainsFunc(s, neverPrinted)
}

// neverPrinted reports whether r is not printable in any version of Unicode: a control,
// format or private-use character, a separator other than ' ', a noncharacter, or a code point that is
// reserved to be invisible. It returns false if r is only unassigned in the Unicode version of this
// program. A later version can assign r to a Chinese character, which a sign name can contain.
func neverPrinted(r rune) bool {
	return !unicode.IsPrint(r) && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Z,
		unicode.Noncharacter_Code_Point, unicode.Other_Default_Ignorable_Code_Point)
}
