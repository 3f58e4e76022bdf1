// Command go logs a person in by phone number, in a terminal. examples/README.md has the flow.
package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"os"
	"slices"
	"time"

	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// The sign name and the template code are as approved by Aliyun.
const signName, templateCode, serviceConfig = "Acme", "SMS_123456789", `{"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [{
  "name": [{"service": "phonenumberservice.PhoneNumberService"}], "waitForReady": true, "timeout": "15s"}]}`

func main() {
	security := insecure.NewCredentials()
	if ca, isSet := os.LookupEnv("PHONE_NUMBER_SERVICE_CA"); isSet {
		var err error
		if security, err = credentials.NewClientTLSFromFile(ca, ""); err != nil {
			log.Fatal(err)
		}
	}
	conn, err := grpc.NewClient(cmp.Or(os.Getenv("PHONE_NUMBER_SERVICE"), "localhost:50511"),
		grpc.WithTransportCredentials(security), grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}))
	if err != nil {
		log.Fatal(err)
	}
	client, number, in := pb.NewPhoneNumberServiceClient(conn), os.Args[1], bufio.NewScanner(os.Stdin)
	ctx := metadata.AppendToOutgoingContext(context.Background(), "verification-context", rand.Text()) // one for each login
	if token := os.Getenv("PHONE_NUMBER_SERVICE_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	ask := func() bool { fmt.Print("Code (empty for another one): "); return in.Scan() }
	say := func(text string, result bool) bool { fmt.Println(text); return result }
	for sent := say(send(ctx, client, number)); sent && ask(); {
		if in.Text() == "" {
			say(send(ctx, client, number))
		} else if say(check(ctx, client, number, in.Text())) {
			return
		}
	}
	os.Exit(1)
}

// send returns the text for the person, and whether a code may arrive.
func send(ctx context.Context, client pb.PhoneNumberServiceClient, number string) (string, bool) {
	ctx = metadata.AppendToOutgoingContext(ctx, "idempotency-key", rand.Text()) // one for all tries
	_, code, err := call(ctx, client.SendSMS, &pb.SendSMSRequest{PhoneNumber: number, Signature: signName, TemplateCode: templateCode})
	isNumber := func(v *errdetails.BadRequest_FieldViolation) bool { return v.Field == "phone_number" }
	switch info, retry := detail[*errdetails.ErrorInfo](err), detail[*errdetails.RetryInfo](err); {
	case code == codes.OK:
		return "We sent a code to " + number + ".", true
	case code == codes.Unknown:
		return "The code may come late. Type it if it comes.", true
	case code == codes.ResourceExhausted && retry != nil:
		return fmt.Sprintf("Too many codes. Try again in %d seconds.", (retry.RetryDelay.AsDuration()+time.Second-1)/time.Second), false
	case slices.ContainsFunc(detail[*errdetails.BadRequest](err).GetFieldViolations(), isNumber):
		return number + " is not a mobile number.", false
	case info.GetMetadata()["refused"] == "country":
		return "We cannot send codes to this country or region.", false
	case slices.Contains([]string{"isv.BLACK_KEY_CONTROL_LIMIT", "isv.CUSTOMER_REFUSED"}, info.GetReason()):
		return "This number does not accept our SMS; please use another one, or contact us.", false
	}
	log.Print(err) // for the operator
	return "No code was sent. Try again later.", false
}

// check returns the text for the person, and whether the typed code is right.
func check(ctx context.Context, client pb.PhoneNumberServiceClient, number, typed string) (string, bool) {
	switch res, code, _ := call(ctx, client.Valid, &pb.ValidRequest{PhoneNumber: number, Code: typed}); {
	case res.GetValid():
		return "Welcome.", true
	case code == codes.OK:
		return "This code is not valid.", false
	case code == codes.Unknown:
		return "The check may have counted. Type the code again; if it fails, ask for another one.", false
	}
	return "The code was not checked. Type it again.", false
}

// call repeats a call that had no effect, or whose send is under way, up to twice. codes.Unknown: it may have had its effect.
func call[Q, R any](ctx context.Context, f func(context.Context, Q, ...grpc.CallOption) (R, error), request Q) (R, codes.Code, error) {
	for tries := 1; ; tries++ {
		res, err := f(ctx, request)
		code, info, wait := status.Code(err), detail[*errdetails.ErrorInfo](err), detail[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration()
		if again := info != nil && (code == codes.Unavailable || code == codes.Aborted && wait <= time.Second); !again || tries == 3 {
			if code == codes.DeadlineExceeded || code == codes.Aborted || err != nil && info == nil {
				code = codes.Unknown // without an ErrorInfo the error is not from the service
			}
			return res, code, err
		}
		log.Print(err)
		time.Sleep(max(time.Second, wait))
	}
}

func detail[T any](err error) (d T) { // nil if err has none of type T
	for _, any := range status.Convert(err).Details() {
		if d, ok := any.(T); ok {
			return d
		}
	}
	return d
}
