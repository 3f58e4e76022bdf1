package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
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
		{"SendSMS", `{"phone":"18699998888"}`, "phone", "is no field of this call"},
		{"Valid", `{"phone_number":"18699998888","code":"990044","x":1}`, "x", "there are phone_number, code"},
		{"Valid", `{"phone_number":"18699998888","990044":"code"}`, "body", "there are phone_number, code"},
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
	if calls := strings.Count(r.Log.String(), "msg=call"); calls != 12 {
		t.Errorf("calls in the log: got %d; want 12", calls)
	}
	if m := inbox.Messages(""); len(m) != 0 {
		t.Errorf("messages: got %d; want 0", len(m))
	}
}

func TestWebPage_ForeignPageCannotSend(t *testing.T) {
	r, inbox := startDev(t)
	const body = `{"phone_number":"18600000000"}`
	for _, headers := range [][]string{
		{"Origin", "http://evil.example"},
		{"Origin", "null"},
		{"Sec-Fetch-Site", "cross-site"},
		{"Sec-Fetch-Site", "same-site"},
		{"Content-Type", "text/plain", "Origin", "http://evil.example"},
		{"Content-Type", "text/plain;charset=UTF-8", "Origin", "http://evil.example"},
		{"Content-Type", "text/xml"},
		{"Content-Type", "multipart/form-data; boundary=x"},
	} {
		if code, got := r.Post(t, "SendSMS", body, headers...); code != http.StatusUnsupportedMediaType {
			t.Errorf("%v: got %d %s; want 415", headers, code, got)
		}
	}
	if m := inbox.Messages(""); len(m) != 0 {
		t.Fatalf("messages: got %d; want 0", len(m))
	}
	for _, headers := range [][]string{
		{"Origin", "http://" + r.Addr, "Sec-Fetch-Site", "same-origin"},
		{"Sec-Fetch-Site", "none"},
		{"Content-Type", ""},
		{"Content-Type", "text/plain"},
		{"Content-Type", "text/plain;charset=UTF-8"},
	} {
		if code, got := r.Post(t, "SendSMS", body, headers...); code != 200 {
			t.Errorf("%v: got %d %s; want 200", headers, code, got)
		}
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

func TestConnections_SilentAreClosed(t *testing.T) {
	r, _ := startDev(t)
	for _, first := range []string{"", "P", "PRI * HTTP/2.0\r\n", "POST / HTTP/1.1\r\nHost:"} {
		t.Run(fmt.Sprintf("after %q", first), func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", r.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, first)
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection: got open; want closed")
			}
		})
	}
}

func TestHealth_FollowsTheDatabaseLivenessDoesNot(t *testing.T) {
	var down atomic.Bool
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), &dev.Inbox{}, func(c *server.Config) {
		ready := c.Ready
		c.Ready = func(ctx context.Context) error {
			if down.Load() {
				return errors.New("down")
			}
			return ready(ctx)
		}
	})
	health := func(service string) string {
		res, err := healthpb.NewHealthClient(r.Conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil {
			return err.Error()
		}
		return res.Status.String()
	}
	const name = "phonenumberservice.PhoneNumberService"
	for _, want := range []string{"SERVING", "NOT_SERVING", "SERVING"} {
		down.Store(want == "NOT_SERVING")
		testutil.Eventually(t, "health is "+want, func() bool { return health("") == want && health(name) == want })
		if got := health("liveness"); got != "SERVING" {
			t.Errorf("liveness: got %s; want SERVING", got)
		}
	}
}

func TestReflection_DescribesTheService(t *testing.T) {
	r, _ := startDev(t)
	stream, err := reflectionpb.NewServerReflectionClient(r.Conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	list := &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}
	if err := stream.Send(list); err != nil {
		t.Fatal(err)
	}
	res, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if got := res.GetListServicesResponse().String(); !strings.Contains(got, "phonenumberservice.PhoneNumberService") {
		t.Errorf("services: got %s; want phonenumberservice.PhoneNumberService in it", got)
	}
}

func TestPanic_IsInternalAndTheProcessLives(t *testing.T) {
	var code string
	panics := true
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), senderFunc(func(m verify.Message) (verify.Receipt, error) {
		if panics {
			code = m.Code
			panic("sending " + m.Code)
		}
		return verify.Receipt{}, nil
	}))
	number := servertest.FreshNumber()
	_, err := r.SendSMS(t.Context(), servertest.SendRequest(number))
	if got := reasonOf(t, err); got != "Internal INTERNAL" {
		t.Errorf("over gRPC: got %s; want Internal INTERNAL", got)
	}
	if httpCode, body := r.Post(t, "SendSMS", `{"phone_number":"`+number+`","signature":"a","template_code":"b"}`); httpCode != 500 ||
		strings.Contains(body, code) {
		t.Errorf("over HTTP: got %d %s; want 500 without the code", httpCode, body)
	}
	if log := r.Log.String(); !strings.Contains(log, "panic in a call") || strings.Contains(log, code) {
		t.Errorf("the log: want the panic without its value:\n%s", log)
	}
	panics = false
	r.MustSend(t, number)
}

