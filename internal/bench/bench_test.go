package bench

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"

	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
)

var (
	numbers     = flag.Int("numbers", 1_000_000, "number of rows in the table")
	rounds      = flag.Int("rounds", 5, "number of rounds; the tables have the median")
	span        = flag.Duration("span", 2*time.Second, "duration of one measurement")
	levels      = flag.String("callers", "1,16,64,256", "numbers of concurrent callers")
	connections = flag.Int("connections", 10_000, "number of idle connections")
	soak        = flag.Duration("soak", 0, "how long BenchmarkSoak lasts")
	profile     = flag.String("profile", "", "file for a CPU profile of the flows; each number of callers overwrites it")
)

func TestMain(m *testing.M) {
	flag.Parse()
	debug.SetGCPercent(400) // reduces the load's own GC
	if *profile != "" {
		path, _ := filepath.Abs(*profile)
		os.Setenv("CPU_PROFILE", path)
	}
	code := mysqltest.Run(m)
	if path, err := build(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// TestBenchmarks_AllRun runs each benchmark for a moment, so that a change that breaks one is
// noticed.
func TestBenchmarks_AllRun(t *testing.T) {
	for name, value := range map[string]string{
		"numbers": "20000", "rounds": "1", "span": "20ms", "callers": "1,16", "connections": "100",
		"soak": "100ms",
	} {
		before := flag.Lookup(name).Value.String()
		flag.Set(name, value)
		defer flag.Set(name, before)
	}
	for name, run := range map[string]func(*testing.B){
		"Service": BenchmarkService, "Engines": BenchmarkEngines, "Growth": BenchmarkGrowth, "OpenLoop": BenchmarkOpenLoop,
		"Purge": BenchmarkPurge, "Connections": BenchmarkConnections, "SQLite": BenchmarkSQLite, "Start": BenchmarkStart, "Soak": BenchmarkSoak,
	} {
		ok := true
		testing.Benchmark(func(b *testing.B) {
			if b.N == 1 {
				defer func() { ok = !b.Failed() }() // also after FailNow
				run(b)
			}
		})
		if !ok {
			t.Errorf("Benchmark%s: got a failure; want success", name)
		}
	}
}

// A row is a row of the printed table, with the values of each round.
type row struct {
	name                             string
	perSecond, ratio, p50, p99, p999 []float64
	service, database, load          []float64 // µs of CPU per operation
	flushes, statements              []float64 // per row written
	written                          []float64 // rows per operation
}

func (r *row) add(s measurement, c cost, ceiling, writes float64) {
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
	r.flushes = append(r.flushes, c.flushes/c.written)
	r.statements = append(r.statements, c.statements/c.written)
	r.written = append(r.written, c.written/n)
}

// measured runs load, and returns its result and the cost of the processes meanwhile.
func (s *system) measured(load func() measurement) (measurement, cost) {
	before := s.cost()
	result := load()
	return result, s.cost().since(before)
}

func printTable(rows []*row) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\t/s\tof the ceiling\tp50 ms\tp99\tp99.9\tCPU µs: service\tdatabase\tload\tflushes/row\tstatements/row\trows written\t")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%.0f\t%.2f\t%.2f\t%.2f\t%.2f\t%.0f\t%.0f\t%.0f\t%.3f\t%.2f\t%.2f\t\n", r.name,
			median(r.perSecond), median(r.ratio), median(r.p50), median(r.p99), median(r.p999),
			median(r.service), median(r.database), median(r.load), median(r.flushes), median(r.statements), median(r.written))
	}
	w.Flush()
}

// callers returns the numbers of -callers.
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

// checks returns the number of codes for one measurement of Valid. They are sent before it.
func checks(callers int) int {
	return int(span.Seconds() * 1000 * min(4, float64(callers)))
}

// BenchmarkGrowth compares a table of ten thousand numbers with a table of -numbers.
func BenchmarkGrowth(b *testing.B) {
	server := startServer(b, mysqltest.DefaultEngine(b), *numbers)
	var rows []*row
	var systems []*system
	for _, n := range []int{10_000, *numbers} {
		systems = append(systems, onServer(b, server, fmt.Sprint("numbers", n), n, 1))
		rows = append(rows, &row{name: fmt.Sprintf("flows, %d numbers", n)}, &row{name: "Valid"})
	}
	for range *rounds {
		for i, s := range systems {
			result, c := s.measured(func() measurement { return s.flows(64, *span, s.replicas[0], callersPerConnection) })
			rows[2*i].add(result, c, 0, 2)
			sent := s.sent(checks(64), s.replicas[0])
			result, c = s.measured(func() measurement { return s.valids(64, sent, s.replicas[0], callersPerConnection) })
			rows[2*i+1].add(result, c, 0, 1)
		}
	}
	printTable(rows)
}

