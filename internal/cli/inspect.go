package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

type inspectCommand struct {
	config.Rules
	config.Aliyun
	JSON   bool   `name:"json" help:"Print the result as JSON, with times in UTC."`
	Number string `arg:"" help:"Phone number, in any form that SendSMS accepts."`
}

func (c *inspectCommand) Run(ctx context.Context, errs []error) error {
	v, db, n, err := openForNumber(ctx, c.Rules, c.Number, errs)
	if err != nil {
		return err
	}
	defer db.Close()
	dbCtx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	found, err := v.Inspect(dbCtx, n)
	if err != nil {
		return err
	}
	r := newReport(v, n, found)
	c.askAliyun(ctx, &r)
	if c.JSON {
		e := json.NewEncoder(os.Stdout)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(r.forJSON())
	}
	r.print(os.Stdout)
	return nil
}

const readTimeout = 10 * time.Second // for the database

// openForNumber opens the store to read the record of a number, and parses the number.
func openForNumber(
	ctx context.Context, settings config.Rules, number string, errs []error,
) (*verify.Verifier, *store.DB, verify.Number, error) {
	db, err := openConfigured(errs)
	if err != nil {
		return nil, nil, "", err
	}
	rules, numbers := settings.ForVerify()
	n, invalid := numbers.Parse(number)
	if invalid != nil {
		db.Close()
		return nil, nil, "", invalid
	}
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	if err := db.PrepareToRead(ctx); err != nil {
		db.Close()
		return nil, nil, "", fmt.Errorf("DATA_SOURCE_NAME: %w", err)
	}
	return verify.New(verify.Config{Rules: rules, Store: db, Now: time.Now}), db, n, nil
}

// report is the result of inspect and forget. It contains no code.
type report struct {
	verify.Inspection
	number     verify.Number
	rules      verify.Rules
	now        time.Time
	deliveries []sms.Delivery // the newest first
	answered   bool           // Aliyun returned its records of a product
	unanswered []unanswered
}

// unanswered is the reason that Aliyun returned no records of a product.
type unanswered struct {
	Product sms.Product `json:"product,omitempty"` // "" if Aliyun was not asked
	Reason  string      `json:"reason"`
}

const (
	askTimeout    = 10 * time.Second
	maxDeliveries = 10
	recordsKept   = 30 * 24 * time.Hour // by Aliyun
)

// askAliyun adds Aliyun's records of the SMS to the number, or the reasons that there are none.
func (c *inspectCommand) askAliyun(ctx context.Context, r *report) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	reader := config.SecretReader{Role: c.Role.Wanted()}
	secrets, err := reader.AccessKey()
	aliyun, role, settingsErr := newAliyun(c.Aliyun, c.CodeTTL, secrets)
	if err = errors.Join(err, settingsErr); err == nil && role != nil {
		_, err = fetchCredentials(ctx, aliyun, role)
	}
	if err != nil {
		r.unanswered = []unanswered{{Reason: strings.ReplaceAll(err.Error(), "\n", "; ") + "; set the credentials as serve has them"}}
		return
	}
	days := []time.Time{r.now, r.now.Add(-24 * time.Hour)}
	if accepted := time.UnixMicro(r.History.Accepted.At); r.now.Sub(accepted) < recordsKept && dayOf(accepted) < dayOf(days[1]) {
		days = append(days, accepted)
	}
	products := []sms.Product{sms.SMS}
	if r.number.Mainland() {
		products = append(products, sms.PNVS)
	}
	for _, p := range products {
		for _, day := range days {
			records, err := aliyun.Deliveries(ctx, p, r.number, day, "")
			r.deliveries = append(r.deliveries, records...)
			if err != nil {
				r.unanswered = append(r.unanswered, unanswered{p, reasonOf(p, err)})
				break
			}
			r.answered = true
		}
	}
	slices.SortStableFunc(r.deliveries, func(a, b sms.Delivery) int { return b.SentAt.Compare(a.SentAt) })
	r.deliveries = r.deliveries[:min(len(r.deliveries), maxDeliveries)]
}

func dayOf(t time.Time) string { return t.In(sms.Beijing).Format(time.DateOnly) }

// reasonOf returns the text of an error of Deliveries. If the credentials lack the right, it adds the
// remedy.
func reasonOf(p sms.Product, err error) string {
	var e *sms.QueryError
	if errors.As(err, &e) && e.NoRight() {
		return fmt.Sprintf("%v: allow the RAM user or role the action %s", err, sms.QueryRight(p))
	}
	return err.Error()
}