func TestLog_EveryCallHasOneLineWithAMaskedNumber(t *testing.T) {
	fake := dysmsapitest.New(t)
	fake.Limits(true)
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), aliyun(t, fake))
	r.MustSend(t, "18699998888")
	code := fake.LastCode(t, "18699998888")
	r.IsValid(t, "18699998888", code)
	r.Post(t, "Valid", `{"phone_number":"+86 186 9999 8888","code":"`+code+`"}`)
	r.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "10086"})
	r.SendSMS(t.Context(), servertest.SendRequest("18699998888")) // within the minute
	var calls []string
	for line := range strings.Lines(r.Log.String()) {
		if strings.Contains(line, "msg=call") {
			calls = append(calls, line)
		}
	}
	wants := [][]string{
		{
			"level=INFO", "method=SendSMS", "status=OK", "duration_ms=", "peer=127.0.0.1", "number=+86186****8888", "country=CN", "result=accepted",
			"aliyun_code=OK", "biz_id=" + fake.Accepted()[0].BizID, "request_id=" + fake.RequestIDs()[0],
		},
		{"method=Valid", "status=OK", "peer=127.0.0.1", "number=+86186****8888", "outcome=match"},
		{"method=Valid", "status=OK", "peer=127.0.0.1", "number=+86186****8888", "outcome=no_code"},
		{"method=Valid", "status=InvalidArgument", "peer=127.0.0.1", "error=\"phone_number must be one mobile number"},
		{
			"method=SendSMS", "status=ResourceExhausted", "number=+86186****8888", "result=limited", "aliyun_code=isv.BUSINESS_LIMIT_CONTROL",
			"request_id=" + fake.RequestIDs()[1], "error=\"sms: rejected by Aliyun",
		},
	}
	if len(calls) != len(wants) {
		t.Fatalf("log lines of calls: got %d; want %d:\n%s", len(calls), len(wants), strings.Join(calls, ""))
	}
	for i, want := range wants {
		for _, w := range want {
			if !strings.Contains(calls[i], w) {
				t.Errorf("line %d: got %s; want %s", i+1, calls[i], w)
			}
		}
	}
	for _, secret := range []string{code, "99998888"} {
		if strings.Contains(strings.Join(calls, ""), secret) {
			t.Errorf("the log contains %s", secret)
		}
	}
}

// The caller's deadline is none or very long, and the call's message never arrives.
func TestCallTimeout_EndsACallWithoutMessage(t *testing.T) {
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), &dev.Inbox{}, func(c *server.Config) { c.Limits.CallTimeout = 200 * time.Millisecond })
	for _, hours := range []time.Duration{0, 1000} {
		ctx, cancel := context.WithCancel(context.Background())
		if hours > 0 {
			ctx, cancel = context.WithTimeout(ctx, hours*time.Hour)
		}
		defer cancel()
		defer time.AfterFunc(40*time.Second, cancel).Stop()
		stream, err := r.Conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, pb.PhoneNumberService_Valid_FullMethodName)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Header(); err != nil { // sends the request headers
			t.Logf("headers: %v", err)
		}
		if err := stream.RecvMsg(&pb.ValidResponse{}); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("deadline in %d hours (0: none): got %v; want DeadlineExceeded", hours, err)
		}
	}
}

func TestLimits_AreAnnouncedAndEnforced(t *testing.T) {
	r, _ := startDev(t)
	c, err := net.Dial("tcp", r.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, http2.ClientPreface)
	framer := http2.NewFramer(c, c)
	framer.WriteSettings()
	frame, err := framer.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[http2.SettingID]uint32{http2.SettingMaxConcurrentStreams: 128, http2.SettingMaxHeaderListSize: 1 << 20} {
		if got, _ := frame.(*http2.SettingsFrame).Value(id); got != want {
			t.Errorf("%v: got %d; want %d", id, got, want)
		}
	}
	const body = `{"phone_number":"18600000000"}`
	if code, _ := r.Post(t, "SendSMS", body, "X-Long", strings.Repeat("a", 7<<10)); code != 200 {
		t.Errorf("a header of 7 KiB over HTTP/1.1: got %d; want 200", code)
	}
	q, _ := http.NewRequest("POST", "http://"+r.Addr+pb.PhoneNumberService_SendSMS_FullMethodName, strings.NewReader(body))
	q.Header.Set("X-Long", strings.Repeat("a", 13<<10))
	// The server may close the connection before it has read the whole request.
	if res, err := http.DefaultClient.Do(q); err == nil && res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 13 KiB over HTTP/1.1: got %d; want 431", res.StatusCode)
	}
}

