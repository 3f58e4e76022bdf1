package consistency

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func TestSendSMS_OneKeyInParallelIsOneSMS(t *testing.T) { testGuarantee(t, parallelKeys) }

func TestSendSMS_OneKeyInParallelIsOneSMSOnSQLite(t *testing.T) {
	fake := dysmsapitest.New(t)
	env := servicetest.Environment(fake, "sqlite:"+filepath.Join(t.TempDir(), "codes.db"))
	p := servicetest.Start(t, buildOnce(), servicetest.FreeAddress(t), env).Serving(t)
	for _, v := range sendWithOneKey(t, fake, load{replicas: []string{p.Addr}}.dial(t)) {
		t.Error(v)
	}
}

func parallelKeys(t *testing.T, program string) []string {
	p := startPair(t, program, mysqltest.DSN(t))
	return sendWithOneKey(t, p.fake, p.load().dial(t))
}

// sendWithOneKey makes 64 calls with one idempotency key at once, in each of 20 rounds.
func sendWithOneKey(t *testing.T, fake *dysmsapitest.Server, clients []pb.PhoneNumberServiceClient) (violations []string) {
	t.Helper()
	const rounds, calls = 20, 64
	replays := 0
	for round := range rounds {
		request := &pb.SendSMSRequest{PhoneNumber: fmt.Sprintf("189%08d", round), Signature: "Acme", TemplateCode: "SMS_1"}
		ctx := metadata.AppendToOutgoingContext(t.Context(), "idempotency-key", fmt.Sprintf("round-%04d", round))
		results := make([]string, calls)
		var all sync.WaitGroup
		for i := range calls {
			all.Go(func() { results[i] = sendResult(clients[i%len(clients)].SendSMS(ctx, request)) })
		}
		all.Wait()
		ok := 0
		for _, r := range results {
			if r == "OK" {
				ok++
			} else if r != "Aborted SEND_IN_PROGRESS" {
				violations = append(violations, "a call with the key of another: got "+r+"; want OK or Aborted SEND_IN_PROGRESS")
			}
		}
		replays += ok - 1
		var header metadata.MD
		for _, c := range clients {
			_, err := c.SendSMS(ctx, request, grpc.Header(&header))
			if got := header.Get("idempotency-replayed"); err != nil || len(got) != 1 {
				violations = append(violations, fmt.Sprintf("a repeated call: got %v, replayed %v; want OK, true", err, got))
			}
		}
		n := 0
		for _, m := range fake.Accepted() {
			if m.PhoneNumber == request.PhoneNumber {
				n++
			}
		}
		if n != 1 || ok == 0 {
			violations = append(violations, fmt.Sprintf("%d calls with one key: got %d SMS and %d times OK; want 1 SMS", calls, n, ok))
		}
	}
	t.Logf("%d rounds of %d calls: %d were replays during the round", rounds, calls, replays)
	return violations
}

// sendResult returns the status of a call, with the reason of its error.
func sendResult(_ *pb.Empty, err error) string {
	s := status.Convert(err)
	text := s.Code().String()
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			text += " " + info.Reason
		}
	}
	return text
}
