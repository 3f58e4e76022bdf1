// Package prove holds the proofs of the service's guarantees, in a module of its
// own for what only they import. They drive replicas of the built program over
// gRPC, on real databases, break what they stand on, and check what they said.
//
// docs/guarantees.md says which test holds which guarantee.
package prove
