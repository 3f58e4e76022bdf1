package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/config"
)

type forgetCommand struct {
	config.Rules
	Number string `arg:"" help:"Phone number, in any form that SendSMS accepts."`
}

// Run prints the content of the deleted record to stdout, and a line for an audit log to stderr. This
// line has no part of the number.
func (c *forgetCommand) Run(ctx context.Context, p process, errs []error) error {
	v, db, n, err := openForNumber(ctx, c.Rules, c.Number, errs)
	if err != nil {
		return err
	}
	defer db.Close()
	log := slog.New(slog.NewJSONHandler(p.stderr, nil))
	held, deleted, err := v.Forget(ctx, n, db, func(left time.Duration) {
		log.Info("waiting until no send to the number can be in flight", "seconds", left.Round(time.Second).Seconds())
	})
	if err != nil {
		return fmt.Errorf("failed to forget the number: %w", err)
	}
	r := newReport(v, n, held)
	r.print(os.Stdout)
	log.Info("forgot a number", "record_deleted", deleted, "live_codes", len(held.Live), "keyed_sends", held.Keyed)
	return nil
}
