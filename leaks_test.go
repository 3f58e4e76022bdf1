package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// Every call, fault and error, at debug level, scraped and traced: nothing of it that
// leaves the process, but to Aliyun and to the database, holds a secret or a number.
func TestServe_OutputHoldsNoSecret(t *testing.T) {
	t.Parallel()
	const (
		password = "Pa55-of-the-database"
		guess    = "738201"
		quoted   = "PhoneNumbers=18677776661&TemplateParam={code:738201}" // as Aliyun's errors quote requests
		codeKey  = "a-code-key-of-32-bytes-or-more!!!"
	)
	mariadb, fake := mariadbtest.Start(t), dysmsapitest.New(t)
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tRecognisableID", "RecognisableSecret0123456789"
	admin := mariadb.Open(t)
	for _, statement := range []string{"CREATE USER phone@'%' IDENTIFIED BY '" + password + "'", "GRANT ALL ON " + mariadbtest.Database + ".* TO phone@'%'"} {
		if _, err := admin.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	dsn := mariadbtest.As(mariadb.DSN(mariadbtest.Database), "phone:"+password)
	traces := &servicetest.Output{}
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(traces, r.Body) }))
	defer collector.Close()
	token, hash := newToken(t)
	callersFile := put(t, t.TempDir(), "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+hash+"\n    countries: [CN]\n    sign_names: [阿里云]\n")
	metrics := servicetest.FreeAddress(t)
	env := append(servicetest.Environment(fake, dsn), "PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_LOG_LEVEL=debug",
		"PHONENUMBER_CALLERS="+callersFile, "OTEL_EXPORTER_OTLP_ENDPOINT="+collector.URL, "OTEL_BSP_SCHEDULE_DELAY=100",
		"PHONENUMBER_CODE_KEY="+base64.StdEncoding.EncodeToString([]byte(codeKey)), "PHONENUMBER_SMS_TIMEOUT=300ms")
	p := run(t, env).serving(t)

	var answers bytes.Buffer
	var numbers []string
	next := func() string {
		numbers = append(numbers, fmt.Sprintf("1867777%04d", 1000+len(numbers)))
		return numbers[len(numbers)-1]
	}
	heard := func(err error) {
		s := status.Convert(err)
		fmt.Fprintln(&answers, s.Code(), s.Message(), s.Details())
	}
	as := func(token string) context.Context {
		return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
	}
	send := func(ctx context.Context, number, sign string) {
		_, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: number, Signature: sign, TemplateCode: "SMS_1"})
		heard(err)
	}
	valid := func(ctx context.Context, number, code string) {
		res, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: number, Code: code})
		heard(err)
		fmt.Fprintln(&answers, res)
	}
	post := func(method, body string, headers ...string) {
		q, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+p.Addr+"/phonenumberservice.PhoneNumberService/"+method, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(headers); i += 2 {
			q.Header.Set(headers[i], headers[i+1])
		}
		res, err := http.DefaultClient.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		fmt.Fprintln(&answers, res.Status, res.Header)
		io.Copy(&answers, res.Body)
	}
	shop := as(token)

	faults := []dysmsapitest.Fault{
		dysmsapitest.Hang().ButAccepted(), dysmsapitest.CloseBeforeReading(), dysmsapitest.CloseAfterReading().ButAccepted(), dysmsapitest.Truncated().ButAccepted(),
		dysmsapitest.Body(502, "text/html", "<html>"+quoted+"</html>").ButAccepted(), dysmsapitest.BadGateway(), dysmsapitest.OKWithoutBizID(), dysmsapitest.Huge(1 << 20),
		dysmsapitest.Redirect(307, "http://127.0.0.1:1/?"+quoted), dysmsapitest.Reply(200, quoted, quoted),
	}
	for _, code := range strings.Fields("isv.BUSINESS_LIMIT_CONTROL isv.MOBILE_NUMBER_ILLEGAL isv.BLACK_KEY_CONTROL_LIMIT SignatureDoesNotMatch InvalidAccessKeyId.NotFound isv.INVALID_JSON_PARAM Throttling.User isp.SYSTEM_ERROR NotListed") {
		faults = append(faults, dysmsapitest.Reply(400, code, quoted))
	}
	for _, fault := range faults {
		number := next()
		fake.Next(fault)
		send(shop, number, "阿里云")
		valid(shop, number, guess)
	}
	number := next()
	send(shop, number, "阿里云")
	right := lastCode(fake)
	for _, code := range []string{guess, right, right, "", strings.Repeat("738201", 100), "７３８２０１", "\x00738201"} {
		valid(shop, number, code)
	}
	send(t.Context(), number, "阿里云")
	send(as("a-wrong-"+token), number, "阿里云")
	send(shop, number, "18677776661")
	send(shop, "+85251237382", "阿里云")
	send(shop, number+","+number, "阿里云")
	for _, body := range []string{`{"phone_number":"` + number + `","code":"` + guess + `"}`, `{"phone_number":"` + number + `","` + guess + `":1}`, `{"phone_number":` + number + `}`, number + guess, `{"phone_number":"` + number} {
		for _, contentType := range []string{"application/json", "application/proto", "application/grpc-web+proto", "text/xml", "application/x-www-form-urlencoded"} {
			post("Valid", body, "Content-Type", contentType, "Authorization", "Bearer "+token)
			post("SendSMS", body, "Content-Type", contentType)
			post(number+guess, body, "Content-Type", contentType)
		}
	}
	put(t, filepath.Dir(callersFile), "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+token+"\n")
	eventually(t, "a broken callers file is told", func() bool { return strings.Contains(p.Output.String(), "failed to reload callers") })
	answers.WriteString(inspect(t, dsn, number))
	scrapes := get(t, metrics, "/metrics", 200)
	number = next()
	mariadb.Stop()
	send(shop, number, "阿里云")
	valid(shop, number, guess)
	scrapes += get(t, metrics, "/metrics", 200)
	for _, wrong := range []string{dsn + "?tls=nothing", strings.Replace(dsn, "@tcp", "@nothing", 1), "phone:" + password + "@tcp(127.0.0.1:1)/x?timeout=50ms&nothing=" + password} {
		for _, command := range [][]string{{"serve"}, {"migrate"}, {"inspect", number}} {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			cmd := program(append(env[1:], "DATA_SOURCE_NAME="+wrong, "PHONENUMBER_LISTEN="+servicetest.FreeAddress(t)), command...)
			cmd.Stdout, cmd.Stderr = &answers, &answers
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
			cmd.Wait()
			stop()
			cancel()
		}
	}
	p.Signal(syscall.SIGTERM)
	p.Wait()

	secrets := map[string]string{
		"the DSN's password": password, "the access key id": fake.AccessKeyID, "the access key secret": fake.AccessKeySecret, "a token": token, "a token's hash": hash,
		"the code key": codeKey, "the code key in base64": base64.StdEncoding.EncodeToString([]byte(codeKey)), "the code key in hex": hex.EncodeToString([]byte(codeKey)),
	}
	for _, n := range append(numbers, "18677776661", "85251237382") {
		secrets["the number "+n] = n
	}
	all := fake.Accepted()
	if len(all) < 5 {
		t.Fatalf("%d codes went out; want 5 at least", len(all))
	}
	isCode := map[string]bool{guess: true}
	for _, m := range all {
		isCode[m.Code] = true
	}
	places := map[string]string{"the output": p.Output.String(), "the answers": answers.String(), "the metrics": scrapes, "the traces": traces.String()}
	for place, text := range places {
		if len(text) < 1000 {
			t.Errorf("%s are %d bytes; want all that there is", place, len(text))
		}
		for what, secret := range secrets {
			if i := strings.Index(text, secret); i >= 0 {
				t.Errorf("%s hold %s: …%q…", place, what, text[max(0, i-100):min(len(text), i+100)])
			}
		}
		for _, i := range sixDigits.FindAllStringIndex(text, -1) {
			if isCode[text[i[0]:i[1]]] && !partOfAnother(text, i) {
				t.Errorf("%s hold a code: …%q…", place, text[max(0, i[0]-100):min(len(text), i[1]+100)])
			}
		}
	}
	for _, want := range []string{"step=aliyun", "status=Unauthenticated", "status=PermissionDenied", "status=DeadlineExceeded", "status=Unavailable"} {
		if !strings.Contains(places["the output"], want) {
			t.Errorf("the log lacks %s: not all was driven", want)
		}
	}
}

var sixDigits = regexp.MustCompile(`[0-9]{6}`)

// partOfAnother reports whether a digit, letter or fraction is beside what looks like a
// code: then it is of an identifier, or of a time.
func partOfAnother(text string, i []int) bool {
	isPart := func(c byte) bool {
		return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '.'
	}
	return i[0] > 0 && isPart(text[i[0]-1]) || i[1] < len(text) && isPart(text[i[1]])
}