// A call whose deadline passes during a slow Load is logged at INFO as the caller's doing.
func TestLog_CallerDeadlineIsNoDatabaseOutage(t *testing.T) {
	db := servertest.OpenStore(t, "sqlite::memory:")
	r := servertest.Start(t, db, &dev.Inbox{}, func(c *server.Config) { c.Verifier.Store = slowStore{db} })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	r.SendSMS(ctx, servertest.SendRequest("18600000000"))
	testutil.Eventually(t, "the log reports that the caller went away", func() bool {
		log := r.Log.String()
		return strings.Contains(log, "level=INFO msg=call method=SendSMS") && strings.Contains(log, "the caller went away")
	})
}

// A slowStore takes 100 ms for a Load.
type slowStore struct{ verify.Store }

func (s slowStore) Load(ctx context.Context, n verify.Number) (verify.Record, error) {
	time.Sleep(time.Second)
	return s.Store.Load(ctx, n)
}

// A drain ends when the outcome of the last send is stored, even if the call ended long before.
func TestDrain_WaitsForOutcomesBeingStored(t *testing.T) {
	db := servertest.OpenStore(t, "sqlite::memory:")
	held := &heldStore{Store: db, release: make(chan struct{})}
	r := servertest.Start(t, db, senderFunc(func(verify.Message) (verify.Receipt, error) {
		held.holding.Store(true)
		return verify.Receipt{}, nil
	}), func(c *server.Config) { c.Verifier.Store = held })
	number := servertest.FreshNumber()
	_, err := r.SendSMS(t.Context(), servertest.SendRequest(number))
	if got := reasonOf(t, err); got != "Unknown SENT_NOT_CONFIRMED" {
		t.Fatalf("got %s; want Unknown SENT_NOT_CONFIRMED", got)
	}
	r.Stop()
	testutil.Eventually(t, "draining", func() bool { return strings.Contains(r.Log.String(), "draining") })
	select {
	case <-r.Done:
		t.Fatal("Serve returned before the outcome was stored; want it to wait")
	case <-time.After(200 * time.Millisecond): // Serve must not return in this time
	}
	close(held.release)
	<-r.Done
	if held.swaps.Load() != 2 {
		t.Errorf("swaps: got %d; want 2, begin and confirm", held.swaps.Load())
	}
}

// A heldStore holds each Swap until release is closed, once holding is true.
type heldStore struct {
	verify.Store
	holding atomic.Bool
	release chan struct{}
	swaps   atomic.Int64
}

func (s *heldStore) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	if s.holding.Load() {
		<-s.release
	}
	s.swaps.Add(1)
	return s.Store.Swap(ctx, n, old, next)
}

// A drain reports NOT_SERVING, accepts connections for the drain delay, and lets calls in flight
// finish.
func TestDrain_IsNotServingAndFinishesCallsInFlight(t *testing.T) {
	atAliyun, release := make(chan string, 1), make(chan struct{})
	r := servertest.Start(t, servertest.OpenStore(t, "sqlite::memory:"), senderFunc(func(m verify.Message) (verify.Receipt, error) {
		atAliyun <- m.Code
		<-release
		return verify.Receipt{}, nil
	}), func(c *server.Config) { c.DrainDelay = 2 * time.Second })
	testutil.Eventually(t, "serving", func() bool { return strings.Contains(r.Log.String(), "msg=serving") })

	grpcCall, httpCall := make(chan error, 1), make(chan int, 1)
	go func() {
		_, err := r.SendSMS(t.Context(), servertest.SendRequest(servertest.FreshNumber()))
		grpcCall <- err
	}()
	<-atAliyun
	go func() {
		code, _ := r.Post(t, "SendSMS", `{"phone_number":"`+servertest.FreshNumber()+`","signature":"a","template_code":"b"}`)
		httpCall <- code
	}()
	<-atAliyun
	r.Stop()
	testutil.Eventually(t, "NOT_SERVING", func() bool {
		res, err := healthpb.NewHealthClient(r.Conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return err == nil && res.Status == healthpb.HealthCheckResponse_NOT_SERVING
	})
	watch, err := healthpb.NewHealthClient(r.Conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if res, err := watch.Recv(); err != nil || res.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health watch: got %v, %v; want NOT_SERVING", res, err)
	}
	conn, err := net.Dial("tcp", r.Addr)
	if err != nil {
		t.Fatalf("a new connection during the drain delay: got %v; want it accepted", err)
	}
	conn.Close()
	testutil.Eventually(t, "new connections are no longer accepted", func() bool {
		c, err := net.Dial("tcp", r.Addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case <-r.Done:
		t.Fatal("Serve returned during calls in flight; want it to wait")
	default:
	}
	if res, err := watch.Recv(); err == nil { // an open watch would delay the drain
		t.Errorf("health watch after the drain delay: got %v; want its end", res)
	}
	close(release)
	if err := <-grpcCall; err != nil {
		t.Errorf("the gRPC call in flight: got %v; want OK", err)
	}
	if code := <-httpCall; code != 200 {
		t.Errorf("the HTTP call in flight: got %d; want 200", code)
	}
	<-r.Done
}
