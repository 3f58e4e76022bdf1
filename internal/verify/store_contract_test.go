package verify_test

import (
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/verify"
	"github.com/liulinhuai/phone-number-service/internal/verify/storetest"
)

// The tests of this package run on a fake store, so it has to keep the contract too.
func TestFakeStore_KeepsTheContract(t *testing.T) {
	storetest.Run(t, func(*testing.T) func() verify.Store {
		store := verify.NewFakeStore()
		return func() verify.Store { return store }
	})
}
