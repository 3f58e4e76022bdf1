// Package phonenumberservice has the wire contract of phone-number-service: the
// proto and the Go code that is generated from it.
//
// SendSMS sends a random six-digit code to a phone number. Valid checks a code; a
// correct code is accepted once. The service listens on port 50511:
//
//	conn, err := grpc.NewClient("localhost:50511", grpc.WithTransportCredentials(insecure.NewCredentials()))
//	client := phonenumberservice.NewPhoneNumberServiceClient(conn)
//
// The comments of the proto describe the fields and the statuses of the calls. A
// call can be repeated after UNAVAILABLE: nothing was sent and nothing was
// counted. After UNKNOWN or DEADLINE_EXCEEDED the SMS may have been sent, or the
// attempt may have been counted: let the person type the code that arrived, or
// ask for a new one.
package phonenumberservice
