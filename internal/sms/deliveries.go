package sms

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A Delivery is Aliyun's record of one SMS. It lacks the record's text, which contains the code.
type Delivery struct {
	Product      Product
	TemplateCode string // "" of PNVS, because it has the form of a code
	Status       DeliveryStatus
	ErrorCode    string    // of Delivered DELIVERED, of Failed the carrier's or Aliyun's, or HiddenCode, else ""
	SentAt       time.Time // in whole seconds, as ReceivedAt
	ReceivedAt   time.Time // when the carrier answered; zero if Waiting
}

// DeliveryStatus says if an SMS arrived.
type DeliveryStatus int

// The values of SendStatus in Aliyun's records.
const (
	Waiting   DeliveryStatus = 1 // the carrier has not answered
	Failed    DeliveryStatus = 2
	Delivered DeliveryStatus = 3
)

func (s DeliveryStatus) String() string {
	return map[DeliveryStatus]string{Waiting: "waiting", Failed: "failed", Delivered: "delivered"}[s]
}

// A QueryError is the reason that Aliyun gave no records.
type QueryError struct {
	Code      string // Aliyun's; "" if it sent none
	RequestID string
	detail    string // fixed words
}

func (e *QueryError) Error() string {
	if e.RequestID != "" {
		return e.Cause() + ", RequestId " + e.RequestID
	}
	return e.Cause()
}

// Cause returns the text of the error without the RequestId, so that equal causes have equal texts.
func (e *QueryError) Cause() string {
	if e.Code != "" {
		return e.detail + ", code " + e.Code
	}
	return e.detail
}

var noRight = regexp.MustCompile(`^(isp\.)?(RAM_PERMISSION_DENY|NoPermission|Forbidden\.RAM|Forbidden)$`)

// NoRight reports whether the credentials lack the right to ask, which is QueryRight of the product.
func (e *QueryError) NoRight() bool { return noRight.MatchString(e.Code) }

// QueryRight returns the RAM action that Deliveries needs.
func QueryRight(p Product) string {
	return map[Product]string{SMS: "dysms:QuerySendDetails", PNVS: "dypns:QuerySendDetails"}[p]
}

// Beijing is the time zone of Aliyun's records.
var Beijing = time.FixedZone("UTC+8", 8*3600)

// HiddenCode is in place of an error code that can contain the code of the SMS.
const HiddenCode = "hidden"

var (
	sixDigits   = regexp.MustCompile(`\p{Nd}{6}`) // can be a code
	smsTemplate = regexp.MustCompile(`^SMS_[0-9]{1,20}$`)
)

// maxRecordsBytes is enough for 50 records.
const maxRecordsBytes = 256 << 10

// Deliveries returns Aliyun's records of the SMS to n on a day in Beijing, at most 50: of all, or
// only of the SMS with bizID. Its errors are *QueryError. Aliyun has records of the last 30 days.
func (a *Aliyun) Deliveries(ctx context.Context, p Product, n verify.Number, day time.Time, bizID string) ([]Delivery, error) {
	credentials, endpoint := a.credentials.Load(), a.endpoints[p]
	if credentials == nil {
		return nil, &QueryError{detail: errNoCredentials.Error()}
	}
	query := url.Values{
		"PhoneNumber": {aliyunNumber(n)}, "SendDate": {day.In(Beijing).Format("20060102")}, "PageSize": {"50"}, "CurrentPage": {"1"},
	}
	if bizID != "" {
		query.Set("BizId", bizID)
	}
	_, body, failure := endpoint.ask(ctx, "QuerySendDetails", query.Encode(), *credentials)
	if failure != "" {
		return nil, &QueryError{detail: failure}
	}
	all, err := readDeliveries(p, n, body)
	var e *QueryError
	// A gateway can repeat a rejection, and the copy is no reply to a later request.
	if errors.As(err, &e) && !a.rejections.again(e.RequestID) {
		a.reportIfExpired(e.Code, *credentials)
	}
	return all, err
}

// ask makes a request that sends no SMS. It returns the reply's headers and its whole body, or a fixed text
// for why there is none.
func (e *endpoint) ask(ctx context.Context, action, query string, c Credentials) (header http.Header, body []byte, failure string) {
	got, err := e.roundTrip(signed(ctx, e.url, action, query, c, time.Now(), rand.Text()), maxRecordsBytes)
	switch {
	case err != nil:
		return nil, nil, verify.SendErrorOf(err).Detail
	case len(got.body) > maxRecordsBytes:
		return nil, nil, "reply over 256 KiB"
	}
	return got.header, got.body, ""
}

// IsToken reports whether s has the form of Aliyun's codes and IDs. An error code of a Delivery can have
// another one, since carriers have codes of their own.
func IsToken(s string) bool { return tokenShape.MatchString(s) }

// errorCode returns a record's code as it is, unless it has six digits in a row, as the code of the SMS
// and the number have, or characters that cannot be printed, or the length of a text.
func errorCode(s string) string {
	s = strings.TrimSpace(s)
	unprintable := func(c rune) bool { return !unicode.IsPrint(c) }
	if strings.ContainsFunc(s, unprintable) || utf8.RuneCountInString(s) > 64 || sixDigits.MatchString(s) {
		return HiddenCode
	}
	return s
}

// A record is one of Aliyun's records. It has no field for Content, which encoding/json skips.
type record struct {
	SendStatus                                   json.Number // also accepts a string
	ErrCode, TemplateCode, SendDate, ReceiveDate string
}

// readDeliveries reads a reply. Of its texts it keeps only error codes, and tokens that contain neither
// six digits, which can be a code, nor n.
func readDeliveries(p Product, n verify.Number, body []byte) ([]Delivery, error) {
	var reply struct {
		Code, RequestID   string
		SmsSendDetailDTOs struct{ SmsSendDetailDTO []record }
		Model             json.RawMessage
	}
	if json.Unmarshal(body, &reply) != nil {
		return nil, &QueryError{detail: "the reply is not Aliyun's"}
	}
	token := func(s string) string {
		if !tokenShape.MatchString(s) || sixDigits.MatchString(s) || containsSecret(s, aliyunNumber(n)) {
			return ""
		}
		return s
	}
	if reply.Code != "OK" {
		e := &QueryError{Code: token(reply.Code), detail: "rejected by Aliyun"}
		if tokenShape.MatchString(reply.RequestID) && !containsSecret(reply.RequestID, aliyunNumber(n)) {
			e.RequestID = reply.RequestID
		}
		return nil, e
	}
	records := reply.SmsSendDetailDTOs.SmsSendDetailDTO
	if p == PNVS && reply.Model != nil && json.Unmarshal(reply.Model, &records) != nil {
		return nil, &QueryError{detail: "the reply is not Aliyun's"}
	}
	var all []Delivery
	for _, r := range records {
		status, _ := strconv.Atoi(r.SendStatus.String())
		d := Delivery{Product: p, Status: DeliveryStatus(status), ErrorCode: errorCode(r.ErrCode)}
		d.SentAt, _ = time.ParseInLocation(time.DateTime, r.SendDate, Beijing)
		if smsTemplate.MatchString(r.TemplateCode) {
			d.TemplateCode = r.TemplateCode
		}
		switch d.Status {
		case Delivered, Failed:
			d.ReceivedAt, _ = time.ParseInLocation(time.DateTime, r.ReceiveDate, Beijing)
		case Waiting:
			d.ErrorCode = ""
		default:
			continue
		}
		all = append(all, d)
	}
	return all, nil
}
