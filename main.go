// Command phone-number-service verifies that a person holds a phone number; see README.md.
package main

import (
	"os"
	"runtime/debug"

	"github.com/liulinhuai/phone-number-service/internal/cli"
)

var version string // set by the release build

func main() {
	if os.Getenv("GOGC") == "" {
		// The default of 100 costs 10 % of the throughput on this small heap. 400 lets a hostile
		// client push memory use over 100 MB (docs/performance.md).
		debug.SetGCPercent(200)
	}
	if info, ok := debug.ReadBuildInfo(); version == "" && ok {
		version = info.Main.Version
	}
	cli.Main(version)
}
