package verify

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
)

// newCode generates a code: six random decimal digits. Each of the million codes has the
// same probability.
func newCode(random io.Reader) (string, error) {
	n, err := rand.Int(random, big.NewInt(1_000_000))
	if err != nil {
		return "", fmt.Errorf("failed to generate a code: %w", err)
	}
	return fmt.Sprintf("%06d", n), nil
}

// MAC is the stored form of a code: the HMAC-SHA-256 of number and code. The database never
// holds the code itself.
type MAC [sha256.Size]byte

// Keys are the HMAC keys for codes. The first key signs new codes, and every key verifies
// codes, so that a key rotation invalidates no code. The keys are never in the database.
type Keys [][]byte

const minKeyBytes = 32

// ParseKeys reads a comma-separated list of standard base64 keys of at least 32
// bytes each. An error contains the position of the key, never its content.
func ParseKeys(list string) (Keys, error) {
	var keys Keys
	for i, item := range strings.Split(list, ",") {
		key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(item))
		if err != nil {
			return nil, fmt.Errorf("key %d is not standard base64", i+1)
		}
		if len(key) < minKeyBytes {
			return nil, fmt.Errorf("key %d has %d bytes; at least %d are needed", i+1, len(key), minKeyBytes)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// DeriveKeys derives one key from a secret by HKDF-SHA-256. Every replica has the secret, so all
// replicas have the same key, also after a restart, without another setting.
func DeriveKeys(secret string) (Keys, error) {
	if secret == "" {
		return nil, errors.New("no secret to derive a key from")
	}
	key, err := hkdf.Key(sha256.New, []byte(secret), nil, "phone-number-service code key 1", minKeyBytes)
	return Keys{key}, err
}

// RandomKeys returns one random key, which is lost when the process ends.
func RandomKeys() Keys {
	key := make([]byte, minKeyBytes)
	rand.Read(key) // cannot fail: crypto/rand crashes the process instead
	return Keys{key}
}

// sign returns the MAC of code under the first key. The MAC is stored.
func (k Keys) sign(n Number, code string) MAC { return mac(k[0], n, code) }

// macs returns the MACs of code, one for each key, since any of the keys may have signed it. It
// returns nil if code is not six digits.
func (k Keys) macs(n Number, code string) []MAC {
	if len(code) != 6 || strings.Trim(code, "0123456789") != "" {
		return nil
	}
	macs := make([]MAC, len(k))
	for i, key := range k {
		macs[i] = mac(key, n, code)
	}
	return macs
}

func mac(key []byte, n Number, code string) (sum MAC) {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(string(n) + "\x00" + code)) // E.164 has no zero byte
	h.Sum(sum[:0])
	return sum
}