func newReport(v *verify.Verifier, n verify.Number, found verify.Inspection) report {
	return report{number: n, rules: v.Rules, now: time.Now(), Inspection: found}
}

// print writes the report as text. Times are in UTC, and also in the local zone if it differs.
func (r *report) print(w io.Writer) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-10s %s\n", label, fmt.Sprintf(format, args...))
	}
	at := func(t time.Time) string {
		if t.IsZero() { // of a record that lacks it
			return "at an unknown time"
		}
		distance := fmt.Sprintf("%v ago", r.now.Sub(t).Round(time.Second))
		if t.After(r.now) {
			distance = fmt.Sprintf("in %v", t.Sub(r.now).Round(time.Second))
		}
		if _, offset := t.Local().Zone(); offset != 0 {
			distance = t.Local().Format("15:04:05 -0700, ") + distance
		}
		return fmt.Sprintf("%s (%s)", t.UTC().Format(time.RFC3339), distance)
	}
	line("number", "%s", r.number.Masked())
	r.printState(line, at)
	r.printDeliveries(line, at)
}

func (r *report) printState(line func(label, format string, args ...any), at func(time.Time) string) {
	if r.LastSendID == 0 {
		line("last send", "none: nothing was sent to this number, or its row was purged")
		return
	}
	line("last send", "%s, send ID %d", at(r.BegunAt), r.LastSendID)
	accepted, rejected, end := r.History.Accepted, r.History.Rejected, r.History.End
	ofEarlierSend := func(sendID int64) string {
		if sendID == r.LastSendID {
			return ""
		}
		return fmt.Sprintf(" (of an earlier send, send ID %d)", sendID)
	}
	if accepted.SendID != r.LastSendID && rejected.SendID != r.LastSendID {
		if r.now.Sub(r.BegunAt) < time.Minute {
			line("Aliyun", "answer not known yet: the send is in progress, or its replica stores the answer within seconds")
		} else {
			line("Aliyun", "answer not known: it was lost, the caller canceled the send before, or the replica has not stored it; then the log line of the send has it")
		}
	}
	if rejected.SendID != 0 {
		line("Aliyun", "not sent, %s %s, code %s, RequestId %s%s", rejected.Kind, at(time.UnixMicro(rejected.At)), cmp.Or(rejected.ProviderCode, "none"), cmp.Or(rejected.RequestID, "none"), ofEarlierSend(rejected.SendID))
	}
	if accepted.SendID != 0 {
		line("Aliyun", "accepted %s, BizId %s%s", at(time.UnixMicro(accepted.At)), cmp.Or(accepted.BizID, "none"), ofEarlierSend(accepted.SendID))
	}
	for _, c := range r.Live {
		answer := "accepted by Aliyun"
		if !c.Accepted {
			answer = "Aliyun's answer not known"
		}
		line("code", "live until %s, %d of %d attempts used, %s%s", at(c.Expires), r.rules.AttemptLimit-c.AttemptsLeft, r.rules.AttemptLimit, answer, ofEarlierSend(c.SendID))
	}
	if len(r.Live) == 0 {
		line("code", "no live code")
	}
	if r.Keyed > 0 {
		line("keys", "in use: %d", r.Keyed)
	}
	if expires := r.BegunAt.Add(r.rules.CodeTTL); accepted.SendID == r.LastSendID && end.SendID != r.LastSendID &&
		!r.now.Before(expires) {
		line("expired", "%s", at(expires))
	}
	switch {
	case end.SendID == 0:
	case end.Used:
		line("verified", "%s with attempt %d%s", at(time.UnixMicro(end.At)), end.Attempts, ofEarlierSend(end.SendID))
	default:
		line("exhausted", "%s by %d wrong attempts%s", at(time.UnixMicro(end.At)), end.Attempts, ofEarlierSend(end.SendID))
	}
}

