package dysmsapitest

import (
	"cmp"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// A Receipt is a carrier's answer to a message. Aliyun has it After the message was sent.
type Receipt struct {
	Code  string // Delivered if empty
	After time.Duration
}

// Delivered is the code of the receipt of a message that arrived.
const Delivered = "DELIVERED"

// SetReceipts sets what the carriers answer to each later message. Without it, each message is
// delivered at once.
func (s *Server) SetReceipts(f func(Accepted) Receipt) { s.set(func() { s.receiptOf = f }) }

// FailQueries gives every later query a fault.
func (s *Server) FailQueries(f Fault) { s.set(func() { s.queryFault = f }) }

// Queries counts the queries that arrived, with all their outcomes.
func (s *Server) Queries() (n int) { s.set(func() { n = s.queries }); return n }

const queryAction = "QuerySendDetails"

// query is the action QuerySendDetails of both products, which tells what became of messages.
func (s *Server) query(w http.ResponseWriter, r *http.Request, p product) {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	s.mu.Lock()
	s.queries++
	fault := s.queryFault
	params, a := s.checkGateway(r, body, queryAction)
	rejected := a.Code != ""
	if !rejected {
		a = s.details(params, p)
	}
	a.RequestID = newRequestID()
	s.requestIDs = append(s.requestIDs, a.RequestID)
	s.mu.Unlock()
	if rejected {
		a.write(w)
		return
	}
	fault.act(w, r, a)
}

// A detail is Aliyun's record of a message. Content is the text with the code.
type detail struct {
	PhoneNum     string
	SendStatus   int    // 1 waiting, 2 failed, 3 delivered
	ErrCode      string `json:",omitempty"`
	TemplateCode string
	Content      string
	SendDate     string
	ReceiveDate  string `json:",omitempty"`
	OutID        string `json:"OutId"`
}

type details struct {
	List []detail `json:"SmsSendDetailDTO"`
}

var beijing = time.FixedZone("", 8*3600)

// details returns the records of the messages that the parameters select, the newest first.
func (s *Server) details(params url.Values, p product) reply {
	for _, name := range []string{"PhoneNumber", "SendDate", "PageSize", "CurrentPage"} {
		if params.Get(name) == "" {
			return reply{Status: 400, Code: "Missing" + name, Message: name + " is mandatory for this action."}
		}
	}
	now := s.now().In(beijing)
	day, err := time.ParseInLocation("20060102", params.Get("SendDate"), beijing)
	size, _ := strconv.Atoi(params.Get("PageSize"))
	page, _ := strconv.Atoi(params.Get("CurrentPage"))
	for name, values := range params {
		if len(values) > 1 || !slices.Contains([]string{"PhoneNumber", "SendDate", "PageSize", "CurrentPage", "BizId"}, name) {
			return isv("INVALID_PARAMETERS", "参数异常")
		}
	}
	if err != nil || day.After(now) || now.Sub(day) > 31*24*time.Hour || size < 1 || size > 50 || page < 1 {
		return isv("INVALID_PARAMETERS", "参数异常")
	}
	var found []detail
	for _, m := range slices.Backward(s.accepted) {
		at := m.At.In(beijing)
		if productOf(m) != p || person(m.PhoneNumber) != person(params.Get("PhoneNumber")) || at.Format("20060102") != params.Get("SendDate") ||
			params.Get("BizId") != "" && params.Get("BizId") != m.BizID {
			continue
		}
		const second = time.DateTime
		d := detail{
			PhoneNum: m.PhoneNumber, SendStatus: 1, TemplateCode: m.TemplateCode, SendDate: at.Format(second),
			Content: fmt.Sprintf("【%s】您的验证码为%s，请勿泄露。", m.SignName, m.Code),
		}
		if received := at.Add(m.receipt.After); !received.After(now) {
			d.ErrCode, d.ReceiveDate, d.SendStatus = cmp.Or(m.receipt.Code, Delivered), received.Format(second), 2
			if d.ErrCode == Delivered {
				d.SendStatus = 3
			}
		}
		found = append(found, d)
	}
	total := len(found)
	found = found[min((page-1)*size, total):min(page*size, total)]
	ok := reply{Status: http.StatusOK, Code: "OK", Message: "OK"}
	if p == pnvs {
		success := true
		ok.Success, ok.Model, ok.TotalCount = &success, found, total
		return ok
	}
	ok.Details, ok.TotalCount = &details{found}, strconv.Itoa(total)
	return ok
}

// person returns a number in mainland China without its prefix, and any other number unchanged.
func person(number string) string {
	if m := mainland.FindStringSubmatch(number); m != nil {
		return m[1]
	}
	return number
}
