package server_test

import (
	"context"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/liulinhuai/phone-number-service/internal/server"
	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/store"
	"github.com/liulinhuai/phone-number-service/internal/testutil"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servertest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// A swapCounter counts the swaps that were applied.
type swapCounter struct {
	verify.Store
	done *atomic.Int64
}

func (s swapCounter) Swap(ctx context.Context, n verify.Number, old verify.Version, next verify.Record) (bool, error) {
	done, err := s.Store.Swap(ctx, n, old, next)
	if done {
		s.done.Add(1)
	}
	return done, err
}

// A fleet is a group of replicas of one service.
type fleet struct {
	replicas []*servertest.Replica
	fake     *dysmsapitest.Server
	swaps    atomic.Int64
}

func startFleet(t *testing.T, databases []*store.DB, attemptLimit int) *fleet {
	f := &fleet{fake: dysmsapitest.New(t)}
	sender := aliyun(t, f.fake)
	for _, db := range databases {
		f.replicas = append(f.replicas, servertest.Start(t, db, sender, func(c *server.Config) {
			c.Verifier.Rules.AttemptLimit = attemptLimit
			c.Verifier.Store = swapCounter{db, &f.swaps}
		}))
	}
	return f
}

func (f *fleet) any(i int) *servertest.Replica { return f.replicas[i%len(f.replicas)] }

// race checks all guesses at the same time on all replicas. It returns the number of valid
// ones.
func (f *fleet) race(t *testing.T, number string, guesses []string) int {
	t.Helper()
	var valid atomic.Int64
	var calls sync.WaitGroup
	begin := make(chan struct{})
	for i, code := range guesses {
		calls.Go(func() {
			<-begin
			res, err := f.any(i).Valid(t.Context(), &pb.ValidRequest{PhoneNumber: number, Code: code})
			if err != nil {
				t.Errorf("Valid: %v", err)
			}
			if res.GetValid() {
				valid.Add(1)
			}
		})
	}
	close(begin)
	calls.Wait()
	return int(valid.Load())
}

func TestValid_OneOf64RightCodesSucceeds(t *testing.T) {
	onBothStores(t, func(t *testing.T, databases []*store.DB) {
		f := startFleet(t, databases, 3)
		for range 20 {
			number := servertest.FreshNumber()
			f.any(0).MustSend(t, number)
			code := f.fake.LastCode(t, number)
			guesses := make([]string, 64)
			for i := range guesses {
				guesses[i] = code
			}
			if won := f.race(t, number, guesses); won != 1 {
				t.Fatalf("64 right codes: got %d valid; want 1", won)
			}
		}
	})
}

func TestValid_CountsWrongCodesUpToTheLimit(t *testing.T) {
	onBothStores(t, func(t *testing.T, databases []*store.DB) {
		for _, c := range []struct{ limit, counted int }{{3, 3}, {1, 1}, {100, 64}} {
			f := startFleet(t, databases, c.limit)
			for range 10 {
				number := servertest.FreshNumber()
				f.any(0).MustSend(t, number)
				code := f.fake.LastCode(t, number)
				guesses := make([]string, 64)
				for i := range guesses {
					guesses[i] = wrong(code, i)
				}
				before := f.swaps.Load()
				if won := f.race(t, number, guesses); won != 0 {
					t.Fatalf("limit %d: got %d wrong codes valid; want 0", c.limit, won)
				}
				if got := f.swaps.Load() - before; got != int64(c.counted) {
					t.Fatalf("limit %d: counted wrong codes: got %d of 64; want %d", c.limit, got, c.counted)
				}
				if got, want := f.any(1).IsValid(t, number, code), c.limit > 64; got != want {
					t.Fatalf("limit %d: the right code after 64 wrong ones: got %v; want %v", c.limit, got, want)
				}
			}
		}
	})
}

// 60 parallel guesses, one of them right, get three attempts: one round in twenty succeeds.
// A service that compares first and counts later succeeds in more than a third of the rounds,
// although each code still succeeds only once.
func TestValid_ParallelGuessesHaveFairOdds(t *testing.T) {
	onBothStores(t, func(t *testing.T, databases []*store.DB) {
		f := startFleet(t, databases, 3)
		const rounds = 200
		won := 0
		for range rounds {
			number := servertest.FreshNumber()
			f.any(0).MustSend(t, number)
			code := f.fake.LastCode(t, number)
			guesses := []string{code}
			for i := range 59 {
				guesses = append(guesses, wrong(code, i))
			}
			mathrand.Shuffle(len(guesses), func(i, j int) { guesses[i], guesses[j] = guesses[j], guesses[i] })
			won += f.race(t, number, guesses)
		}
		t.Logf("%d of %d rounds succeeded; 10 are expected", won, rounds)
		if won < 1 || won > 25 { // chance exceeds each bound once in 20,000 runs
			t.Errorf("rounds that succeeded: got %d of %d; want about 10", won, rounds)
		}
	})
}

// sendInParallel makes 30 parallel sends. It returns the numbers of successful ones and of those
// that Aliyun rejected. The others sent nothing: too many sends at once, or a slow disk.
func (f *fleet) sendInParallel(t *testing.T, number string) (sent, rejected int64) {
	t.Helper()
	var ok, limited atomic.Int64
	var calls sync.WaitGroup
	for i := range 30 {
		calls.Go(func() {
			_, err := f.any(i).SendSMS(t.Context(), servertest.SendRequest(number))
			switch status.Code(err) {
			case codes.OK:
				ok.Add(1)
			case codes.ResourceExhausted:
				limited.Add(1)
			case codes.Aborted, codes.Unavailable:
			default:
				t.Errorf("SendSMS: %v", err)
			}
		})
	}
	calls.Wait()
	return ok.Load(), limited.Load()
}

func TestSendSMS_CodeOfParallelSendsIsValid(t *testing.T) {
	onBothStores(t, func(t *testing.T, databases []*store.DB) {
		f := startFleet(t, databases, 3)
		f.fake.Limits(true)
		for range 20 {
			number := servertest.FreshNumber()
			if sent, _ := f.sendInParallel(t, number); sent != 1 {
				t.Fatalf("successful sends: got %d of 30; want 1", sent)
			}
			if !f.any(1).IsValid(t, number, f.fake.LastCode(t, number)) {
				t.Fatal("the sent code: got invalid; want valid")
			}
		}
	})
}

func TestSend_ManyRejectedSendsKeepTheLiveCode(t *testing.T) {
	onBothStores(t, func(t *testing.T, databases []*store.DB) {
		f := startFleet(t, databases, 3)
		f.fake.Limits(true)
		for range 20 {
			number := servertest.FreshNumber()
			f.any(0).MustSend(t, number)
			var rejected int64
			testutil.Eventually(t, "Aliyun rejected 45 sends", func() bool {
				sent, more := f.sendInParallel(t, number)
				if sent != 0 {
					t.Fatalf("successful sends within the minute: got %d of 30; want 0", sent)
				}
				rejected += more
				return rejected >= 45
			})
			if !f.any(1).IsValid(t, number, f.fake.LastCode(t, number)) {
				t.Fatal("the live code after rejected sends: got invalid; want valid")
			}
		}
	})
}
