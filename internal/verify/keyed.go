package verify

import (
	"encoding/binary"
	"slices"
)

// KeyedSend is a send with an idempotency key. It stays in the State until the lifetime of its code is
// over, even if the code is used or exhausted earlier. So a repeated call gets the same result. Only
// Withdraw drops it earlier.
type KeyedSend struct {
	Tag     KeyTag
	SendID  int64
	BegunAt int64 // microseconds since 1970
	Status  keyedStatus
}

// KeyTag identifies an idempotency key and its request in the database, which never holds them.
type KeyTag struct {
	ID      [12]byte // of number, caller and idempotency key
	Request [4]byte  // of sign name, template code and context
}

// keyedStatus is the outcome of a KeyedSend. The values are stored: do not renumber them.
type keyedStatus uint8

const (
	keyedInFlight keyedStatus = iota
	keyedAccepted
	keyedUnknown
	keyedTimedOut
)

const maxKeyed = 8

// replayed looks for a send with the idempotency key. If there is none, it returns the zero Begun. If
// the provider accepted the send, it returns the send. If the outcome is unknown, it returns the send
// with a *SendError. In the other cases it returns ErrKeyInProgress or ErrKeyReused.
func replayed(keyed []KeyedSend, key []KeyTag, now int64) (Begun, error) {
	for _, k := range keyed {
		i := slices.IndexFunc(key, func(t KeyTag) bool { return t.ID == k.Tag.ID })
		if i < 0 {
			continue
		}
		begun := Begun{SendID: k.SendID, At: k.BegunAt, Replayed: true}
		switch {
		case key[i].Request != k.Tag.Request:
			return Begun{}, ErrKeyReused
		case k.Status == keyedAccepted:
			return begun, nil
		case k.Status == keyedInFlight && isInFlight(k.BegunAt, now):
			return Begun{}, ErrKeyInProgress
		case k.Status == keyedTimedOut:
			return begun, &SendError{Kind: SendTimedOut, Detail: replayDetail}
		}
		return begun, &SendError{Kind: SendUnknown, Detail: replayDetail} // also if no outcome was stored
	}
	return Begun{}, nil
}

const replayDetail = "replayed the outcome of the send with this idempotency key"

// withStatus returns keyed with a new status of the send with this ID.
func withStatus(keyed []KeyedSend, sendID int64, status keyedStatus) []KeyedSend {
	i := slices.IndexFunc(keyed, func(k KeyedSend) bool { return k.SendID == sendID })
	if i < 0 {
		return keyed
	}
	keyed = slices.Clone(keyed)
	keyed[i].Status = status
	return keyed
}

// unexpiredKeyed returns a copy of the sends that began within CodeTTL, also of those whose code was used.
func (r Rules) unexpiredKeyed(keyed []KeyedSend, now int64) []KeyedSend {
	return slices.DeleteFunc(slices.Clone(keyed), func(k KeyedSend) bool { return r.isExpired(k.BegunAt, now) })
}

// The stored form of the keyed sends is: a format byte, their count, then keyedBytes for each.
const (
	keyedFormat = 2 // not historyFormat: an older release must not take them for a History
	keyedBytes  = len(KeyTag{}.ID) + len(KeyTag{}.Request) + 8 + 8 + 1
)

func appendKeyed(b []byte, keyed []KeyedSend) []byte {
	if len(keyed) == 0 {
		return b
	}
	b = append(b, keyedFormat, byte(len(keyed)))
	for _, k := range keyed {
		b = append(append(b, k.Tag.ID[:]...), k.Tag.Request[:]...)
		b = binary.BigEndian.AppendUint64(b, uint64(k.SendID))
		b = binary.BigEndian.AppendUint64(b, uint64(k.BegunAt))
		b = append(b, byte(k.Status))
	}
	return b
}

// decodeKeyed decodes the output of appendKeyed. If it cannot read b, it returns nil: b is empty, or a
// later release wrote it.
func decodeKeyed(b []byte) []KeyedSend {
	if len(b) < 2 || b[0] != keyedFormat {
		return nil
	}
	n := int(b[1])
	b = b[2:]
	if n > maxKeyed || len(b) < n*keyedBytes {
		return nil
	}
	keyed := make([]KeyedSend, n)
	for i := range keyed {
		k := &keyed[i]
		copy(k.Tag.ID[:], b)
		copy(k.Tag.Request[:], b[12:])
		k.SendID = int64(binary.BigEndian.Uint64(b[16:]))
		k.BegunAt = int64(binary.BigEndian.Uint64(b[24:]))
		k.Status = keyedStatus(b[32])
		b = b[keyedBytes:]
	}
	return keyed
}
