package bench

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
)

var (
	numbers = flag.Int("numbers", 1_000_000, "rows of the table")
	rounds  = flag.Int("rounds", 5, "of which the median is told")
	span    = flag.Duration("span", 2*time.Second, "of one measurement")
	levels  = flag.String("callers", "1,16,64,256", "at once")
	profile = flag.String("profile", "", "file for a CPU profile of the flows, each level overwriting the last")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if *profile != "" {
		path, _ := filepath.Abs(*profile)
		os.Setenv("CPU_PROFILE", path)
	}
	code := mariadbtest.Run(m)
	if path, err := build(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// A row of the table holds what each round gave.
type row struct {
	what                             string
	perSecond, ratio, p50, p99, p999 []float64
	service, database, load          []float64 // µs of CPU an operation
	flushes, loads                   []float64 // a swap
}

func (r *row) add(s stretch, c cost, ceiling, writes float64) {
	r.perSecond = append(r.perSecond, s.perSecond)
	if ceiling > 0 {
		r.ratio = append(r.ratio, s.perSecond*writes/ceiling)
	}
	for q, to := range map[float64]*[]float64{0.5: &r.p50, 0.99: &r.p99, 0.999: &r.p999} {
		*to = append(*to, float64(s.quantile(q).Microseconds())/1000)
	}
	n := float64(len(s.latencies))
	r.service = append(r.service, float64(c.service.Microseconds())/n)
	r.database = append(r.database, float64(c.database.Microseconds())/n)
	r.load = append(r.load, float64(c.load.Microseconds())/n)
	r.flushes = append(r.flushes, c.flushes/c.swaps)
	r.loads = append(r.loads, c.loads/c.swaps)
}

func (s *system) measured(load func() stretch) (stretch, cost) {
	before := s.cost()
	result := load()
	return result, s.cost().since(before)
}

func printTable(rows []*row) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\t/s\tof the ceiling\tp50 ms\tp99\tp99.9\tCPU µs: service\tdatabase\tload\tflushes/swap\tloads/swap\t")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%.0f\t%.2f\t%.2f\t%.2f\t%.2f\t%.0f\t%.0f\t%.0f\t%.3f\t%.2f\t\n", r.what,
			median(r.perSecond), median(r.ratio), median(r.p50), median(r.p99), median(r.p999),
			median(r.service), median(r.database), median(r.load), median(r.flushes), median(r.loads))
	}
	w.Flush()
}

func callers(b *testing.B) (list []int) {
	for text := range strings.SplitSeq(*levels, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			b.Fatalf("-callers is %q; it must be numbers such as 1,16,64", *levels)
		}
		list = append(list, n)
	}
	return list
}

// checks is how many codes one measurement of Valid takes, which have to be sent
// before it.
func checks(callers int) int {
	return int(span.Seconds() * 1000 * min(4, float64(callers)))
}

// BenchmarkService measures Valid on the replica that sent (warm) and on another
// one (cold), and flows, between measurements of the raw statement.
func BenchmarkService(b *testing.B) {
	s := onMariaDB(b, *numbers, 2)
	here, there := s.replicas[0], s.replicas[1]
	var rows []*row
	for _, n := range callers(b) {
		raw, warm, cold, flow := &row{what: fmt.Sprint("raw UPDATE, callers: ", n)}, &row{what: "Valid, warm"}, &row{what: "Valid, cold"}, &row{what: "flows, × 3"}
		for range *rounds {
			ceiling, c := s.measured(func() stretch { return s.raw(n, *span) })
			raw.add(ceiling, c, ceiling.perSecond, 1)
			for by, r := range map[*replica]*row{here: warm, there: cold} {
				sent := s.sent(checks(n), here)
				result, c := s.measured(func() stretch { return s.valids(n, sent, by, callersOnAConnection) })
				r.add(result, c, ceiling.perSecond, 1)
			}
			var result stretch
			profiled(here, func() {
				result, c = s.measured(func() stretch { return s.flows(n, *span, here, callersOnAConnection) })
			})
			flow.add(result, c, ceiling.perSecond, 3)
		}
		rows = append(rows, raw, warm, cold, flow)
	}
	printTable(rows)
	fmt.Printf("resident memory afterwards: %.0f MiB, and %.0f MiB\n", memory(b, here.PID), memory(b, there.PID))
}
