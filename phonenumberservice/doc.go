// Package phonenumberservice is the wire contract of phone-number-service: the
// proto and the Go code generated from it, and nothing else.
//
// SendSMS texts a random six-digit code to a phone number; Valid says whether a
// code is right, once. The service listens on port 50511:
//
//	conn, err := grpc.NewClient("localhost:50511", grpc.WithTransportCredentials(insecure.NewCredentials()))
//	client := phonenumberservice.NewPhoneNumberServiceClient(conn)
//
// The comments on the proto say what each field may hold and which statuses the
// calls answer with. A call may be repeated after UNAVAILABLE: surely nothing was
// sent and nothing counted. After UNKNOWN or DEADLINE_EXCEEDED it may have
// happened: let the person type the code that arrived, or ask for a new one.
package phonenumberservice
