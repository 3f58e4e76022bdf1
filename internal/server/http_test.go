package server_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const validPath = "/phonenumberservice.PhoneNumberService/Valid"

// gzipped returns text compressed with gzip.
func gzipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write([]byte(text))
	w.Close()
	return b.String()
}

// enveloped returns a message in gRPC-Web's envelope.
func enveloped(flag byte, message string) string {
	head := binary.BigEndian.AppendUint32([]byte{flag}, uint32(len(message)))
	return string(head) + message
}

// validMessage returns a ValidRequest in protobuf.
func validMessage(t *testing.T) string {
	t.Helper()
	b, err := proto.Marshal(&pb.ValidRequest{PhoneNumber: "18600000000", Code: "1"})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const validJSON = `{"phone_number":"18600000000","code":"1"}`

// statusOf returns the status of an error response, in Connect's JSON or in gRPC-Web's headers.
func statusOf(t *testing.T, res *http.Response, body string) *status.Status {
	t.Helper()
	s := &spb.Status{}
	if bin := res.Header.Get("Grpc-Status-Details-Bin"); bin != "" {
		raw, err := base64.RawStdEncoding.DecodeString(bin)
		if err == nil {
			err = proto.Unmarshal(raw, s)
		}
		if err != nil {
			t.Fatalf("Grpc-Status-Details-Bin: %v", err)
		}
		return status.FromProto(s)
	}
	var e struct {
		Code, Message string
		Details       []struct{ Type, Value string }
	}
	if err := json.Unmarshal([]byte(body), &e); err != nil || res.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("got %d %s %q; want an error in JSON or gRPC-Web", res.StatusCode, res.Header.Get("Content-Type"), body)
	}
	for c := codes.OK; c <= codes.Unauthenticated; c++ {
		if strings.EqualFold(strings.ReplaceAll(e.Code, "_", ""), c.String()) {
			s.Code = int32(c)
		}
	}
	s.Message = e.Message
	for _, d := range e.Details {
		raw, err := base64.RawStdEncoding.DecodeString(d.Value)
		if err != nil {
			t.Fatal(err)
		}
		s.Details = append(s.Details, &anypb.Any{TypeUrl: "type.googleapis.com/" + d.Type, Value: raw})
	}
	return status.FromProto(s)
}

func TestHTTPResponse_IsNotCompressed(t *testing.T) {
	r, _ := startDev(t)
	for _, accepts := range []string{"", "identity", "gzip;q=0", "gzip", "gzip, deflate, br"} {
		res, body := r.Exchange(t, "POST", validPath, gzipped(validJSON), "Content-Type", "application/json", "Content-Encoding", "gzip",
			"Accept-Encoding", accepts)
		if got := res.Header.Get("Content-Encoding"); res.StatusCode != 200 || got != "" || body != `{"valid":false}` {
			t.Errorf("Accept-Encoding %q: got %d, Content-Encoding %q, %q; want {\"valid\":false} without compression", accepts, res.StatusCode, got, body)
		}
	}
	res, body := r.Exchange(t, "POST", validPath, enveloped(1, gzipped(validMessage(t))), "Content-Type", "application/grpc-web+proto",
		"Grpc-Encoding", "gzip", "Grpc-Accept-Encoding", "gzip")
	if got := res.Header.Get("Grpc-Encoding"); res.StatusCode != 200 || got != "" || !strings.HasPrefix(body, "\x00\x00\x00\x00\x00\x80") {
		t.Errorf("gRPC-Web: got %d, Grpc-Encoding %q, %q; want an empty message without compression", res.StatusCode, got, body)
	}
}

