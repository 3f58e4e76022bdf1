package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

var sixDigits = regexp.MustCompile(`[0-9]{6,}`)

// FuzzUnaryHandler_Body makes a call over HTTP/1.1 with any type and body. The handler gets only
// valid UTF-8. Every error has an ErrorInfo. The response and the log contain no six digits of
// the body.
func FuzzUnaryHandler_Body(f *testing.F) {
	for _, seed := range []string{
		`{"phone_number":"18600000000","code":"123456"}`, `{"phoneNumber":"18600000000"}`, `{"123456":"code"}`, `{"code":123456}`,
		`{"code":"123456","code":"123456"}`,
		`[123456]`, ``, `null`, `"123456`, "{\"code\":\"\xff123456\"}", `{"code":{"123456":"123456"}}`, `{"code":"\ud800123456"}`, "\n\v\x01\x00",
	} {
		for _, contentType := range []string{
			"application/json", "application/proto", "application/x-www-form-urlencoded",
			"application/grpc", "application/grpc-web+proto", "application/connect+json",
		} {
			f.Add(contentType, []byte(seed))
		}
	}
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		var log bytes.Buffer
		handled := false
		tel := telemetry.Telemetry{Metrics: fuzzMetrics, Log: slog.New(slog.NewTextHandler(&log, nil))}
		handle := newChains(newAdmission(t.Context(), config.DefaultLimits(), tel), nil, tel).calls
		handler := unaryHandler(pb.PhoneNumberService_Valid_FullMethodName, handle, Config{Limits: config.DefaultLimits()},
			func(_ context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
				handled = true
				if !utf8.ValidString(r.PhoneNumber) || !utf8.ValidString(r.Code) {
					t.Errorf("fields: got %q, %q; want valid UTF-8", r.PhoneNumber, r.Code)
				}
				return &pb.ValidResponse{}, nil
			})
		q := httptest.NewRequestWithContext(t.Context(), http.MethodPost, pb.PhoneNumberService_Valid_FullMethodName, bytes.NewReader(body))
		q.Header.Set("Content-Type", contentType)
		response := httptest.NewRecorder()
		handler.ServeHTTP(response, q)
		if response.Code == http.StatusOK && !handled && !strings.Contains(strings.ToLower(contentType), "grpc") {
			t.Errorf("%q as %q: got 200 without a call; want a call or an error", body, contentType)
		}
		// gRPC-Web has the status in headers, gRPC in trailers.
		status := response.Header()
		if trailer := response.Result().Trailer; trailer.Get("Grpc-Status") != "" {
			status = trailer
		}
		inStatus, err := base64.RawStdEncoding.DecodeString(status.Get("Grpc-Status-Details-Bin"))
		if details := response.Body.String() + string(inStatus); err != nil || !handled && !strings.Contains(details, "google.rpc.ErrorInfo") {
			t.Errorf("%q as %q: got %d %q %v; want an error with ErrorInfo", body, contentType, response.Code, response.Body, response.Header())
		}
		if response.Header().Get("Content-Type") == "application/json" && !json.Valid(response.Body.Bytes()) {
			t.Errorf("%q as %q: got %q; want JSON", body, contentType, response.Body)
		}
		for _, secret := range sixDigits.FindAllString(string(body), -1) {
			logged := logTimes.ReplaceAllString(log.String(), "")
			if strings.Contains(response.Body.String()+status.Get("Grpc-Message")+string(inStatus), secret) || strings.Contains(logged, secret) {
				t.Errorf("%q as %q: got the response %q %v and the log %q; want no %s in them", body, contentType, response.Body, status, logged, secret)
			}
		}
	})
}

var (
	fuzzMetrics = telemetry.NewMetrics("test")
	logTimes    = regexp.MustCompile(`time=\S+|duration_ms=\S+`)
)
