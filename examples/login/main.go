// Command login is a login by phone number. It shows how a backend calls phone-number-service
// and handles its errors. Run "phone-number-service dev" beside it.
package main

import (
	"cmp"
	"context"
	"html/template"
	"log"
	"net/http"
	"os"
	"regexp"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/phonenumberservice"
)

func main() {
	address := cmp.Or(os.Getenv("LOGIN_LISTEN"), "localhost:8080")
	handler, err := newLogin(cmp.Or(os.Getenv("PHONE_NUMBER_SERVICE"), "localhost:50511"))
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("open http://%s/", address) //nolint:gosec // the operator sets it
	server := &http.Server{Addr: address, Handler: handler, ReadTimeout: 5 * time.Second}
	log.Fatal(server.ListenAndServe())
}

// The sign name and the template code of the SMS, as approved by Aliyun.
const (
	signName     = "Acme"
	templateCode = "SMS_123456789"
)

// numberForm is the only form of a number that this login accepts: the eleven digits of mainland
// China. The service accepts other forms too, but here a number identifies an account, and two
// forms would be two accounts.
var numberForm = regexp.MustCompile(`^1[3-9][0-9]{9}$`)

// newLogin returns the handler of the login. In production, also limit the sends of each
// visitor: each SMS costs money, and each send allows three more guesses.
func newLogin(service string) (http.Handler, error) {
	// One connection serves all calls.
	conn, err := grpc.NewClient(service, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	client := phonenumberservice.NewPhoneNumberServiceClient(conn)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		show(w, http.StatusOK, page{})
	})

	mux.HandleFunc("POST /code", func(w http.ResponseWriter, r *http.Request) {
		number := r.PostFormValue("number")
		if !numberForm.MatchString(number) {
			show(w, http.StatusBadRequest, page{Number: number, Problem: "Please enter a mobile number of eleven digits."})
			return
		}
		// Longer than a send can take, 11 s, so that the service's error arrives.
		ctx, cancel := context.WithTimeout(r.Context(), 15*time.Second)
		defer cancel()
		_, err := client.SendSMS(ctx, &phonenumberservice.SendSMSRequest{PhoneNumber: number, Signature: signName, TemplateCode: templateCode})
		info, invalid, retry := details(err)
		switch code := status.Code(err); {
		case code == codes.OK:
			show(w, http.StatusOK, page{Number: number, Sent: true})
		case info.GetReason() == "" || code == codes.DeadlineExceeded || code == codes.Unknown || code == codes.Aborted:
			// The SMS may arrive, and its code works. An error without a reason is not from the service.
			show(w, http.StatusOK, page{Number: number, Sent: true, Problem: "This takes longer than usual. If no code arrives, send another."})
		case code == codes.ResourceExhausted && retry != nil:
			wait := retry.RetryDelay.AsDuration().String()
			show(w, http.StatusTooManyRequests, page{Number: number, Problem: "Too many codes. Try again in " + wait + "."})
		case slices.ContainsFunc(invalid.GetFieldViolations(), isOfNumber):
			show(w, http.StatusBadRequest, page{Number: number, Problem: "That is no mobile number."})
		case info.Reason == "isv.BLACK_KEY_CONTROL_LIMIT" || info.Reason == "isv.CUSTOMER_REFUSED":
			show(w, http.StatusBadRequest, page{Number: number, Problem: "This number does not accept our SMS; please use another one, or contact us."})
		default: // nothing was sent, and only an operator can help
			log.Print(err)
			show(w, http.StatusServiceUnavailable, page{Number: number, Problem: "No code could be sent. Try again later."})
		}
	})

	mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
		number := r.PostFormValue("number")
		if !numberForm.MatchString(number) { // the page never sends this
			show(w, http.StatusBadRequest, page{})
			return
		}
		res, err := client.Valid(r.Context(), &phonenumberservice.ValidRequest{PhoneNumber: number, Code: r.PostFormValue("code")})
		switch {
		case err != nil:
			show(w, http.StatusServiceUnavailable, page{Number: number, Sent: true, Problem: "The code could not be checked. Try again."})
		case !res.Valid:
			show(w, http.StatusUnauthorized, page{Number: number, Sent: true, Problem: "That code is not valid. After three tries, send another."})
		default: // start a session here
			show(w, http.StatusOK, page{Number: number, Welcome: true})
		}
	})
	return http.NewCrossOriginProtection().Handler(mux), nil // against CSRF
}

func isOfNumber(v *errdetails.BadRequest_FieldViolation) bool { return v.Field == "phone_number" }

// details returns the details of err that this login reads, nil for each that err does not have.
func details(err error) (info *errdetails.ErrorInfo, invalid *errdetails.BadRequest, retry *errdetails.RetryInfo) {
	for _, detail := range status.Convert(err).Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.BadRequest:
			invalid = d
		case *errdetails.RetryInfo:
			retry = d
		}
	}
	return info, invalid, retry
}

type page struct {
	Number, Problem string
	Sent, Welcome   bool
}

var pageTemplate = template.Must(template.New("").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Login</title>
{{if .Welcome}}<p>Welcome, {{.Number}}</p>{{else}}
<form method="post" action="/code"><label>Phone number <input name="number" value="{{.Number}}"></label> <button>Send code</button></form>
{{if .Sent}}<form method="post" action="/login"><input type="hidden" name="number" value="{{.Number}}">
<label>Code <input name="code" autocomplete="one-time-code"></label> <button>Log in</button></form>{{end}}
{{with .Problem}}<p role="alert">{{.}}</p>{{end}}{{end}}`))

func show(w http.ResponseWriter, code int, p page) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	if err := pageTemplate.Execute(w, p); err != nil {
		log.Print(err)
	}
}
