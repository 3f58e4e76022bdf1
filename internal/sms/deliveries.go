package sms

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"regexp"
	"strconv"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// A Delivery is Aliyun's record of one SMS. It lacks the record's text, which contains the code.
type Delivery struct {
	Product      Product
	TemplateCode string // "" of PNVS, because it has the form of a code
	Status       DeliveryStatus
	ErrorCode    string    // of Delivered DeliveredCode, of Failed the carrier's or Aliyun's, else ""
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

// DeliveredCode is the error code of an SMS that arrived.
const DeliveredCode = "DELIVERED"

// A QueryError is the reason that Aliyun gave no records.
type QueryError struct {
	Code      string // Aliyun's; "" if it sent none
	RequestID string
	detail    string // fixed words
}

func (e *QueryError) Error() string {
	text := e.detail
	if e.Code != "" {
		text += ", code " + e.Code
	}
	if e.RequestID != "" {
		text += ", RequestId " + e.RequestID
	}
	return text
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

var (
	sixDigits   = regexp.MustCompile(`[0-9]{6}`) // can be a code
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
	lost := func() error { return &QueryError{detail: verify.SendErrorOf(LostReply(ctx, 0)).Detail} }
	var x exchange
	ctx = httptrace.WithClientTrace(ctx, x.hooks())
	request := signed(ctx, endpoint.url, "QuerySendDetails", query.Encode(), *credentials, time.Now(), rand.Text())
	response, err := endpoint.transport.RoundTrip(request)
	switch {
	case err != nil && x.written.Load():
		return nil, lost()
	case err != nil:
		return nil, &QueryError{detail: endpoint.dialErrorDetail(ctx, err)}
	}
	defer response.Body.Close()
	switch {
	case response.StatusCode == http.StatusSwitchingProtocols: // the body has no deadline
		return nil, &QueryError{detail: "protocol switched instead of a reply"}
	case x.early.Load():
		x.conn.Load().Close()
		return nil, &QueryError{detail: "reply was there before its request was written"}
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxRecordsBytes+1))
	switch {
	case err != nil:
		return nil, lost()
	case len(body) > maxRecordsBytes:
		return nil, &QueryError{detail: "reply over 256 KiB"}
	}
	all, err := readDeliveries(p, n, body)
	var e *QueryError
	if errors.As(err, &e) {
		a.rejections.again(e.RequestID) // a copy of it is no reply to a send
	}
	return all, err
}

// A record is one of Aliyun's records. It has no field for Content, which encoding/json skips.
type record struct {
	SendStatus                                   json.Number // also accepts a string
	ErrCode, TemplateCode, SendDate, ReceiveDate string
}

// readDeliveries reads a reply. Of its texts it keeps only tokens that contain neither six digits, which
// can be a code, nor n.
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
	if p == PNVS && json.Unmarshal(reply.Model, &records) != nil {
		return nil, &QueryError{detail: "the reply is not Aliyun's"}
	}
	var all []Delivery
	for _, r := range records {
		status, _ := strconv.Atoi(r.SendStatus.String())
		d := Delivery{Product: p, Status: DeliveryStatus(status), ErrorCode: token(r.ErrCode)}
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