// BenchmarkOpenLoop calls Valid at random times (open loop), at 70 % of the maximum rate. In an
// open loop a slow call does not delay the next ones; in a closed loop it does.
func BenchmarkOpenLoop(b *testing.B) {
	s := onNewServer(b, *numbers, 1)
	r := s.replicas[0]
	raw, closed, open := &row{name: "raw UPDATE, 64 callers"}, &row{name: "Valid, 64 callers"}, &row{name: "Valid, open loop at 70 %"}
	var ratios []float64
	for range *rounds {
		ceiling, c := s.measured(func() measurement { return s.raw(64, *span) })
		raw.add(ceiling, c, ceiling.perSecond, 1)
		sent := s.sent(checks(64), r)
		capacity, c := s.measured(func() measurement { return s.valids(64, sent, r, callersPerConnection) })
		closed.add(capacity, c, ceiling.perSecond, 1)
		sent = s.sent(int(capacity.perSecond*span.Seconds())+1, r) // 70 %, and a margin for chance
		var n atomic.Int64
		result, c := s.measured(func() measurement {
			return openLoop(b, 0.7*capacity.perSecond, len(sent), *span, func(ctx context.Context, caller int) error {
				return s.valid(ctx, r.client(b, caller, callersPerConnection), sent[n.Add(1)-1])
			})
		})
		open.add(result, c, ceiling.perSecond, 1)
		ratios = append(ratios, float64(result.quantile(0.99))/float64(ceiling.quantile(0.5)))
	}
	printTable([]*row{raw, closed, open})
	fmt.Printf("p99 of the open loop is %.1f × the p50 of the raw statement\n", median(ratios))
}

// BenchmarkPurge compares Valid without and during a purge of as many numbers as a tenth of the
// table. Valid is called in an open loop, at half of the maximum rate.
func BenchmarkPurge(b *testing.B) {
	s := onNewServer(b, *numbers, 1)
	s.insert(`INSERT INTO phone_numbers (phone_number, version, begun_at, state)
		SELECT CONCAT('+1', 2000000000 + seq), UNHEX(LEFT(SHA2(seq, 256), 32)), 1500000000000000 + seq, UNHEX(SHA2(seq, 512))`, *numbers/10)
	retention := time.Since(time.UnixMicro(1600000000000000)) // older than the new rows only
	r := s.replicas[0]
	purger, err := store.Open(s.dsn)
	if err != nil {
		b.Fatal(err)
	}
	defer purger.Close()
	if err := purger.Prepare(b.Context()); err != nil {
		b.Fatal(err)
	}
	rate := s.valids(64, s.sent(checks(64), r), r, callersPerConnection).perSecond / 2
	measure := func(to *row) float64 {
		sent := s.sent(int(rate*span.Seconds()*1.2)+1000, r)
		var n atomic.Int64
		result, c := s.measured(func() measurement {
			return openLoop(b, rate, len(sent), *span, func(ctx context.Context, caller int) error {
				return s.valid(ctx, r.client(b, caller, callersPerConnection), sent[n.Add(1)-1])
			})
		})
		to.add(result, c, 0, 1)
		return float64(result.quantile(0.99))
	}
	quiet, purging := &row{name: "Valid"}, &row{name: "Valid, while rows are purged"}
	var ratios []float64
	var purged int64
	var busy time.Duration
	for complete := false; !complete; {
		alone := measure(quiet)
		s.exec("UPDATE phone_numbers SET begun_at = 0 WHERE phone_number = 'purge'") // the purge is due
		ctx, stop := context.WithCancel(b.Context())
		rows := make(chan int64)
		start := time.Now()
		go func() {
			n, err := purger.Purge(ctx, retention)
			if complete = err == nil; !complete && ctx.Err() == nil {
				b.Error(err)
			}
			rows <- n
		}()
		ratios = append(ratios, measure(purging)/alone)
		stop()
		purged += <-rows
		busy += time.Since(start)
	}
	printTable([]*row{quiet, purging})
	fmt.Printf("%d rows purged, %.0f/s; p99 of Valid during the purge is %.2f × that without it (median of %d; %.2f to %.2f)\n",
		purged, float64(purged)/busy.Seconds(), median(ratios), len(ratios), slices.Min(ratios), slices.Max(ratios))
}

