package examples

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// scripted is a service whose SendSMS returns the errors that a test sets, over gRPC and JSON. With the
// real service, a correct example never gets some of them, such as an invalid template code.
type scripted struct {
	addr string

	mu      sync.Mutex
	replies map[string][]error  // of the next calls, by phone number; nil is OK
	keys    map[string][]string // the idempotency keys of the calls since the last script, by phone number
}

func startScripted(t *testing.T) *scripted {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &scripted{addr: listener.Addr().String(), replies: map[string][]error{}, keys: map[string][]string{}}
	mux := http.NewServeMux()
	mux.Handle(pb.PhoneNumberService_SendSMS_FullMethodName, connect.NewUnaryHandler(pb.PhoneNumberService_SendSMS_FullMethodName, s.send))
	server := &http.Server{Handler: mux, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return s
}

func (s *scripted) send(_ context.Context, q *connect.Request[pb.SendSMSRequest]) (*connect.Response[pb.Empty], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	number := q.Msg.PhoneNumber
	s.keys[number] = append(s.keys[number], q.Header().Get("Idempotency-Key"))
	if replies := s.replies[number]; len(replies) > 0 {
		s.replies[number] = replies[1:]
		if replies[0] != nil {
			return nil, replies[0]
		}
	}
	return connect.NewResponse(&pb.Empty{}), nil
}

// script sets the replies to the next calls for number.
func (s *scripted) script(number string, replies ...error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replies[number], s.keys[number] = replies, nil
}

// calls returns the idempotency keys of the calls for number since the last script.
func (s *scripted) calls(number string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys[number]
}

// failure returns an error with an ErrorInfo and more details.
func failure(code connect.Code, info *errdetails.ErrorInfo, more ...proto.Message) error {
	e := connect.NewError(code, errors.New("a scripted error"))
	for _, m := range append([]proto.Message{info}, more...) {
		d, err := connect.NewErrorDetail(m)
		if err != nil {
			panic(err)
		}
		e.AddDetail(d)
	}
	return e
}

// Each reason has the text of docs/errors.md, and only a call that may be repeated is repeated, with the
// same idempotency key. The locale writes 0.5 as 0,5.
func TestExamples_ActOnTheDetailsOfErrors(t *testing.T) {
	reason := func(reason string) *errdetails.ErrorInfo {
		return &errdetails.ErrorInfo{Domain: "phone-number-service", Reason: reason}
	}
	wait := func(d time.Duration) *errdetails.RetryInfo {
		return &errdetails.RetryInfo{RetryDelay: durationpb.New(d)}
	}
	invalid := func(field string) error {
		bad := &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: "must be valid"}}}
		return failure(connect.CodeInvalidArgument, reason("INVALID_FIELD"), bad)
	}
	notAllowed := func(refused string) error {
		info := &errdetails.ErrorInfo{Reason: "CALLER_NOT_ALLOWED", Metadata: map[string]string{"refused": refused}}
		return failure(connect.CodePermissionDenied, info)
	}
	refusal := func(code string) error {
		info := &errdetails.ErrorInfo{Domain: "aliyun.com", Reason: code, Metadata: map[string]string{"request_id": "1"}}
		return failure(connect.CodeFailedPrecondition, info)
	}
	soonOver := failure(connect.CodeAborted, reason("SEND_IN_PROGRESS"), wait(time.Second/2)) // "0.500s" in JSON
	inProgress := failure(connect.CodeAborted, reason("SEND_IN_PROGRESS"), wait(time.Second))
	down := failure(connect.CodeUnavailable, reason("STORE_UNAVAILABLE"), wait(time.Second))
	cases := []struct {
		name    string
		replies []error // one for each call
		want    func(*session)
	}{
		{"a send in progress", []error{soonOver, nil}, (*session).sent},
		{"a send in progress for long", []error{inProgress, inProgress, inProgress}, (*session).late},
		{"eight sends", []error{failure(connect.CodeAborted, reason("SEND_IN_PROGRESS"), wait(30*time.Second))}, (*session).late},
		{"an invalid template code", []error{invalid("template_code")}, (*session).notSent},
		{"an invalid sign name", []error{invalid("signature")}, (*session).notSent},
		{"an invalid key", []error{invalid("idempotency-key")}, (*session).notSent},
		{"a reused key", []error{failure(connect.CodeInvalidArgument, reason("IDEMPOTENCY_KEY_REUSED"))}, (*session).notSent},
		{"an invalid number", []error{invalid("phone_number")}, (*session).noMobile},
		{"a blocked number", []error{refusal("isv.BLACK_KEY_CONTROL_LIMIT")}, (*session).refuses},
		{"a number that opted out", []error{refusal("isv.CUSTOMER_REFUSED")}, (*session).refuses},
		{"no balance", []error{refusal("isv.AMOUNT_NOT_ENOUGH")}, (*session).notSent},
		{"a country that is not allowed", []error{notAllowed("country")}, (*session).country},
		{"a template code that is not allowed", []error{notAllowed("template_code")}, (*session).notSent},
		{"a limit without a time to wait", []error{failure(connect.CodeResourceExhausted, reason("MESSAGE_TOO_LARGE"))}, (*session).notSent},
		{"the database is down", []error{down, down, nil}, (*session).sent},
		{"unavailable without an ErrorInfo", []error{connect.NewError(connect.CodeUnavailable, errors.New("a proxy's error"))}, (*session).late},
	}
	service := startScripted(t)
	each(t, func(t *testing.T, p program) {
		s := p.start(t, newNumber(), service.addr, "LC_ALL=de_DE.UTF-8")
		s.sent()
		for _, c := range cases {
			service.script(s.number, c.replies...)
			s.types("")
			c.want(s)
			keys := service.calls(s.number)
			if len(keys) != len(c.replies) || keys[0] == "" || len(slices.Compact(slices.Clone(keys))) != 1 {
				t.Errorf("%s: got calls with the keys %q; want %d with one key", c.name, keys, len(c.replies))
			}
		}

		first := newNumber()
		service.script(first, invalid("template_code"))
		s = p.start(t, first, service.addr)
		s.notSent()
		s.ends(false)
	})
}

