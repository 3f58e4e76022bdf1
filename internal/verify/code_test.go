package verify

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// A code is the number in 20 random bits. If the number is a million or more, new bits are
// drawn. So each of the million codes has exactly one pattern of bits, and all are equally
// likely. The test tries all patterns near an edge, and every seventh between.
func TestNewCode_EveryCodeIsEquallyLikely(t *testing.T) {
	const codes, patterns = 1_000_000, 1 << 20
	random := new(bytes.Reader)
	for pattern := 0; pattern < patterns; pattern++ {
		if edge := pattern % codes; pattern%7 != 0 && edge > 1000 && edge < codes-1000 && pattern < patterns-1000 {
			continue
		}
		want, wantLeft := fmt.Sprintf("%06d", pattern), 3
		if pattern >= codes {
			want, wantLeft = "000007", 0 // the number in the next three bytes
		}
		random.Reset([]byte{byte(pattern >> 16), byte(pattern >> 8), byte(pattern), 0, 0, 7})
		if code, err := newCode(random); err != nil || code != want || random.Len() != wantLeft {
			t.Fatalf("pattern %05x: got %q, %v, %d bytes left, want %s, %d", pattern, code, err, random.Len(), want, wantLeft)
		}
	}
}

func TestNewCode_EveryDigitIsUniform(t *testing.T) {
	const (
		draws          = 100_000
		oneInAThousand = 27.88 // chi-square with nine degrees of freedom
	)
	random := mathrand.NewChaCha8([32]byte{1})
	var counts [6][10]int
	for range draws {
		code, err := newCode(random)
		if err != nil {
			t.Fatal(err)
		}
		for place, digit := range code {
			counts[place][digit-'0']++
		}
	}
	for place, digits := range counts {
		chiSquare := 0.0
		for _, n := range digits {
			chiSquare += math.Pow(float64(n)-draws/10, 2) / (draws / 10)
		}
		if chiSquare > oneInAThousand {
			t.Errorf("digit %d: got chi-square %.1f, want at most %.1f (%v)", place+1, chiSquare, oneInAThousand, digits)
		}
	}
}

func TestNewCode_KeepsLeadingZeros(t *testing.T) {
	for pattern, want := range map[string]string{
		"\x00\x00\x00": "000000", "\x00\x00\x07": "000007", "\xff\x00\x2a": "983082",
		"\xf0\x00\x2a": "000042",
	} {
		if got, err := newCode(strings.NewReader(pattern)); err != nil || got != want {
			t.Errorf("%x: got %q, %v, want %s", pattern, got, err, want)
		}
	}
}

func TestNewCode_FailsWithoutRandomness(t *testing.T) {
	broken := errors.New("no entropy")
	for name, random := range map[string]io.Reader{
		"a failing source":   iotest.ErrReader(broken),
		"a truncated source": strings.NewReader("\x00"),
	} {
		if got, err := newCode(random); err == nil || got != "" {
			t.Errorf("%s: got %q, %v, want an error", name, got, err)
		}
	}
	if _, err := newCode(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("got %v, want it to wrap the cause", err)
	}
}

func base64Key(fill byte, length int) string {
	return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{fill}, length))
}

func TestParseKeys_ReadsAListOfBase64(t *testing.T) {
	for name, c := range map[string]struct {
		list string
		want []int // the length of each key
	}{
		"one":                  {base64Key(1, 32), []int{32}},
		"three, spaces around": {base64Key(1, 32) + " , " + base64Key(2, 33) + ",\n" + base64Key(3, 64) + "\n", []int{32, 33, 64}},
	} {
		t.Run(name, func(t *testing.T) {
			keys, err := ParseKeys(c.list)
			if err != nil || len(keys) != len(c.want) {
				t.Fatalf("got %d keys, %v, want %d", len(keys), err, len(c.want))
			}
			for i, key := range keys {
				if want := bytes.Repeat([]byte{byte(i + 1)}, c.want[i]); !bytes.Equal(key, want) {
					t.Errorf("key %d: got %x, want %x", i+1, key, want)
				}
			}
		})
	}
}

