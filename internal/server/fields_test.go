package server_test

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestFields_InvalidAreNamedAndNothingIsSent(t *testing.T) {
	fake := dysmsapitest.New(t)
	var swaps atomic.Int64
	db := servertest.OpenStore(t, "sqlite::memory:")
	r := servertest.Start(t, db, aliyun(t, fake), func(c *server.Config) { c.Verifier.Store = swapCounter{db, &swaps} })
	good := func(change func(*pb.SendSMSRequest)) *pb.SendSMSRequest {
		q := servertest.SendRequest("18600000000")
		change(q)
		return q
	}
	numbers := []string{
		"", " ", "\t", "\x00", "18600000000\x00", "'; DROP TABLE phone_numbers; --", "18600000000' OR '1'='1", "1860000000", "186000000000",
		strings.Repeat("1", 2048), "18600000000,18600000001", "18600000000\n", "１８６００００００００", "📱", "1860000000a", "01012345678",
		"+861012345678", "10086", "95555", "+", "++8618600000000", "tel:18600000000", "+8612345678901", "12600000000",
	}
	type bad struct {
		request *pb.SendSMSRequest
		fields  []string
	}
	var table []bad
	for _, n := range numbers {
		table = append(table, bad{good(func(q *pb.SendSMSRequest) { q.PhoneNumber = n }), []string{"phone_number"}})
	}
	for _, s := range []string{
		"", strings.Repeat("签", 65), " ", "a\nb", "a\x00b", "a\u200bb", "a\u202eb",
		"签\u00a0名", "签\u3000名", "签\u2028名", "签\u2029名", "签\x7f", "签\u0085", "签\ufeff", "签\ue000", "签\U000f0000", "签\U0010fffd",
		"签\ufdd0", "签\ufdef", "签\uffff", "签\U0002fffe", "签\U0010ffff", "签\U000e0041", "签\U000e0fff", "签\ufff0",
	} {
		table = append(table, bad{good(func(q *pb.SendSMSRequest) { q.Signature = s }), []string{"signature"}})
	}
	for _, c := range []string{"", strings.Repeat("a", 65), "SMS-1", "SMS 1", "短信", "SMS_1\n"} {
		table = append(table, bad{good(func(q *pb.SendSMSRequest) { q.TemplateCode = c }), []string{"template_code"}})
	}
	table = append(table, bad{&pb.SendSMSRequest{}, []string{"phone_number", "signature", "template_code"}})
	check := func(call string, err error, fields []string) {
		t.Helper()
		s := status.Convert(err)
		info, _, badRequest := servertest.Details(t, s)
		var got []string
		for _, v := range badRequest.GetFieldViolations() {
			got = append(got, v.Field)
			if v.Description == "" {
				t.Errorf("%s: the field %s has no description", call, v.Field)
			}
		}
		if s.Code() != codes.InvalidArgument || !slices.Equal(got, fields) || info.GetReason() != "INVALID_FIELD" {
			t.Errorf("%s: got %v for the fields %v; want InvalidArgument for %v", call, err, got, fields)
		}
	}
	for _, b := range table {
		_, err := r.SendSMS(t.Context(), b.request)
		check(fmt.Sprintf("SendSMS %.60q", b.request), err, b.fields)
	}
	for _, n := range numbers {
		_, err := r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: n, Code: "123456"})
		check(fmt.Sprintf("Valid %.60q", n), err, []string{"phone_number"})
	}
	if swaps.Load() != 0 || fake.Requests() != 0 {
		t.Errorf("got %d swaps and %d requests to Aliyun; want 0 and 0", swaps.Load(), fake.Requests())
	}
	for _, s := range []string{
		strings.Repeat("签", 64), "Acme Inc.", "a",
		"\U0002ebf0电商", "\U0002ee5d", "\U00031350", "\U000323af", // hanzi of extensions I and H
		"\U000323b0", "\U0002fa1e", "\U00033479", "\U0001fae9", // newer than some Unicode tables
		"葛\U000e0100城", "é\u0301", "\u3164",
	} {
		request := good(func(q *pb.SendSMSRequest) { q.Signature = s; q.PhoneNumber = servertest.FreshNumber() })
		if _, err := r.SendSMS(t.Context(), request); err != nil {
			t.Errorf("sign name %q: got %v; want OK", s, err)
		}
	}
}

func TestValid_MalformedCodeCountsAsAnAttempt(t *testing.T) {
	r, inbox := startDev(t)
	for _, malformed := range []string{"", "12345", "1234567", "abcdef", "１２３４５６", strings.Repeat("1", 2048), "' OR 1=1", "12345\x00"} {
		number := servertest.FreshNumber()
		r.MustSend(t, number)
		code := inbox.Messages("")[0].Code
		for range 3 {
			if r.IsValid(t, number, malformed) {
				t.Fatalf("%.20q: got valid; want invalid", malformed)
			}
		}
		if r.IsValid(t, number, code) {
			t.Errorf("the right code after three times %.20q: got valid; want invalid", malformed)
		}
	}
}

// A rawCodec sends bytes unchanged and ignores responses.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (rawCodec) Unmarshal(mem.BufferSlice, any) error { return nil }

var _ encoding.CodecV2 = rawCodec{}

func TestMessage_TooLongOrNotUTF8IsRejected(t *testing.T) {
	r, inbox := startDev(t)
	_, err := r.SendSMS(t.Context(), &pb.SendSMSRequest{PhoneNumber: "18600000000", Signature: strings.Repeat("a", 4096)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message over 4 KiB: got %v; want ResourceExhausted", err)
	}
	err = r.Conn.Invoke(t.Context(), pb.PhoneNumberService_SendSMS_FullMethodName, []byte("\x0a\x02\xff\xfe"), nil,
		grpc.ForceCodecV2(rawCodec{}))
	if status.Code(err) != codes.Internal {
		t.Errorf("invalid UTF-8: got %v; want Internal", err)
	}
	if code, body := r.Post(t, "SendSMS", `{"phone_number":"`+strings.Repeat("1", 4096)+`"}`); code != 429 || !strings.Contains(body, "resource_exhausted") {
		t.Errorf("JSON over 4 KiB: got %d %s; want 429 resource_exhausted", code, body)
	}
	if m := inbox.Messages(""); len(m) != 0 {
		t.Errorf("messages: got %d; want 0", len(m))
	}
}
