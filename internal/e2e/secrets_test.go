package e2e

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

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// TestServe_OutputHoldsNoSecret makes calls of every kind, with every fault and error, at log
// level debug, with metrics and traces. Only the requests to Aliyun and to the database may
// contain a secret or a number: logs, responses, metrics and traces may not.
func TestServe_OutputHoldsNoSecret(t *testing.T) {
	t.Parallel()
	const (
		password = "Pa55-of-the-database"
		guess    = "738201"
		quoted   = "PhoneNumbers=18677776661&TemplateParam={code:738201}" // Aliyun's errors quote requests
		codeKey  = "a-code-key-of-32-bytes-or-more!!!"
	)
	database, fake := mysqltest.Start(t), dysmsapitest.New(t)
	fake.AccessKeyID, fake.AccessKeySecret = "LTAI5tRecognisableID", "RecognisableSecret0123456789"
	admin := database.Open(t)
	mysqltest.Exec(t, admin,
		"CREATE USER phone@'%' IDENTIFIED BY '"+password+"'",
		"GRANT ALL ON "+mysqltest.Database+".* TO phone@'%'",
	)
	dsn := mysqltest.As(database.DSN(mysqltest.Database), "phone:"+password)
	traces := &testutil.Output{}
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(traces, r.Body) }))
	defer collector.Close()
	token, hash := newToken(t)
	callersFile := testutil.WriteFile(t, t.TempDir(), "callers.yaml",
		"callers:\n  - name: shop\n    token_sha256: "+hash+"\n    countries: [CN]\n    sign_names: [阿里云]\n")
	metrics := servicetest.FreeAddress(t)
	env := append(servicetest.Environment(fake, dsn), "PHONENUMBER_METRICS_LISTEN="+metrics, "PHONENUMBER_LOG_LEVEL=debug",
		"PHONENUMBER_CALLERS="+callersFile, "OTEL_EXPORTER_OTLP_ENDPOINT="+collector.URL, "OTEL_BSP_SCHEDULE_DELAY=100",
		"PHONENUMBER_CODE_KEY="+base64.StdEncoding.EncodeToString([]byte(codeKey)), "PHONENUMBER_SMS_TIMEOUT=300ms")
	p := run(t, env).serving(t)

	var responses bytes.Buffer
	var numbers []string
	next := func() string {
		numbers = append(numbers, fmt.Sprintf("1867777%04d", 1000+len(numbers)))
		return numbers[len(numbers)-1]
	}
	record := func(err error) {
		s := status.Convert(err)
		fmt.Fprintln(&responses, s.Code(), s.Message(), s.Details())
	}
	as := func(token string) context.Context {
		return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+token)
	}
	sendBy := func(ctx context.Context, number, sign, template string) {
		_, err := p.SendSMS(ctx, &pb.SendSMSRequest{PhoneNumber: number, Signature: sign, TemplateCode: template})
		record(err)
	}
	send := func(ctx context.Context, number, sign string) { sendBy(ctx, number, sign, "SMS_1") }
	valid := func(ctx context.Context, number, code string) {
		res, err := p.Valid(ctx, &pb.ValidRequest{PhoneNumber: number, Code: code})
		record(err)
		fmt.Fprintln(&responses, res)
	}
	post := func(method, body string, headers ...string) {
		q, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+p.Addr+"/phonenumberservice.PhoneNumberService/"+method,
			strings.NewReader(body))
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
		fmt.Fprintln(&responses, res.Status, res.Header)
		io.Copy(&responses, res.Body)
	}
	shop := as(token)

	faults := []dysmsapitest.Fault{
		dysmsapitest.Hang().ButAccepted(), dysmsapitest.CloseBeforeReading(), dysmsapitest.CloseAfterReading().ButAccepted(),
		dysmsapitest.Truncated().ButAccepted(),
		dysmsapitest.Body(502, "text/html", "<html>"+quoted+"</html>").ButAccepted(), dysmsapitest.BadGateway(), dysmsapitest.OKWithoutBizID(), dysmsapitest.Huge(1 << 20),
		dysmsapitest.Redirect(307, "http://127.0.0.1:1/?"+quoted), dysmsapitest.Reply(200, quoted, quoted),
	}
	for _, code := range strings.Fields("isv.BUSINESS_LIMIT_CONTROL isv.MOBILE_NUMBER_ILLEGAL isv.BLACK_KEY_CONTROL_LIMIT SignatureDoesNotMatch InvalidAccessKeyId.NotFound isv.INVALID_JSON_PARAM Throttling.User isp.SYSTEM_ERROR NotListed") {
		faults = append(faults, dysmsapitest.Reply(400, code, quoted))
	}
	for _, template := range []string{"SMS_1", "100001"} {
		for _, fault := range faults {
			number := next()
			fake.Next(fault)
			sendBy(shop, number, "阿里云", template)
			valid(shop, number, guess)
		}
	}
	number := next()
	send(shop, number, "阿里云")
	right := fake.LastCode(t, number)
	for _, code := range []string{guess, right, right, "", strings.Repeat("738201", 100), "７３８２０１", "\x00738201"} {
		valid(shop, number, code)
	}
	send(t.Context(), number, "阿里云")
	send(as("a-wrong-"+token), number, "阿里云")
	send(shop, number, "18677776661")
	send(shop, "+85251237382", "阿里云")
	send(shop, number+","+number, "阿里云")
	for _, body := range []string{
		`{"phone_number":"` + number + `","code":"` + guess + `"}`,
		`{"phone_number":"` + number + `","` + guess + `":1}`, `{"phone_number":` + number + `}`, number + guess, `{"phone_number":"` + number,
	} {
		for _, contentType := range []string{
			"application/json", "application/proto", "application/grpc-web+proto", "text/xml",
			"application/x-www-form-urlencoded",
		} {
			post("Valid", body, "Content-Type", contentType, "Authorization", "Bearer "+token)
			post("SendSMS", body, "Content-Type", contentType)
			post(number+guess, body, "Content-Type", contentType)
		}
	}
	testutil.WriteFile(t, filepath.Dir(callersFile), "callers.yaml", "callers:\n  - name: shop\n    token_sha256: "+token+"\n")
	testutil.Eventually(t, "the log reports the invalid callers file",
		func() bool { return p.Output.Contains("failed to reload callers") })
	responses.WriteString(inspect(t, dsn, number))
	scrapes := testutil.Get(t, metrics, "/metrics", 200)
	number = next()
	database.Stop()
	send(shop, number, "阿里云")
	valid(shop, number, guess)
	scrapes += testutil.Get(t, metrics, "/metrics", 200)
	for _, wrong := range []string{
		dsn + "?tls=nothing", strings.Replace(dsn, "@tcp", "@nothing", 1),
		"phone:" + password + "@tcp(127.0.0.1:1)/x?timeout=50ms&nothing=" + password,
	} {
		for _, args := range [][]string{{"serve"}, {"migrate"}, {"inspect", number}} {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			cmd := command(append(env[1:], "DATA_SOURCE_NAME="+wrong, "PHONENUMBER_LISTEN="+servicetest.FreeAddress(t)), args...)
			cmd.Stdout, cmd.Stderr = &responses, &responses
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
		"the DSN's password": password, "the access key id": fake.AccessKeyID, "the access key secret": fake.AccessKeySecret, "a token": token,
		"a token's hash": hash,
		"the code key":   codeKey, "the code key in base64": base64.StdEncoding.EncodeToString([]byte(codeKey)),
		"the code key in hex": hex.EncodeToString([]byte(codeKey)),
	}
	for _, n := range append(numbers, "18677776661", "85251237382") {
		secrets["the number "+n] = n
	}
	accepted := fake.Accepted()
	if len(accepted) < 5 {
		t.Fatalf("codes sent: got %d; want at least 5", len(accepted))
	}
	isCode := map[string]bool{guess: true}
	for _, m := range accepted {
		isCode[m.Code] = true
	}
	outputs := map[string]string{"log": p.Output.String(), "responses": responses.String(), "metrics": scrapes, "traces": traces.String()}
	for output, text := range outputs {
		if len(text) < 1000 {
			t.Errorf("%s: got %d bytes; want at least 1000", output, len(text))
		}
		for name, secret := range secrets {
			if i := strings.Index(text, secret); i >= 0 {
				t.Errorf("%s: got %s in …%q…; want no secret", output, name, text[max(0, i-100):min(len(text), i+100)])
			}
		}
		for _, i := range sixDigits.FindAllStringIndex(text, -1) {
			if isCode[text[i[0]:i[1]]] && !isInsideToken(text, i) {
				t.Errorf("%s: got a code in …%q…; want none", output, text[max(0, i[0]-100):min(len(text), i[1]+100)])
			}
		}
	}
	for _, want := range []string{
		"step=aliyun", "status=Unauthenticated", "status=PermissionDenied", "status=DeadlineExceeded",
		"status=Unavailable",
	} {
		if !strings.Contains(outputs["log"], want) {
			t.Errorf("the log lacks %s: the test did not cover this case", want)
		}
	}
}

var sixDigits = regexp.MustCompile(`[0-9]{6}`)

// isInsideToken reports whether a digit, letter or point is next to text[i[0]:i[1]]. Then these
// six digits belong to an identifier or a time, and are no code.
func isInsideToken(text string, i []int) bool {
	isTokenByte := func(c byte) bool {
		return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '.'
	}
	return i[0] > 0 && isTokenByte(text[i[0]-1]) || i[1] < len(text) && isTokenByte(text[i[1]])
}
