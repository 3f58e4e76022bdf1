// Package consistency tests the guarantees of the service. The tests run replicas of the built program
// on real databases, send calls over gRPC, inject faults into databases, networks and processes,
// and check the results. The module test is separate, so that the service does not depend on its
// dependencies.
//
// docs/guarantees.md lists the test of each guarantee.
package consistency