func TestContentType_MayHaveParametersAndCapitals(t *testing.T) {
	r, _ := startDev(t)
	for contentType, want := range map[string]string{
		"application/json":                        "application/json",
		"application/json; charset=utf-8":         "application/json; charset=utf-8",
		"application/json;charset=UTF-8":          "application/json; charset=utf-8",
		"application/json; charset=utf8":          "application/json; charset=utf-8",
		`application/json; profile="x;y"; q`:      "application/json",
		"Application/JSON;":                       "application/json",
		"text/plain; charset=utf8":                "application/json",
		"application/proto; messagetype=x":        "application/proto",
		"application/grpc-web+proto; charset=utf": "application/grpc-web+proto",
		"application/grpc-web+json;charset=utf8":  "application/grpc-web+json",
		"application/grpc-web":                    "application/grpc-web",
	} {
		message := validJSON
		if strings.Contains(contentType, "proto") || contentType == "application/grpc-web" {
			message = validMessage(t)
		}
		if strings.Contains(contentType, "grpc") {
			message = enveloped(0, message)
		}
		res, body := r.Exchange(t, "POST", validPath, message, "Content-Type", contentType)
		if got := res.Header.Get("Content-Type"); res.StatusCode != 200 || got != want || res.Header.Get("Grpc-Status") != "" {
			t.Errorf("%s: got %d %s %q; want 200 %s", contentType, res.StatusCode, got, body, want)
		}
	}
}