func (r *report) printDeliveries(line func(label, format string, args ...any), at func(time.Time) string) {
	for _, d := range r.deliveries {
		sent := strings.ToUpper(string(d.Product))
		if d.TemplateCode != "" {
			sent += " " + d.TemplateCode
		}
		sent += ", sent " + at(d.SentAt)
		switch d.Status {
		case sms.Delivered:
			line("delivery", "%s: delivered %s", sent, at(d.ReceivedAt))
		case sms.Waiting:
			line("delivery", "%s: the carrier has not answered yet", sent)
		default:
			code := cmp.Or(d.ErrorCode, "no code")
			if code == sms.HiddenCode {
				code = "a code that is not shown here (see Aliyun's console)"
			}
			line("delivery", "%s: not delivered, %s %s", sent, code, at(d.ReceivedAt))
			if meaning, action := sms.Meaning(d.ErrorCode); meaning != "" {
				line("", "%s: %s", meaning, action)
			}
		}
	}
	if r.answered && len(r.deliveries) == 0 {
		line("delivery", "Aliyun has no record of an SMS to this number, of today, yesterday or the day of its last accepted send")
	}
	for _, u := range r.unanswered {
		if u.Product == "" {
			line("delivery", "not known, because Aliyun was not asked: %s", u.Reason)
		} else {
			line("delivery", "%s: not known, because Aliyun gave no records: %s", strings.ToUpper(string(u.Product)), u.Reason)
		}
	}
}

// forJSON returns the report in the form that --json prints.
func (r *report) forJSON() any {
	type event struct {
		At       time.Time `json:"at"`
		SendID   int64     `json:"send_id"`
		BizID    string    `json:"biz_id,omitempty"`
		Result   string    `json:"result,omitempty"`
		Code     string    `json:"aliyun_code,omitempty"`
		Request  string    `json:"request_id,omitempty"`
		Attempts int       `json:"attempts,omitempty"`
	}
	type code struct {
		SendID       int64     `json:"send_id"`
		Expires      time.Time `json:"expires"`
		AttemptsLeft int       `json:"attempts_left"`
		Accepted     bool      `json:"accepted"`
	}
	type delivery struct {
		Product    sms.Product `json:"product"`
		Template   string      `json:"template_code,omitempty"`
		Status     string      `json:"status"`
		ErrorCode  string      `json:"error_code,omitempty"`
		Meaning    string      `json:"meaning,omitempty"`
		Action     string      `json:"action,omitempty"`
		SentAt     time.Time   `json:"sent_at,omitzero"`
		ReceivedAt time.Time   `json:"received_at,omitzero"`
	}
	out := struct {
		Number     string       `json:"number"`
		LastSend   *event       `json:"last_send"`
		Accepted   *event       `json:"accepted,omitempty"`
		Rejected   *event       `json:"rejected,omitempty"`
		Verified   *event       `json:"verified,omitempty"`
		Exhausted  *event       `json:"exhausted,omitempty"`
		LiveCodes  []code       `json:"live_codes"`
		Keyed      int          `json:"keyed_sends"`
		Deliveries []delivery   `json:"deliveries"`
		Unanswered []unanswered `json:"unanswered,omitempty"`
	}{Number: r.number.Masked(), LiveCodes: []code{}, Keyed: r.Keyed, Deliveries: []delivery{}, Unanswered: r.unanswered}
	at := func(micros int64) time.Time { return time.UnixMicro(micros).UTC() }
	if r.LastSendID != 0 {
		out.LastSend = &event{At: r.BegunAt.UTC(), SendID: r.LastSendID}
	}
	if a := r.History.Accepted; a.SendID != 0 {
		out.Accepted = &event{At: at(a.At), SendID: a.SendID, BizID: a.BizID}
	}
	if f := r.History.Rejected; f.SendID != 0 {
		out.Rejected = &event{At: at(f.At), SendID: f.SendID, Result: f.Kind.String(), Code: f.ProviderCode, Request: f.RequestID}
	}
	if e := r.History.End; e.SendID != 0 {
		end := &event{At: at(e.At), SendID: e.SendID, Attempts: int(e.Attempts)}
		if out.Exhausted = end; e.Used {
			out.Exhausted, out.Verified = nil, end
		}
	}
	for _, c := range r.Live {
		out.LiveCodes = append(out.LiveCodes, code{c.SendID, c.Expires.UTC(), c.AttemptsLeft, c.Accepted})
	}
	for _, d := range r.deliveries {
		meaning, action := sms.Meaning(d.ErrorCode)
		one := delivery{d.Product, d.TemplateCode, d.Status.String(), d.ErrorCode, meaning, action, d.SentAt.UTC(), d.ReceivedAt}
		if !one.ReceivedAt.IsZero() {
			one.ReceivedAt = one.ReceivedAt.UTC()
		}
		out.Deliveries = append(out.Deliveries, one)
	}
	return out
}