// BenchmarkConnections compares 256 callers with one connection each with 64 callers that share
// one. It then measures the memory of -connections idle connections.
func BenchmarkConnections(b *testing.B) {
	s := onNewServer(b, *numbers, 1)
	r := s.replicas[0]
	shared, own := &row{name: "flows, 64 callers on a connection"}, &row{name: "256 callers on 256 connections"}
	for range *rounds {
		result, c := s.measured(func() measurement { return s.flows(64, *span, r, 64) })
		shared.add(result, c, 0, 2)
		ownConns := &replica{Process: r.Process}
		result, c = s.measured(func() measurement { return s.flows(256, *span, ownConns, 1) })
		own.add(result, c, 0, 2)
		ownConns.closeConns()
	}
	printTable([]*row{shared, own})

	idle := s.startOne(s.dsn, fmt.Sprintf("PHONENUMBER_MAX_CONNECTIONS=%d", 2**connections))
	before := memory(b, idle.PID)
	for i := range *connections {
		idle.client(b, i, 1)
	}
	inParallel(b, 64, func(ctx context.Context, _ time.Time, caller int, _ func(time.Time)) error {
		for i := caller; i < *connections; i += 64 {
			if _, err := idle.client(b, i, 1).Valid(ctx, &pb.ValidRequest{PhoneNumber: phoneNumber(0), Code: "000000"}); err != nil {
				return err
			}
		}
		return nil
	})
	fmt.Printf("%d idle connections: %.0f MiB; without them %.0f MiB\n", *connections, memory(b, idle.PID), before)
}

// BenchmarkSQLite compares the service on an SQLite file with the disk alone: writes of one page,
// each flushed before the next.
func BenchmarkSQLite(b *testing.B) {
	s := onSQLite(b, *numbers)
	r := s.replicas[0]
	var rows []*row
	for _, n := range callers(b) {
		disk, flow := &row{name: "write and fdatasync, in turn"}, &row{name: "flows, × 2"}
		check := &row{name: fmt.Sprintf("Valid, %d callers", n)}
		for range *rounds {
			ceiling, c := s.measured(func() measurement { return s.flushes(*span) })
			disk.add(ceiling, c, ceiling.perSecond, 1)
			sent := s.sent(checks(n), r)
			result, c := s.measured(func() measurement { return s.valids(n, sent, r, callersPerConnection) })
			check.add(result, c, ceiling.perSecond, 1)
			result, c = s.measured(func() measurement { return s.flows(n, *span, r, callersPerConnection) })
			flow.add(result, c, ceiling.perSecond, 2)
		}
		rows = append(rows, disk, check, flow)
	}
	printTable(rows)
}

// BenchmarkStart measures a new process on SQLite: the time to its first response, its memory,
// and the size of the program.
func BenchmarkStart(b *testing.B) {
	s := &system{b: b, sink: newSink(b, 1)}
	var first, resident []float64
	for range *rounds {
		dsn := "sqlite:" + filepath.Join(b.TempDir(), "codes.db")
		start := time.Now()
		r := s.startOne(dsn)
		if _, err := r.Valid(b.Context(), &pb.ValidRequest{PhoneNumber: phoneNumber(0), Code: "000000"}); err != nil {
			b.Fatal(err)
		}
		first = append(first, float64(time.Since(start).Microseconds())/1000)
		resident = append(resident, memory(b, r.PID))
		r.Kill()
	}
	info, err := os.Stat(buildOnce(b))
	if err != nil {
		b.Fatal(err)
	}
	fmt.Printf("start to first response %.0f ms; resident memory %.0f MiB; binary %.1f MB\n", median(first), median(resident), float64(info.Size())/1e6)
}