// If PHONE_NUMBER_SERVICE_CA is set, the token never leaves the machine in plain text, even if the CA
// cannot be read. The examples without a setting for the CA use the system's, so they start a handshake.
func TestExamples_SendNoTokenInPlainText(t *testing.T) {
	const tlsHandshake = 22 // the type of the first TLS record
	each(t, func(t *testing.T, p program) {
		for name, ca := range map[string]string{"missing": filepath.Join(t.TempDir(), "ca.crt"), "empty": ""} {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { listener.Close() })
			received := make(chan byte, 1) // the first byte of the first connection
			go func() {
				if conn, err := listener.Accept(); err == nil {
					first := make([]byte, 1)
					conn.Read(first)
					received <- first[0]
					conn.Close()
				}
			}()
			s := p.start(t, newNumber(), listener.Addr().String(), "PHONE_NUMBER_SERVICE_CA="+ca, "PHONE_NUMBER_SERVICE_TOKEN=example-token")
			if p.name == "csharp/login.exe" || p.name == "node/fetch.js" {
				select {
				case got := <-received:
					if got != tlsHandshake {
						t.Errorf("CA %s: first byte: got %d; want %d, a TLS handshake", name, got, tlsHandshake)
					}
				case <-time.After(patience):
					t.Errorf("CA %s: got no connection; want one", name)
				}
				continue
			}
			s.ends(false)
			select {
			case got := <-received:
				t.Errorf("CA %s: got a connection with the first byte %d; want none", name, got)
			default:
			}
			if s.errors.String() == "" {
				t.Errorf("CA %s: got no error message; want one", name)
			}
		}
	})
}
