package cli

import (
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/liulinhuai/phone-number-service/internal/telemetry"
)

// lastLinesTimeout bounds the time for the last lines when the process ends.
const lastLinesTimeout = time.Second

// process has the values of the process that commands use. Its stdout and stderr are writers that
// never block, so that a stopped or closed reader blocks no call and no exit.
type process struct {
	version        string
	stdout, stderr *telemetry.Lines
	dropped        prometheus.Counter
}

func newProcess(version string) process {
	dropped := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "phonenumber_log_lines_dropped_total", Help: "Log lines that were not written: their reader is too slow, or gone, or the disk is full.",
	})
	p := process{version: version, stderr: telemetry.NewLines(os.Stderr, dropped), dropped: dropped}
	if sameFile(os.Stdout, os.Stderr) {
		p.stdout = p.stderr // keeps the order of lines
	} else {
		p.stdout = telemetry.NewLines(os.Stdout, dropped)
	}
	return p
}

func sameFile(a, b *os.File) bool {
	one, err := a.Stat()
	other, otherErr := b.Stat()
	return err == nil && otherErr == nil && os.SameFile(one, other)
}

// exit writes the last lines and ends the process.
func (p process) exit(code int) {
	p.stdout.Flush(lastLinesTimeout)
	p.stderr.Flush(lastLinesTimeout)
	os.Exit(code)
}
