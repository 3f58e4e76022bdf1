package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/config"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

type inspectCommand struct {
	config.Rules
	Number string `arg:"" help:"Phone number, in any form that SendSMS accepts."`
}

func (c *inspectCommand) Run(ctx context.Context, errs []error) error {
	db, err := openConfigured(errs)
	if err != nil {
		return err
	}
	defer db.Close()
	rules, numbers := c.ForVerify()
	n, invalid := numbers.Parse(c.Number)
	if invalid != nil {
		return invalid
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := db.PrepareToRead(ctx); err != nil {
		return fmt.Errorf("DATA_SOURCE_NAME: %w", err)
	}
	found, err := verify.New(verify.Config{Rules: rules, Store: db, Now: time.Now}).Inspect(ctx, n)
	if err != nil {
		return err
	}
	printInspection(os.Stdout, n, rules, found, time.Now())
	return nil
}

// printInspection prints the state of a number. It never prints a code.
func printInspection(w io.Writer, n verify.Number, rules verify.Rules, found verify.Inspection, now time.Time) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-10s %s\n", label, fmt.Sprintf(format, args...))
	}
	at := func(t time.Time) string {
		if t.After(now) {
			return fmt.Sprintf("%s (in %v)", t.Format(time.RFC3339), t.Sub(now).Round(time.Second))
		}
		return fmt.Sprintf("%s (%v ago)", t.Format(time.RFC3339), now.Sub(t).Round(time.Second))
	}
	line("number", "%s", n.Masked())
	if found.LastSendID == 0 {
		line("last send", "none: nothing was sent to this number, or its row was purged")
		return
	}
	line("last send", "%s, send ID %d", at(found.BegunAt), found.LastSendID)
	accepted, rejected, end := found.History.Accepted, found.History.Rejected, found.History.End
	ofEarlierSend := func(sendID int64) string {
		if sendID == found.LastSendID {
			return ""
		}
		return fmt.Sprintf(" (of an earlier send, send ID %d)", sendID)
	}
	if accepted.SendID != found.LastSendID && rejected.SendID != found.LastSendID {
		if now.Sub(found.BegunAt) < time.Minute {
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
	for _, c := range found.Live {
		answer := "accepted by Aliyun"
		if !c.Accepted {
			answer = "Aliyun's answer not known"
		}
		line("code", "live until %s, %d of %d attempts used, %s%s", at(c.Expires), rules.AttemptLimit-c.AttemptsLeft, rules.AttemptLimit, answer, ofEarlierSend(c.SendID))
	}
	if len(found.Live) == 0 {
		line("code", "no live code")
	}
	if expires := found.BegunAt.Add(rules.CodeTTL); accepted.SendID == found.LastSendID && end.SendID != found.LastSendID &&
		!now.Before(expires) {
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
