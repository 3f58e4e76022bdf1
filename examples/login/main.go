// Command login is a login by phone number: how a backend calls
// phone-number-service, and what it makes of the answers. Try it beside
// "phone-number-service dev".
package main

import (
	"cmp"
	"context"
	"html/template"
	"log"
	"net/http"
	"os"
	"regexp"
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
	log.Printf("open http://%s/", address) //nolint:gosec // the operator's own
	server := &http.Server{Addr: address, Handler: handler, ReadTimeout: 5 * time.Second}
	log.Fatal(server.ListenAndServe())
}

// What Aliyun knows the sender and the text by.
const (
	signName     = "Acme"
	templateCode = "SMS_123456789"
)

// An account is known by its number, so a number is taken in one form only, though
// the service reads many: here, mainland China's eleven digits.
var numberForm = regexp.MustCompile(`^1[3-9][0-9]{9}$`)

// newLogin serves the login. In production, limit sends per visitor too: whoever may
// send without end can guess without end, and the SMS are paid for.
func newLogin(service string) (http.Handler, error) {
	// One connection, made once, serves all calls.
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
		// Longer than the service gives Aliyun, so that its answer is heard.
		ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		defer cancel()
		_, err := client.SendSMS(ctx, &phonenumberservice.SendSMSRequest{PhoneNumber: number, Signature: signName, TemplateCode: templateCode})
		switch status.Code(err) {
		case codes.OK:
			show(w, http.StatusOK, page{Number: number, Sent: true})
		case codes.InvalidArgument: // Aliyun says so
			show(w, http.StatusBadRequest, page{Number: number, Problem: "That is no mobile number."})
		case codes.ResourceExhausted, codes.Aborted:
			show(w, http.StatusTooManyRequests, page{Number: number, Problem: "Too many codes. Try again in " + waitOf(err).String() + "."})
		case codes.DeadlineExceeded, codes.Unknown: // it may have gone out, and its code works then
			show(w, http.StatusOK, page{Number: number, Sent: true, Problem: "This takes longer than usual. If no code arrives, send another."})
		default: // nothing was sent; the log of the service says why
			show(w, http.StatusServiceUnavailable, page{Number: number, Problem: "No code could be sent. Try again later."})
		}
	})

	mux.HandleFunc("POST /login", func(w http.ResponseWriter, r *http.Request) {
		number := r.PostFormValue("number")
		if !numberForm.MatchString(number) { // the form never sends one
			show(w, http.StatusBadRequest, page{})
			return
		}
		res, err := client.Valid(r.Context(), &phonenumberservice.ValidRequest{PhoneNumber: number, Code: r.PostFormValue("code")})
		switch {
		case err != nil:
			show(w, http.StatusServiceUnavailable, page{Number: number, Sent: true, Problem: "The code could not be checked. Try again."})
		case !res.Valid:
			show(w, http.StatusUnauthorized, page{Number: number, Sent: true, Problem: "That code is not valid. After three tries, send another."})
		default: // here a session would begin
			show(w, http.StatusOK, page{Number: number, Welcome: true})
		}
	})
	return http.NewCrossOriginProtection().Handler(mux), nil // no other site's page sends for its visitors
}

// waitOf is how long the service says to wait.
func waitOf(err error) time.Duration {
	for _, d := range status.Convert(err).Details() {
		if retry, ok := d.(*errdetails.RetryInfo); ok {
			return retry.RetryDelay.AsDuration()
		}
	}
	return time.Minute
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
