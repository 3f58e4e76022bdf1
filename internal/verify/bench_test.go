package verify

import (
	"crypto/rand"
	"log/slog"
	"testing"
	"time"
)

func BenchmarkParse(b *testing.B) {
	p := NumberParser{Region: "CN", Plan: func(string, string) (string, bool) { panic("called for a mainland number") }}
	for _, raw := range []string{"18612345678", "+86 186-1234-5678"} {
		b.Run(raw, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if n, err := p.Parse(raw); err != nil || n != testNumber {
					b.Fatal(n, err)
				}
			}
		})
	}
}

func BenchmarkNewCode(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := newCode(rand.Reader); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMAC(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		testKeys.sign(testNumber, "123456", "")
	}
}

func BenchmarkState(b *testing.B) {
	s, _, err := testRules.Begin(State{}, newSend(stored("123456")), now())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.encode()
		}
	})
	encoded := s.encode()
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, _, err := decodeRecord(encoded); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("check", func(b *testing.B) {
		b.ReportAllocs()
		macs, now := []MAC{stored("654321")}, now()
		for b.Loop() {
			if _, valid, changed := testRules.Check(s, macs, nil, now); valid || !changed {
				b.Fatal(valid, changed)
			}
		}
	})
}

// BenchmarkCheck measures the domain without the cost of a store and a provider.
func BenchmarkCheck(b *testing.B) {
	var m fakeStore
	v := New(Config{
		Rules: Rules{AttemptLimit: MaxAttemptLimit, CodeTTL: MaxCodeTTL}, Keys: testKeys, Store: &m, Now: time.Now,
		Log: slog.New(slog.DiscardHandler),
	})
	sent(b, &m, "123456")
	fresh := m.record
	b.ReportAllocs()
	for b.Loop() {
		m.record, m.history = fresh, nil
		if valid, err := isValid(b.Context(), v, testNumber, "123456"); !valid || err != nil {
			b.Fatal(valid, err)
		}
	}
}
