package server_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestJSON_SendsAndVerifies(t *testing.T) {
	r, inbox := startDev(t)
	for _, body := range []string{
		`{"phone_number":"18600000000","signature":"Acme","template_code":"SMS_1"}`,
		`{"phoneNumber":"18600000000","signature":"Acme","templateCode":"SMS_1"}`,
	} {
		if code, got := r.Post(t, "SendSMS", body); code != 200 || got != "{}" {
			t.Fatalf("SendSMS: got %d %s; want 200 {}", code, got)
		}
		m := inbox.Messages("+8618600000000")[0]
		if m.Signature != "Acme" || m.TemplateCode != "SMS_1" {
			t.Errorf("message: got %+v; want the sign name Acme and the template SMS_1", m)
		}
		check := fmt.Sprintf(`{"phone_number":"+86 186-0000-0000","code":%q}`, m.Code)
		for _, want := range []string{`{"valid":true}`, `{"valid":false}`} {
			if code, got := r.Post(t, "Valid", check, "Content-Type", "application/json; charset=utf-8"); code != 200 || got != want {
				t.Fatalf("Valid: got %d %s; want 200 %s", code, got, want)
			}
		}
	}
}

func TestJSON_InvalidIsExplainedWithoutItsValues(t *testing.T) {
	r, inbox := startDev(t)
	for _, c := range []struct{ method, body, field, want string }{
		{"SendSMS", `{"phone":"18699998888"}`, "phone", "is not a field of this call"},
		{"Valid", `{"phone_number":"18699998888","code":"990044","x":1}`, "x", "the fields are phone_number, code"},
		{"Valid", `{"phone_number":"18699998888","990044":"code"}`, "body", "the fields are phone_number, code"},
		{"Valid", `{"phone_number":"18699998888","code":990044}`, "code", "must be a JSON string"},
		{"SendSMS", `{"phone_number":18699998888}`, "phone_number", "must be a JSON string"},
		{"SendSMS", `[]`, "body", "one JSON object"},
		{"SendSMS", ``, "body", "one JSON object"},
		{"SendSMS", `phone_number=18699998888`, "body", "one JSON object"},
		{"SendSMS", `{"phone_number":"18699998888","phone_number":"18699997777"}`, "body", "each field once"},
		{"SendSMS", "{\"phone_number\":\"18699998888\xff\"}", "body", "UTF-8"},
		{"SendSMS", `{"phone_number":""}`, "phone_number", "is required"},
		{"SendSMS", `{}`, "phone_number", "is required"},
	} {
		code, got := r.Post(t, c.method, c.body)
		var response struct {
			Code    string
			Details []struct {
				Debug struct {
					Reason          string
					FieldViolations []struct{ Field, Description string }
				}
			}
		}
		if err := json.Unmarshal([]byte(got), &response); err != nil || code != 400 || response.Code != "invalid_argument" ||
			len(response.Details) != 2 {
			t.Errorf("%s %s: got %d %s; want 400 invalid_argument with two details", c.method, c.body, code, got)
			continue
		}
		fields := response.Details[1].Debug.FieldViolations
		if response.Details[0].Debug.Reason != "INVALID_FIELD" || len(fields) != 1 || fields[0].Field != c.field || !strings.Contains(fields[0].Description, c.want) {
			t.Errorf("%s %s: got %s; want INVALID_FIELD for %s and %s", c.method, c.body, got, c.field, c.want)
		}
		for output, text := range map[string]string{"response": got, "log": r.Log.String()} {
			if strings.Contains(text, "18699998888") || strings.Contains(text, "990044") {
				t.Errorf("%s %s: the %s repeats a value: %s", c.method, c.body, output, text)
			}
		}
	}
	if calls := r.Log.Count("msg=call"); calls != 12 {
		t.Errorf("calls in the log: got %d; want 12", calls)
	}
	if m := inbox.Messages(""); len(m) != 0 {
		t.Errorf("messages: got %d; want 0", len(m))
	}
}

func TestHTTP_ServesGRPCWebAndConnectClients(t *testing.T) {
	r, inbox := startDev(t)
	for name, option := range map[string]connect.ClientOption{
		"grpc-web": connect.WithGRPCWeb(), "connect": connect.WithProtoJSON(),
		"connect binary": connect.WithAcceptCompression("gzip", nil, nil),
	} {
		t.Run(name, func(t *testing.T) {
			url := "http://" + r.Addr
			send := connect.NewClient[pb.SendSMSRequest, pb.Empty](http.DefaultClient, url+pb.PhoneNumberService_SendSMS_FullMethodName, option)
			valid := connect.NewClient[pb.ValidRequest, pb.ValidResponse](http.DefaultClient, url+pb.PhoneNumberService_Valid_FullMethodName, option)
			number := servertest.FreshNumber()
			if _, err := send.CallUnary(t.Context(), connect.NewRequest(&pb.SendSMSRequest{PhoneNumber: number})); err != nil {
				t.Fatal(err)
			}
			res, err := valid.CallUnary(t.Context(), connect.NewRequest(&pb.ValidRequest{PhoneNumber: number, Code: inbox.Messages("")[0].Code}))
			if err != nil || !res.Msg.Valid {
				t.Fatalf("Valid: got %v, %v; want true", res, err)
			}
			_, err = valid.CallUnary(t.Context(), connect.NewRequest(&pb.ValidRequest{PhoneNumber: "10086"}))
			var e *connect.Error
			if !errors.As(err, &e) || e.Code() != connect.CodeInvalidArgument || len(e.Details()) != 2 {
				t.Fatalf("Valid with a bad number: got %v; want invalid_argument with two details", err)
			}
			d, err := e.Details()[1].Value()
			if bad, ok := d.(*errdetails.BadRequest); err != nil || !ok || bad.FieldViolations[0].Field != "phone_number" {
				t.Errorf("detail: got %v, %v; want a BadRequest for phone_number", d, err)
			}
		})
	}
}
