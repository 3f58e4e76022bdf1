package bench

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const firstNumber = 13_000_000_000 // a mobile number in mainland China; the first of the table

// A sink is a fake of Aliyun's SendSms with very low CPU cost. It accepts every SMS and keeps each
// number's newest code.
type sink struct {
	url   string
	codes []atomic.Uint32 // by number: the code plus one
}

func newSink(b testing.TB, numbers int) *sink {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { listener.Close() })
	s := &sink{"http://" + listener.Addr().String(), make([]atomic.Uint32, numbers)}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go s.serve(conn)
		}
	}()
	return s
}

func (s *sink) serve(conn net.Conn) {
	const reply = `{"Code":"OK","Message":"OK","BizId":"900619746936498440^0","RequestId":"F655A8D5-B967-440B-8683-DAD6FF8DE990"}`
	response := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(reply), reply)
	defer conn.Close()
	for lines := bufio.NewReader(conn); ; {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			return
		}
		s.keep(line)
		for len(line) > len("\r\n") && err == nil { // the rest of a request without a body
			line, err = lines.ReadSlice('\n')
		}
		if _, err := conn.Write(response); err != nil {
			return
		}
	}
}

// keep takes number and code from a request's first line.
func (s *sink) keep(line []byte) {
	number, _ := strconv.Atoi(string(after(line, "PhoneNumbers=", 11)))
	code, _ := strconv.Atoi(string(after(line, "%22code%22%3A%22", 6)))
	s.codes[number-firstNumber].Store(uint32(code) + 1)
}

func after(line []byte, mark string, length int) []byte {
	_, rest, _ := bytes.Cut(line, []byte(mark))
	return rest[:length]
}

func (s *sink) code(i int) string { return fmt.Sprintf("%06d", s.codes[i].Load()-1) }

// A measurement has the rate and the latencies of one run of a load.
type measurement struct {
	perSecond float64
	latencies []time.Duration // sorted
}

func (s measurement) quantile(q float64) time.Duration {
	return s.latencies[min(int(q*float64(len(s.latencies))), len(s.latencies)-1)]
}

// closedLoop runs op in a number of callers, each without a pause, until op ran count times in
// all or span is over. op gets the index of its caller.
func closedLoop(b testing.TB, callers, count int, span time.Duration, op func(ctx context.Context, caller int) error) measurement {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(count))
	return inParallel(b, callers, func(ctx context.Context, start time.Time, caller int, took func(time.Time)) error {
		for left.Add(-1) >= 0 {
			began := time.Now()
			if err := op(ctx, caller); err != nil {
				return err
			}
			took(began)
			if time.Since(start) > span { // after the first op, so that there is a latency
				return nil
			}
		}
		return nil
	})
}

// openLoop starts op at random times at a fixed mean rate, independent of the duration of earlier
// ops, until op started count times or span is over. The time that an op waits for its start is part of
// its latency.
func openLoop(b testing.TB, perSecond float64, count int, span time.Duration, op func(ctx context.Context, caller int) error) measurement {
	b.Helper()
	starts := make(chan time.Time, 1<<16)
	go func() {
		defer close(starts)
		start, due := time.Now(), time.Duration(0)
		for i := 0; i < count && due < span; i++ {
			due += time.Duration(mathrand.ExpFloat64() / perSecond * float64(time.Second))
			time.Sleep(time.Until(start.Add(due)))
			starts <- start.Add(due)
		}
	}()
	const inFlight = 512 // the others wait, which their latency includes
	return inParallel(b, inFlight, func(ctx context.Context, _ time.Time, caller int, took func(time.Time)) error {
		for due := range starts {
			if err := op(ctx, caller); err != nil {
				return err
			}
			took(due)
		}
		return nil
	})
}

// inParallel runs run once for each caller and returns the latencies that they report.
func inParallel(b testing.TB, callers int, run func(ctx context.Context, start time.Time, caller int,
	took func(since time.Time)) error,
) measurement {
	b.Helper()
	var (
		group     sync.WaitGroup
		failed    = make(chan error, callers)
		latencies = make([][]time.Duration, callers)
		start     = time.Now()
	)
	for caller := range callers {
		group.Go(func() {
			took := func(since time.Time) { latencies[caller] = append(latencies[caller], time.Since(since)) }
			if err := run(b.Context(), start, caller, took); err != nil {
				failed <- err
			}
		})
	}
	group.Wait()
	elapsed := time.Since(start)
	close(failed)
	for err := range failed {
		b.Fatal(err)
	}
	s := measurement{latencies: slices.Concat(latencies...)}
	s.perSecond = float64(len(s.latencies)) / elapsed.Seconds()
	slices.Sort(s.latencies)
	return s
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	values = slices.Sorted(slices.Values(values))
	return (values[(len(values)-1)/2] + values[len(values)/2]) / 2
}