// Every error over HTTP has a fixed text that quotes nothing of the request. It is counted and
// logged as a call, unless its path is unknown.
func TestHTTPError_HasOurTextAndErrorInfo(t *testing.T) {
	const quoted = "hunter2"
	var scrape func(string) (int, string)
	r, inbox := startDev(t, func(c *server.Config) { scrape = scraped(t, c) })
	jsonType := []string{"Content-Type", "application/json"}
	web := []string{"Content-Type", "application/grpc-web+proto"}
	with := func(base []string, more ...string) []string { return append(append([]string(nil), base...), more...) }
	large := strings.Repeat("a", 5000)
	calls := 0
	for name, c := range map[string]struct {
		method, path, body string
		headers            []string
		http               int
		code               codes.Code
		reason, field      string
	}{
		"no such path":        {"POST", "/" + quoted, validJSON, jsonType, 404, codes.Unimplemented, "UNKNOWN_PATH", ""},
		"no such path, a GET": {"GET", "/" + quoted, "", nil, 404, codes.Unimplemented, "UNKNOWN_PATH", ""},
		"no such path, web":   {"POST", "/" + quoted, "", web, 200, codes.Unimplemented, "UNKNOWN_PATH", ""},
		"GET":                 {"GET", sendPath + "?" + quoted, "", nil, 405, codes.InvalidArgument, "INVALID_FIELD", "method"},
		"Connect GET": {
			"GET", validPath + "?connect=v2&encoding=json&message=" + quoted, "", nil, 405, codes.InvalidArgument,
			"INVALID_FIELD", "method",
		},
		"another method": {"HUNTER2", validPath, validJSON, jsonType, 405, codes.InvalidArgument, "INVALID_FIELD", "method"},
		"another type": {
			"POST", sendPath, validJSON,
			[]string{"Content-Type", "text/" + quoted},
			415, codes.InvalidArgument,
			"INVALID_FIELD", "Content-Type",
		},
		"gRPC-Web as text": {
			"POST", sendPath, validJSON,
			[]string{"Content-Type", "application/grpc-web-text"},
			415, codes.InvalidArgument,
			"INVALID_FIELD", "Content-Type",
		},
		"a foreign page": {
			"POST", sendPath, validJSON,
			[]string{"Content-Type", "text/plain", "Origin", "https://hunter2.example"},
			415,
			codes.InvalidArgument, "INVALID_FIELD", "Content-Type",
		},
		"timeout": {
			"POST", sendPath, validJSON, with(jsonType, "Connect-Timeout-Ms", quoted), 400, codes.InvalidArgument,
			"INVALID_FIELD", "Connect-Timeout-Ms",
		},
		"long timeout": {
			"POST", validPath, validJSON, with(jsonType, "Connect-Timeout-Ms", "12345678901"), 400, codes.InvalidArgument,
			"INVALID_FIELD", "Connect-Timeout-Ms",
		},
		"timeout, web": {
			"POST", validPath, "", with(web, "Grpc-Timeout", "1x"), 200, codes.InvalidArgument, "INVALID_FIELD",
			"Grpc-Timeout",
		},
		"encoding": {
			"POST", sendPath, validJSON, with(jsonType, "Content-Encoding", quoted), 501, codes.Unimplemented,
			"UNKNOWN_ENCODING", "",
		},
		"encoding, web": {"POST", validPath, "", with(web, "Grpc-Encoding", quoted), 200, codes.Unimplemented, "UNKNOWN_ENCODING", ""},
		"version": {
			"POST", sendPath, validJSON, with(jsonType, "Connect-Protocol-Version", quoted), 400, codes.InvalidArgument,
			"INVALID_FIELD", "Connect-Protocol-Version",
		},
		"no gzip": {
			"POST", sendPath, quoted, with(jsonType, "Content-Encoding", "gzip"), 400, codes.InvalidArgument,
			"INVALID_FIELD", "body",
		},
		"half a gzip": {
			"POST", sendPath, gzipped(validJSON)[:30], with(jsonType, "Content-Encoding", "gzip"), 400,
			codes.InvalidArgument, "INVALID_FIELD", "body",
		},
		"a long message": {"POST", sendPath, large, jsonType, 429, codes.ResourceExhausted, "MESSAGE_TOO_LARGE", ""},
		"a bomb":         {"POST", sendPath, gzipped(strings.Repeat(large, 20)), with(jsonType, "Content-Encoding", "gzip"), 429, codes.ResourceExhausted, "MESSAGE_TOO_LARGE", ""},
		"a bomb, web": {
			"POST", validPath, enveloped(1, gzipped(large)), with(web, "Grpc-Encoding", "gzip"), 200,
			codes.ResourceExhausted, "MESSAGE_TOO_LARGE", "",
		},
		"a long message, web": {"POST", validPath, enveloped(0, large), web, 200, codes.ResourceExhausted, "MESSAGE_TOO_LARGE", ""},
		"half an envelope":    {"POST", validPath, "\x00\x00", web, 200, codes.InvalidArgument, "INVALID_FIELD", "body"},
		"half a message, web": {"POST", validPath, enveloped(0, validMessage(t))[:9], web, 200, codes.InvalidArgument, "INVALID_FIELD", "body"},
		"two messages, web": {
			"POST", validPath, enveloped(0, "") + enveloped(0, ""), web, 200, codes.InvalidArgument,
			"INVALID_FIELD", "body",
		},
		"undeclared gzip, web": {"POST", validPath, enveloped(1, gzipped("")), web, 200, codes.InvalidArgument, "INVALID_FIELD", "body"},
		"an unknown flag, web": {"POST", validPath, enveloped(0x80, ""), web, 200, codes.InvalidArgument, "INVALID_FIELD", "body"},
		"no UTF-8, web":        {"POST", validPath, enveloped(0, "\x0a\x01\xff"), web, 200, codes.InvalidArgument, "INVALID_FIELD", "body"},
		"an expired deadline": {
			"POST", validPath, validJSON, with(jsonType, "Connect-Timeout-Ms", "0"), 504, codes.DeadlineExceeded, "CALLER_GONE", "",
		},
		"an expired deadline, web": {
			"POST", validPath, enveloped(0, validMessage(t)), with(web, "Grpc-Timeout", "0n"), 200, codes.DeadlineExceeded, "CALLER_GONE", "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := r.Log.Count("msg=call")
			res, body := r.Exchange(t, c.method, c.path, c.body, c.headers...)
			s := statusOf(t, res, body)
			info, _, bad := servertest.Details(t, s)
			if res.StatusCode != c.http || s.Code() != c.code {
				t.Errorf("status: got HTTP %d %v; want %d %v", res.StatusCode, s.Code(), c.http, c.code)
			}
			if info.GetReason() != c.reason || info.GetDomain() != "phone-number-service" || servertest.FieldOf(bad) != c.field {
				t.Errorf("details: got reason %s of %s, field %q; want %s of phone-number-service, field %q", info.GetReason(), info.GetDomain(), servertest.FieldOf(bad), c.reason, c.field)
			}
			if text := s.Message() + body; s.Message() == "" || strings.Contains(strings.ToLower(text), quoted) {
				t.Errorf("text: got %q; want one that quotes nothing", text)
			}
			logged := r.Log.Count("msg=call") - before
			if want := c.reason != "UNKNOWN_PATH"; (logged == 1) != want {
				t.Errorf("log lines of the call: got %d; want exactly one: %v", logged, want)
			}
			calls += logged
		})
	}
	if strings.Contains(strings.ToLower(r.Log.String()), quoted) {
		t.Error("the log: got a quote of a request; want none")
	}
	if n := len(inbox.Messages("")); n != 0 {
		t.Errorf("messages: got %d; want 0", n)
	}
	_, metrics := scrape("/metrics")
	counted := 0
	for line := range strings.Lines(metrics) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), "} "); strings.HasPrefix(name, "phonenumber_call_duration_seconds_count{") {
			n, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			counted += n
		}
	}
	if counted != calls {
		t.Errorf("calls in the metrics: got %d; want %d, as in the log", counted, calls)
	}
}

