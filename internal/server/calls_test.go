package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/liulinhuai/phone-number-service/internal/auth"
	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/telemetry"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A handler that runs outside of the chain would lose the fields of its log line.
func TestCallFrom_PanicsWithoutACall(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a call of the handler without the chain: got no panic; want one")
		}
	}()
	s := &service{numbers: verify.NumberParser{Region: "CN", Plan: func(number, _ string) (string, bool) { return "+86" + number, true }}}
	s.Valid(t.Context(), &pb.ValidRequest{PhoneNumber: "18600000000"})
}

func TestChains_AuthenticateACallOnce(t *testing.T) {
	tel := telemetry.Telemetry{Metrics: telemetry.NewMetrics("test"), Log: slog.New(slog.DiscardHandler)}
	var tokens []string
	authenticate := func(authorization []string, _ *x509.Certificate) (*auth.Caller, error) {
		tokens = append(tokens, authorization...)
		return &auth.Caller{Name: "shop"}, nil
	}
	handle := newChains(newAdmission(t.Context(), config.DefaultLimits(), tel), authenticate, tel).calls
	var callers []string
	valid := func(ctx context.Context, _ *pb.ValidRequest) (*pb.ValidResponse, error) {
		callers = append(callers, callFrom(ctx).caller.Name+telemetry.CallerOf(ctx))
		return &pb.ValidResponse{}, nil
	}
	const method = pb.PhoneNumberService_Valid_FullMethodName

	c := &call{fullMethod: method, headers: metadata.MD{"authorization": {"Bearer grpc"}}}
	c.handler = func(ctx context.Context, _ any) (any, error) { return valid(ctx, nil) }
	if _, err := handle(context.WithValue(t.Context(), callKey{}, c), c); err != nil {
		t.Errorf("over gRPC: got %v; want OK", err)
	}

	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, method, strings.NewReader("{}"))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer http")
	w := httptest.NewRecorder()
	unaryHandler(method, handle, Config{Limits: config.DefaultLimits()}, valid).ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		t.Errorf("over HTTP: got %d %s; want 200", w.Code, w.Body)
	}

	if got, want := strings.Join(tokens, ", "), "Bearer grpc, Bearer http"; got != want {
		t.Errorf("authenticated: got %q; want %q", got, want)
	}
	if got, want := strings.Join(callers, ", "), "shopshop, shopshop"; got != want {
		t.Errorf("callers in the handlers: got %q; want %q", got, want)
	}
}

func TestAuthenticate_IgnoresAnExpiredCertificate(t *testing.T) {
	var got *x509.Certificate
	handle := chain(authenticate(func(_ []string, certificate *x509.Certificate) (*auth.Caller, error) {
		got = certificate
		return nil, nil
	}))
	for name, expiry := range map[string]time.Duration{"valid": time.Minute, "expired": -time.Minute} {
		certificate := &x509.Certificate{NotAfter: time.Now().Add(expiry)}
		c := &call{
			tls:     &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{certificate}}},
			handler: func(context.Context, any) (any, error) { return nil, nil },
		}
		handle(t.Context(), c)
		if isUsed := got == certificate; isUsed != (name == "valid") {
			t.Errorf("a certificate that is %s: got used %v; want %v", name, isUsed, !isUsed)
		}
	}
}

func TestChain_RunsInOrderAndAllocatesNothing(t *testing.T) {
	var order []byte
	mark := func(name byte) interceptor {
		return func(ctx context.Context, c *call, next handler) (any, error) {
			order = append(order, name)
			return next(ctx, c)
		}
	}
	handle := chain(mark('a'), mark('b'), mark('c'))
	var own grpc.UnaryHandler = func(context.Context, any) (any, error) {
		order = append(order, '.')
		return nil, nil
	}
	c, ctx := &call{handler: own}, t.Context()
	handle(ctx, c)
	if string(order) != "abc." {
		t.Errorf("order: got %s; want abc.", order)
	}
	if allocations := testing.AllocsPerRun(100, func() {
		order = order[:0]
		handle(ctx, c)
	}); allocations != 0 {
		t.Errorf("allocations of a call: got %v; want 0", allocations)
	}
}
