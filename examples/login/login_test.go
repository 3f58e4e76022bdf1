package main

import (
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// someNumber returns a random number for one test, so that tests can run in parallel.
func someNumber() string { return "186" + strconv.Itoa(10_000_000+rand.IntN(90_000_000)) }

func TestLogin_AcceptsTheSentCode(t *testing.T) {
	app, number := startApp(t, address), someNumber()
	post(t, app+"/code", url.Values{"number": {number}}, 200)

	res, err := http.Get(sms + "/inbox.json?phone_number=" + number + "&wait=5s")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var messages []struct{ Code, Signature string }
	if err := json.NewDecoder(res.Body).Decode(&messages); err != nil || len(messages) != 1 || messages[0].Signature != "Acme" {
		t.Fatalf("inbox: got %v, %v; want one message of Acme", messages, err)
	}

	post(t, app+"/login", url.Values{"number": {number}, "code": {"000000x"}}, 401)
	if body := post(t, app+"/login", url.Values{"number": {number}, "code": {messages[0].Code}}, 200); !strings.Contains(body,
		"Welcome, "+number) {
		t.Errorf("login: got %s; want a welcome", body)
	}
}

func TestLogin_ExplainsFailedSends(t *testing.T) {
	for kind, want := range map[string]struct {
		code int
		text string
	}{
		"limit_hour":     {429, "Try again in 1h0m0s."},
		"illegal_number": {400, "That is no mobile number."},
		"no_balance":     {503, "No code could be sent."},
	} {
		app, number := startApp(t, address), someNumber()
		q, _ := http.NewRequest("PUT", sms+"/failures.json", strings.NewReader(`{"phone_number":"`+number+`","kind":"`+kind+`","times":1}`))
		res, err := http.DefaultClient.Do(q)
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%s: got %v, %v; want 200", kind, res, err)
		}
		res.Body.Close()
		if body := post(t, app+"/code", url.Values{"number": {number}}, want.code); !strings.Contains(body, want.text) {
			t.Errorf("%s: got %s; want %q", kind, body, want.text)
		}
	}
}

func TestLogin_AcceptsOneFormOfANumber(t *testing.T) {
	app := startApp(t, address)
	for _, number := range []string{"", "10086", "+8618600000000", "186 0000 0000"} {
		post(t, app+"/code", url.Values{"number": {number}}, 400)
		post(t, app+"/login", url.Values{"number": {number}}, 400)
	}
}

func TestLogin_TellsErrorsApart(t *testing.T) {
	info := func(reason string) *errdetails.ErrorInfo { return &errdetails.ErrorInfo{Reason: reason} }
	invalid := func(field string) *errdetails.BadRequest {
		return &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field}}}
	}
	const mayArrive = "If no code arrives, send another."
	s := &scripted{}
	server := grpc.NewServer()
	phonenumberservice.RegisterPhoneNumberServiceServer(server, s)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	app := startApp(t, listener.Addr().String())
	for _, c := range []struct {
		code    codes.Code
		details []protoadapt.MessageV1
		want    int
		text    string
	}{
		{codes.DeadlineExceeded, []protoadapt.MessageV1{info("SMS_TIMEOUT")}, 200, mayArrive},
		{codes.Unknown, []protoadapt.MessageV1{info("SMS_OUTCOME_UNKNOWN")}, 200, mayArrive},
		{codes.Unavailable, nil, 200, mayArrive}, // a lost connection
		{codes.ResourceExhausted, []protoadapt.MessageV1{info("OVERLOADED")}, 503, "No code could be sent."},
		{codes.InvalidArgument, []protoadapt.MessageV1{info("INVALID_FIELD"), invalid("phone_number")}, 400, "That is no mobile number."},
		{codes.InvalidArgument, []protoadapt.MessageV1{info("INVALID_FIELD"), invalid("template_code")}, 503, "No code could be sent."},
		{codes.FailedPrecondition, []protoadapt.MessageV1{info("isv.CUSTOMER_REFUSED")}, 400, "does not accept our SMS"},
		{codes.Unavailable, []protoadapt.MessageV1{info("STORE_UNAVAILABLE")}, 503, "No code could be sent."},
	} {
		failure, err := status.New(c.code, "scripted").WithDetails(c.details...)
		if err != nil {
			t.Fatal(err)
		}
		s.failure = failure.Err()
		if body := post(t, app+"/code", url.Values{"number": {someNumber()}}, c.want); !strings.Contains(body, c.text) {
			t.Errorf("%v, %v: got %s; want %q", c.code, c.details, body, c.text)
		}
	}
	s.failure = status.Error(codes.Unknown, "scripted")
	if body := post(t, app+"/login", url.Values{"number": {someNumber()}}, 503); !strings.Contains(body, "The code could not be checked.") {
		t.Errorf("a check that fails: got %s; want a hint to try again", body)
	}
}

// scripted is a service whose calls fail as a test says.
type scripted struct {
	phonenumberservice.UnimplementedPhoneNumberServiceServer
	failure error
}

func (s *scripted) SendSMS(context.Context, *phonenumberservice.SendSMSRequest) (*phonenumberservice.Empty, error) {
	return nil, s.failure
}

func (s *scripted) Valid(context.Context, *phonenumberservice.ValidRequest) (*phonenumberservice.ValidResponse, error) {
	return nil, s.failure
}

// startApp starts the example with the service at an address, and returns the example's URL.
func startApp(t *testing.T, service string) string {
	t.Helper()
	handler, err := newLogin(service)
	if err != nil {
		t.Fatal(err)
	}
	app := httptest.NewServer(handler)
	t.Cleanup(app.Close)
	return app.URL
}

// post sends a form, checks the status code, and returns the body.
func post(t *testing.T, path string, form url.Values, want int) string {
	t.Helper()
	res, err := http.PostForm(path, form)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != want {
		t.Fatalf("%s: got %d %s, %v; want %d", path, res.StatusCode, body, err, want)
	}
	return string(body)
}
