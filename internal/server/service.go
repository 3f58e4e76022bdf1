package server

import (
	"context"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/liulinhuai/phone-number-service/internal/numberplan"
	"github.com/liulinhuai/phone-number-service/internal/observe"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// service implements the two calls: it checks the fields, hands over to the
// domain and notes for the log what it learns. Its errors are the domain's;
// errors.go makes statuses of them.
type service struct {
	pb.UnimplementedPhoneNumberServiceServer
	verifier           *verify.Verifier
	numbers            verify.NumberParser
	metrics            *observe.Metrics
	allowEmptyTemplate bool // in development: sign name and template may be empty
}

// fieldErrors are all the faults of one request.
type fieldErrors []*verify.FieldError

func (e fieldErrors) Error() string {
	texts := make([]string, len(e))
	for i, f := range e {
		texts[i] = f.Error()
	}
	return strings.Join(texts, "; ")
}

var templateCode = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)

func (s *service) SendSMS(ctx context.Context, r *pb.SendSMSRequest) (*pb.Empty, error) {
	var faults fieldErrors
	number, err := s.number(ctx, r.GetPhoneNumber())
	if err != nil {
		faults = append(faults, err)
	}
	if n := r.GetSignature(); (n != "" || !s.allowEmptyTemplate) && !isSignName(n) {
		faults = append(faults, &verify.FieldError{Field: "signature", Want: "must be the Aliyun SMS sign name, 1 to 64 printable characters"})
	}
	if c := r.GetTemplateCode(); (c != "" || !s.allowEmptyTemplate) && !templateCode.MatchString(c) {
		faults = append(faults, &verify.FieldError{Field: "template_code", Want: `must be the Aliyun SMS template code, 1 to 64 letters, digits and underscores, for example "SMS_123456789"`})
	}
	if faults != nil {
		return nil, faults
	}
	caller := callInfoFrom(ctx).caller
	if err := caller.AuthorizeSend(r.GetSignature(), r.GetTemplateCode(), numberplan.Country(number)); err != nil {
		return nil, err
	}
	if err := caller.AllowSend(); err != nil {
		return nil, err
	}
	receipt, sendErr := s.verifier.Send(ctx, number, r.GetSignature(), r.GetTemplateCode())
	callInfoFrom(ctx).receipt = receipt
	if sendErr != nil {
		return nil, sendErr
	}
	return &pb.Empty{}, nil
}

func (s *service) Valid(ctx context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
	number, fault := s.number(ctx, r.GetPhoneNumber())
	if fault != nil {
		return nil, fieldErrors{fault}
	}
	found, err := s.verifier.Check(ctx, number, r.GetCode())
	if err != nil {
		return nil, err
	}
	s.metrics.ObserveCheck(ctx, number, found)
	callInfoFrom(ctx).outcome = found.Outcome.String()
	return &pb.ValidResponse{Valid: found.Valid()}, nil
}

func (s *service) number(ctx context.Context, raw string) (verify.Number, *verify.FieldError) {
	n, fault := s.numbers.Parse(raw)
	if fault == nil {
		callInfoFrom(ctx).number = n
	}
	return n, fault
}

func isSignName(s string) bool {
	n := utf8.RuneCountInString(s)
	return strings.TrimSpace(s) != "" && utf8.ValidString(s) && n <= 64 && !strings.ContainsFunc(s, neverPrinted)
}

// neverPrinted reports whether r is of no printable kind in any version of Unicode: a
// control, a format or private-use character, a space but ' ', or a code point that
// never becomes a character. A code point that is only unassigned in this program's
// tables may be a hanzi of a later version, which can be in a name.
func neverPrinted(r rune) bool {
	return !unicode.IsPrint(r) && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Z,
		unicode.Noncharacter_Code_Point, unicode.Other_Default_Ignorable_Code_Point)
}