func TestParseKeys_ErrorNamesThePositionAndHidesTheKey(t *testing.T) {
	good := base64Key(1, 32)
	for _, c := range []struct{ name, list, bad, place string }{
		{"none", "", "", "key 1 "},
		{"too short", base64Key(2, 31), base64Key(2, 31), "key 1 "},
		{"no base64", good + ",not*base64*at*all*************************", "not*base64", "key 2 "},
		{"base64 of URLs", good + "," + base64.URLEncoding.EncodeToString(bytes.Repeat([]byte{0xff}, 32)), "____", "key 2 "},
		{"padding left off", strings.TrimRight(good, "="), strings.TrimRight(good, "="), "key 1 "},
		{"a comma at the end", good + ",", good, "key 2 "},
		{"a comma at the beginning", "," + good, good, "key 1 "},
		{"one key in hexadecimal", good + "," + strings.Repeat("0f", 32)[:63], "0f0f", "key 2 "},
	} {
		t.Run(c.name, func(t *testing.T) {
			keys, err := ParseKeys(c.list)
			if err == nil || keys != nil || !strings.HasPrefix(err.Error(), c.place) {
				t.Fatalf("got %d keys, %v, want an error about %s", len(keys), err, c.place)
			}
			if c.bad != "" && strings.Contains(err.Error(), c.bad) || strings.Contains(err.Error(), good) {
				t.Errorf("got %q, want an error without a key", err)
			}
		})
	}
}

func TestDeriveKeys_DependOnTheSecretAlone(t *testing.T) {
	// This value must never change: otherwise every code of a running service would be
	// rejected after an upgrade.
	const want = "4f4a0e4bdd1b1717716513ad1f830c7a9f5c4632510523d8463cd9de4a75957a"
	keys, err := DeriveKeys("secret")
	if err != nil || len(keys) != 1 || fmt.Sprintf("%x", keys[0]) != want {
		t.Errorf("got %x, %v, want %s", keys, err, want)
	}
	if other, _ := DeriveKeys("secret2"); bytes.Equal(other[0], keys[0]) {
		t.Error("another secret: got the same key, want another one")
	}
	if keys, err := DeriveKeys(""); err == nil || keys != nil {
		t.Errorf("no secret: got %d keys, %v, want an error", len(keys), err)
	}
}

func TestRandomKeys_Differ(t *testing.T) {
	a, b := RandomKeys(), RandomKeys()
	if len(a) != 1 || len(a[0]) < minKeyBytes || bytes.Equal(a[0], b[0]) {
		t.Errorf("got %d keys of %d bytes, equal: %v, want one of %d or more, and another one each time", len(a), len(a[0]), bytes.Equal(a[0], b[0]), minKeyBytes)
	}
}

func TestKeys_RotationKeepsTheCodesOfListedKeys(t *testing.T) {
	const n, code = Number("+8618612345678"), "012345"
	before, _ := ParseKeys(base64Key(1, 32))
	during, _ := ParseKeys(base64Key(2, 32) + "," + base64Key(1, 32))
	after, _ := ParseKeys(base64Key(2, 32))
	for _, c := range []struct {
		name          string
		signs, verify Keys
		wantAccepted  bool
		code          string
		number        Number
	}{
		{"an old key's code under the new list", before, during, true, code, n},
		{"a new key's code under the new list", during, during, true, code, n},
		{"a new key's code when the old key is gone", during, after, true, code, n},
		{"an old key's code when the old key is gone", before, after, false, code, n},
		{"another code", before, before, false, "012346", n},
		{"another number", before, before, false, code, n + "9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := slices.Contains(c.verify.macs(c.number, c.code, ""), c.signs.sign(n, code, "")); got != c.wantAccepted {
				t.Errorf("got accepted %v, want %v", got, c.wantAccepted)
			}
		})
	}
}

func TestSign_SeparatesNumberAndCode(t *testing.T) {
	k := RandomKeys()
	if k.sign("+861234567", "890123", "") == k.sign("+8612345678", "90123", "") {
		t.Error("got one MAC for two pairs of number and code, want two")
	}
}

func TestMACs_InvalidCodeHasNone(t *testing.T) {
	for _, code := range []string{
		"", "12345", "1234567", "12345a", "12 456", " 123456", "123456 ", "+12345", "-12345", "1234５", "１２３４５６",
		"12345\x00", strings.Repeat("1", 2048),
	} {
		if got := RandomKeys().macs("+8618612345678", code, ""); got != nil {
			t.Errorf("%.20q: got %d MACs, want none", code, len(got))
		}
	}
}
