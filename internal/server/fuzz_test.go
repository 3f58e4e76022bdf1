package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/net/http2"

	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// For any first bytes, split at any point, one server gets every byte of the connection, or the
// connection is closed.
func FuzzConnMux_Dispatch(f *testing.F) {
	for _, seed := range []string{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "POST / HTTP/1.1\r\n\r\n", "PR", "", "PRX", "pri", "\x16\x03\x01", "\x00\x00\x00"} {
		f.Add([]byte(seed), uint8(1))
		f.Add([]byte(seed), uint8(255))
	}
	f.Fuzz(func(t *testing.T, sent []byte, cut uint8) {
		var refused []string
		d := &connMux{
			limits: DefaultLimits, rejected: func(reason string) { refused = append(refused, reason) },
			http2: newHTTP2Conns(DefaultLimits, func(string) {}), grpcListener: newChanListener(nil), httpListener: newChanListener(nil),
		}
		client, conn := net.Pipe()
		go func() {
			at := min(int(cut), len(sent))
			client.Write(sent[:at])
			client.Write(sent[at:])
			client.Close()
		}()
		welcomed := make(chan struct{})
		go func() {
			d.dispatch(conn)
			close(welcomed)
		}()
		var got net.Conn
		var isGRPC bool
		select {
		case got = <-d.grpcListener.conns:
			isGRPC = true
		case got = <-d.httpListener.conns:
		case <-welcomed:
			if len(sent) >= 3 || len(refused) != 1 || refused[0] != "silent" {
				t.Fatalf("%q was closed (%v)", sent, refused)
			}
			return
		}
		<-welcomed
		all, err := io.ReadAll(got)
		want := sent
		if isGRPC {
			want = sent[:min(len(sent), len(http2.ClientPreface))] // FuzzHTTP2Conn_Read has the rest
			all = all[:min(len(all), len(want))]
		} else if err != nil {
			t.Errorf("got %v; want no error", err)
		}
		if !bytes.Equal(all, want) {
			t.Errorf("got %q; want %q", all, want)
		}
		if isGRPC != bytes.HasPrefix(sent, []byte("PRI")) {
			t.Errorf("%q went to gRPC: %v", sent, isGRPC)
		}
	})
}

var sixDigits = regexp.MustCompile(`[0-9]{6,}`)

// Whatever is sent as a call over HTTP/1.1, the answer is JSON, the handler gets valid
// texts alone, and no number or code comes back or is logged.
func FuzzUnaryHandler_Body(f *testing.F) {
	for _, seed := range []string{
		`{"phone_number":"18600000000","code":"123456"}`, `{"phoneNumber":"18600000000"}`, `{"123456":"code"}`, `{"code":123456}`, `{"code":"123456","code":"123456"}`,
		`[123456]`, ``, `null`, `"123456`, "{\"code\":\"\xff123456\"}", `{"code":{"123456":"123456"}}`, `{"code":"\ud800123456"}`, "\n\v\x01\x00",
	} {
		for _, contentType := range []string{"application/json", "application/proto", "application/x-www-form-urlencoded", "application/grpc-web+proto", "application/connect+json"} {
			f.Add(contentType, []byte(seed))
		}
	}
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		var log bytes.Buffer
		handled := false
		interceptor := callInterceptor(telemetry.Telemetry{Metrics: fuzzMetrics, Log: slog.New(slog.NewTextHandler(&log, nil))}, nil)
		handler := jsonByDefault(unaryHandler(pb.PhoneNumberService_Valid_FullMethodName, interceptor, DefaultLimits, func(*http.Request) error { return nil }, func(_ context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
			handled = true
			if !utf8.ValidString(r.PhoneNumber) || !utf8.ValidString(r.Code) {
				t.Errorf("%q, %q are no text", r.PhoneNumber, r.Code)
			}
			return &pb.ValidResponse{}, nil
		}))
		q := httptest.NewRequestWithContext(t.Context(), http.MethodPost, pb.PhoneNumberService_Valid_FullMethodName, bytes.NewReader(body))
		q.Header.Set("Content-Type", contentType)
		answer := httptest.NewRecorder()
		handler.ServeHTTP(answer, q)
		if answer.Code == http.StatusOK && !handled && !strings.Contains(strings.ToLower(contentType), "grpc") {
			t.Errorf("%q as %q: got 200 and no call", body, contentType)
		}
		inHeader, err := base64.RawStdEncoding.DecodeString(answer.Header().Get("Grpc-Status-Details-Bin"))
		if details := answer.Body.String() + string(inHeader); err != nil || !handled && !strings.Contains(details, "google.rpc.ErrorInfo") {
			t.Errorf("%q as %q: got %d %q %v; want an error with ErrorInfo", body, contentType, answer.Code, answer.Body, answer.Header())
		}
		if answer.Header().Get("Content-Type") == "application/json" && !json.Valid(answer.Body.Bytes()) {
			t.Errorf("%q as %q: got %q, which is no JSON", body, contentType, answer.Body)
		}
		for _, secret := range sixDigits.FindAllString(string(body), -1) {
			logged := lineTime.ReplaceAllString(log.String(), "")
			if strings.Contains(answer.Body.String(), secret) || strings.Contains(logged, secret) {
				t.Errorf("%q as %q: the answer %q or the log %q holds %s", body, contentType, answer.Body, logged, secret)
			}
		}
	})
}

var (
	fuzzMetrics = telemetry.NewMetrics("test")
	lineTime    = regexp.MustCompile(`time=\S+|duration_ms=\S+`)
)