// A body that does not arrive gives an error with a fixed text and a status after which nothing
// was sent. The call is counted and logged.
func TestHTTPBody_IncompleteIsExplained(t *testing.T) {
	ca := catest.New(t)
	for _, secure := range []bool{false, true} {
		var scrape func(string) (int, string)
		r, inbox := startDev(t, func(c *server.Config) {
			c.Limits.ReadTimeout = 300 * time.Millisecond
			if secure {
				c.TLS, _ = certificates(t, ca, nil)
			}
			scrape = scraped(t, c)
		})
		late := func(net.Conn) {}
		halfClosed := func(c net.Conn) { c.(interface{ CloseWrite() error }).CloseWrite() }
		for name, c := range map[string]struct {
			contentType, header, begin string
			then                       func(net.Conn)
			http                       int
			code                       codes.Code
			reason, field              string
		}{
			"late":          {"application/json", "Content-Length: 100", `{"phone_number":`, late, 400, codes.InvalidArgument, "INVALID_FIELD", "body"},
			"late, nothing": {"application/json", "Content-Length: 100", "", late, 400, codes.InvalidArgument, "INVALID_FIELD", "body"},
			"late, chunked": {
				"application/json", "Transfer-Encoding: chunked", "5\r\n{\"pho\r\n", late, 400, codes.InvalidArgument,
				"INVALID_FIELD", "body",
			},
			"late, web": {
				"application/grpc-web+proto", "Content-Length: 100", "\x00\x00", late, 200, codes.InvalidArgument,
				"INVALID_FIELD", "body",
			},
			"garbage": {
				"application/json", "Transfer-Encoding: chunked", "zz\r\n\r\n", late, 400, codes.InvalidArgument,
				"INVALID_FIELD", "body",
			},
			"garbage, web": {
				"application/grpc-web+proto", "Transfer-Encoding: chunked", "5\r\nabcdefgh", late, 200, codes.InvalidArgument,
				"INVALID_FIELD", "body",
			},
			"a long chunk": {
				"application/json", "Transfer-Encoding: chunked", "fffffffffffffffff\r\n", late, 400, codes.InvalidArgument,
				"INVALID_FIELD", "body",
			},
			"cut off":          {"application/json", "Content-Length: 100", `{"phone_number":`, halfClosed, 499, codes.Canceled, "CALLER_GONE", ""},
			"cut off, chunked": {"application/json", "Transfer-Encoding: chunked", "5\r\n{\"", halfClosed, 499, codes.Canceled, "CALLER_GONE", ""},
			"cut off, web":     {"application/grpc-web+proto", "Content-Length: 100", "\x00", halfClosed, 200, codes.Canceled, "CALLER_GONE", ""},
		} {
			t.Run(fmt.Sprintf("%s, TLS %v", name, secure), func(t *testing.T) {
				conn := dial(t, r, secure, ca)
				fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\n%s\r\n\r\n%s", sendPath, c.contentType, c.header, c.begin)
				c.then(conn)
				res, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				body, err := io.ReadAll(res.Body)
				if err != nil {
					t.Fatal(err)
				}
				s := statusOf(t, res, string(body))
				info, _, bad := servertest.Details(t, s)
				if res.StatusCode != c.http || s.Code() != c.code {
					t.Errorf("status: got HTTP %d %v; want %d %v", res.StatusCode, s.Code(), c.http, c.code)
				}
				if info.GetReason() != c.reason || servertest.FieldOf(bad) != c.field {
					t.Errorf("details: got reason %s, field %q; want %s, field %q", info.GetReason(), servertest.FieldOf(bad), c.reason, c.field)
				}
				if text := s.Message() + string(body); strings.Contains(text, "127.0.0.1") || strings.Contains(text, "tcp") {
					t.Errorf("text: got %q; want no address", text)
				}
			})
		}
		reset := dial(t, r, secure, ca)
		fmt.Fprintf(reset, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{", sendPath)
		raw := reset
		if secure {
			raw = reset.(*tls.Conn).NetConn()
		}
		raw.(*net.TCPConn).SetLinger(0)
		raw.Close()
		testutil.Eventually(t, "the metrics and the log have all 11 calls", func() bool {
			_, metrics := scrape("/metrics")
			return strings.Contains(metrics, `method="SendSMS",status="InvalidArgument"} 7`) &&
				strings.Contains(metrics, `method="SendSMS",status="Canceled"} 4`) &&
				strings.Count(r.Log.String(), "msg=call") == 11
		})
		if log := r.Log.String(); strings.Contains(log, "->") {
			t.Errorf("TLS %v: got addresses in the log; want none:\n%s", secure, log)
		}
		if n := len(inbox.Messages("")); n != 0 {
			t.Errorf("messages: got %d; want 0", n)
		}
	}
}

// dial connects to r, with TLS if secure.
func dial(t *testing.T, r *servertest.Replica, secure bool, ca *catest.CA) net.Conn {
	t.Helper()
	var conn net.Conn
	var err error
	if secure {
		conn, err = tls.Dial("tcp", r.Addr, ca.Client())
	} else {
		conn, err = net.Dial("tcp", r.Addr)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func TestHTTP_TakesDeadlinesOfEveryForm(t *testing.T) {
	r, _ := startDev(t)
	for _, c := range [][]string{
		{"application/json", validJSON, "Connect-Timeout-Ms", "9999999999"},
		{"application/json", validJSON, "Connect-Timeout-Ms", "60000"},
		{"application/grpc-web+proto", enveloped(0, validMessage(t)), "Grpc-Timeout", "99999999H"},
		{"application/grpc-web+proto", enveloped(0, validMessage(t)), "Grpc-Timeout", "1M"},
		{"application/grpc-web+proto", enveloped(0, validMessage(t)), "Grpc-Timeout", "60S"},
		{"application/grpc-web+proto", enveloped(0, validMessage(t)), "Grpc-Timeout", "60000m"},
		{"application/grpc-web+proto", enveloped(0, validMessage(t)), "Grpc-Timeout", "60000000u"},
	} {
		res, body := r.Exchange(t, "POST", validPath, c[1], "Content-Type", c[0], c[2], c[3])
		if res.StatusCode != 200 || res.Header.Get("Grpc-Status") != "" {
			t.Errorf("%s: %s: got %d %q; want 200", c[2], c[3], res.StatusCode, body)
		}
	}
}
