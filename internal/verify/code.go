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
	"slices"
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
//
// The MAC of a code with a context begins with eight zero bytes and the ContextTag. The rest is
// the beginning of an HMAC over number, code and context. An HMAC without a context begins with
// the zeros with a probability of 2^-64. So a release without contexts keeps these bytes, and never
// accepts the code.
type MAC [sha256.Size]byte

const zeroBytes = 8

// ContextTag identifies a context of a number in the database, which never holds the context itself.
// The zero ContextTag means no context.
type ContextTag [8]byte

// context returns the tag of the code's context.
func (m MAC) context() (tag ContextTag) {
	if [zeroBytes]byte(m[:]) == [zeroBytes]byte{} {
		copy(tag[:], m[zeroBytes:])
	}
	return tag
}

// ContextTags are the tags of one context, one for each of the Keys. They are nil without a context.
type ContextTags []ContextTag

// has reports whether a code belongs to the context. A nil ContextTags is the context "none".
func (t ContextTags) has(c Code) bool {
	tag := c.MAC.context()
	if tag == (ContextTag{}) {
		return t == nil
	}
	return slices.Contains(t, tag)
}

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

// DeriveKeys derives one key from a secret by HKDF-SHA-256. All replicas have the same secret, so
// they have the same key without a further setting, and keep it after a restart.
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

// sign returns the MAC of code under the first key, for the store.
func (k Keys) sign(n Number, code, context string) MAC { return codeMAC(k[0], n, code, context) }

// macs returns the MACs of code, one for each key, since any of the keys may have signed it. It
// returns nil if code is not six digits.
func (k Keys) macs(n Number, code, context string) []MAC {
	if len(code) != 6 || strings.Trim(code, "0123456789") != "" {
		return nil
	}
	macs := make([]MAC, len(k))
	for i, key := range k {
		macs[i] = codeMAC(key, n, code, context)
	}
	return macs
}

// contextTags returns the tags of a context, one for each key.
func (k Keys) contextTags(n Number, context string) ContextTags {
	if context == "" {
		return nil
	}
	tags := make(ContextTags, len(k))
	for i, key := range k {
		tags[i] = contextTag(key, n, context)
	}
	return tags
}

// keyTags returns the tags of a send's idempotency key and request, one for each key of k.
func (k Keys) keyTags(q SendRequest) []KeyTag {
	if q.IdempotencyKey == "" {
		return nil
	}
	tags := make([]KeyTag, len(k))
	for i, key := range k {
		// The idempotency key, the sign name and the template code have no zero byte, so that the
		// texts of two requests differ.
		id := mac(key, q.Number, "idempotency key\x00"+q.Caller+"\x00"+q.IdempotencyKey)
		request := mac(key, q.Number, "request\x00"+q.SignName+"\x00"+q.TemplateCode+"\x00"+q.Context)
		copy(tags[i].ID[:], id[:])
		copy(tags[i].Request[:], request[:])
	}
	return tags
}

// codeMAC returns the stored form of code under key.
func codeMAC(key []byte, n Number, code, context string) (m MAC) {
	if context == "" {
		return mac(key, n, code)
	}
	tag, sum := contextTag(key, n, context), mac(key, n, code+"\x00"+context)
	copy(m[zeroBytes:], tag[:])
	copy(m[zeroBytes+len(tag):], sum[:])
	return m
}

// contextTag returns the tag of a context under key.
func contextTag(key []byte, n Number, context string) (tag ContextTag) {
	sum := mac(key, n, "context\x00"+context)
	copy(tag[:], sum[:])
	return tag
}

// mac returns the HMAC of number and text. The beginning of a text shows its kind (domain separation):
// six digits for a code, otherwise the name of the kind.
func mac(key []byte, n Number, text string) (sum MAC) {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(string(n) + "\x00" + text)) // E.164 has no zero byte
	h.Sum(sum[:0])
	return sum
}