// BenchmarkSoak runs flows at half of the maximum rate for the time of -soak. Memory, connections
// and goroutines must not grow.
func BenchmarkSoak(b *testing.B) {
	if *soak == 0 {
		b.Skip("needs a duration: make soak, or -soak 10m")
	}
	s := onNewServer(b, *numbers, 1)
	r := s.replicas[0]
	flow := func(ctx context.Context, caller int) error {
		client := r.client(b, caller, callersPerConnection)
		i, err := s.send(ctx, client)
		if err != nil {
			return err
		}
		return s.valid(ctx, client, i)
	}
	rate := closedLoop(b, 64, unbounded, *span, flow).perSecond / 2
	fmt.Printf("%.0f flows/s\n", rate)
	const parts = 10
	for part := range parts {
		result := openLoop(b, rate, unbounded, *soak/parts, flow)
		fmt.Printf("%v: %.0f/s, p99 %v, resident %.0f MiB, %d threads, %d open files\n", (*soak/parts)*time.Duration(part+1),
			result.perSecond, result.quantile(0.99).Round(time.Microsecond), memory(b, r.PID), status(b, r.PID, "Threads"), s.openFiles(r))
	}
	fmt.Printf("goroutines afterwards: %d\n", r.goroutines(b))
}

// BenchmarkService measures SendSMS, Valid and flows. Each round begins with a measurement of the raw
// statement. The two rows of Valid differ in the replica that sent the codes.
func BenchmarkService(b *testing.B) {
	s := onNewServer(b, *numbers, 2)
	r, other := s.replicas[0], s.replicas[1]
	var rows []*row
	for _, n := range callers(b) {
		raw, send, flow := &row{name: fmt.Sprint("raw UPDATE, callers: ", n)}, &row{name: "SendSMS"}, &row{name: "flows, × 2"}
		own, others := &row{name: "Valid, same replica"}, &row{name: "Valid, another replica"}
		for range *rounds {
			ceiling, c := s.measured(func() measurement { return s.raw(n, *span) })
			raw.add(ceiling, c, ceiling.perSecond, 1)
			var sent []int
			result, c := s.measured(func() (result measurement) {
				sent, result = s.sends(n, checks(n), r)
				return result
			})
			send.add(result, c, ceiling.perSecond, 1)
			result, c = s.measured(func() measurement { return s.valids(n, sent, r, callersPerConnection) })
			own.add(result, c, ceiling.perSecond, 1)
			sent = s.sent(checks(n), other)
			result, c = s.measured(func() measurement { return s.valids(n, sent, r, callersPerConnection) })
			others.add(result, c, ceiling.perSecond, 1)
			profiled(r, func() {
				result, c = s.measured(func() measurement { return s.flows(n, *span, r, callersPerConnection) })
			})
			flow.add(result, c, ceiling.perSecond, 2)
		}
		rows = append(rows, raw, send, own, others, flow)
	}
	printTable(rows)
	fmt.Printf("resident memory afterwards: %.0f MiB\n", memory(b, r.PID))
}

// BenchmarkEngines compares MySQL with MariaDB at 64 callers. The servers take turns, with their own
// defaults: MySQL has a binary log, and MariaDB has none.
func BenchmarkEngines(b *testing.B) {
	type subject struct {
		*system
		raw, flow *row
	}
	var subjects []*subject
	var rows []*row
	for _, c := range []struct {
		name   string
		engine *mysqltest.Engine
		args   []string
	}{
		{"MariaDB", mysqltest.MariaDB, nil},
		{"MySQL", mysqltest.MySQL, nil},
		{"MySQL without a binary log", mysqltest.MySQL, []string{"--skip-log-bin"}},
	} {
		s := onServer(b, startServer(b, c.engine, *numbers, c.args...), mysqltest.Database, *numbers, 1)
		one := &subject{s, &row{name: c.name + ": raw UPDATE"}, &row{name: "flows"}}
		subjects, rows = append(subjects, one), append(rows, one.raw, one.flow)
	}
	for range *rounds {
		for _, s := range subjects {
			ceiling, c := s.measured(func() measurement { return s.system.raw(64, *span) })
			s.raw.add(ceiling, c, ceiling.perSecond, 1)
			flows, c := s.measured(func() measurement { return s.flows(64, *span, s.replicas[0], callersPerConnection) })
			s.flow.add(flows, c, ceiling.perSecond, 1)
		}
	}
	printTable(rows)
	base := subjects[0]
	for _, s := range subjects[1:] {
		fmt.Printf("%s is %.2f of MariaDB's; flows are %.2f, with %.2f of its CPU\n", s.raw.name,
			median(s.raw.perSecond)/median(base.raw.perSecond), median(s.flow.perSecond)/median(base.flow.perSecond),
			median(s.flow.database)/median(base.flow.database))
	}
}
