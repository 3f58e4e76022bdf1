package verify

// NewFakeStore returns the fake store. Only an external test can import storetest.
func NewFakeStore() Store { return &fakeStore{} }
