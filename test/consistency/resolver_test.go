package consistency

import "google.golang.org/grpc/resolver"

// allReplicas is a resolver for a client of all replicas: one name with all their addresses, as
// in DNS.
type allReplicas []string

func (allReplicas) Scheme() string { return "both" }

func (a allReplicas) Build(_ resolver.Target, conn resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	var state resolver.State
	for _, address := range a {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: address})
	}
	return a, conn.UpdateState(state)
}

func (allReplicas) ResolveNow(resolver.ResolveNowOptions) {}
func (allReplicas) Close()                                {}
