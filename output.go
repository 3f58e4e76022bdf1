package main

import (
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

// lastLinesTimeout bounds the time for the last lines when the process ends.
const lastLinesTimeout = time.Second

// output wraps stdout and stderr in writers that never block, so that a stopped or closed reader
// blocks no call and no exit.
type output struct {
	stdout, stderr *telemetry.Lines
	dropped        prometheus.Counter
}

func newOutput() output {
	dropped := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "phonenumber_log_lines_dropped_total", Help: "Log lines that were not written: their reader is too slow, or gone, or the disk is full.",
	})
	o := output{stderr: telemetry.NewLines(os.Stderr, dropped), dropped: dropped}
	if sameFile(os.Stdout, os.Stderr) {
		o.stdout = o.stderr // keeps the order of lines
	} else {
		o.stdout = telemetry.NewLines(os.Stdout, dropped)
	}
	return o
}

func sameFile(a, b *os.File) bool {
	one, err := a.Stat()
	other, otherErr := b.Stat()
	return err == nil && otherErr == nil && os.SameFile(one, other)
}

// exit writes the last lines and ends the process.
func (o output) exit(code int) {
	o.stdout.Flush(lastLinesTimeout)
	o.stderr.Flush(lastLinesTimeout)
	os.Exit(code)
}
