package server_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/dev"
	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

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
	if log := r.Log.String(); !strings.Contains(log, "recovered from a panic") || strings.Contains(log, code) {
		t.Errorf("the log: want the panic without its value:\n%s", log)
	}
	panics = false
	r.MustSend(t, number)
}

func TestReflection_OffIsUnimplemented(t *testing.T) {
	r, _ := startDev(t, func(c *server.Config) { c.Reflection = false })
	stream, err := reflectionpb.NewServerReflectionClient(r.Conn).ServerReflectionInfo(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("reflection: got %v; want Unimplemented", err)
	}
}
