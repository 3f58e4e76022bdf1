// Package dev implements the parts of the service that only the command dev uses: an inbox that
// replaces Aliyun, a page that shows the inbox, and endpoints for automated tests. It is a separate
// package so that no production package imports it.
package dev

import (
	"context"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/server"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// Configure changes c for the command dev. The Sender of c.Verifier must deliver to inbox. Call
// Configure after all other fields of c are set, because it copies them.
func Configure(c *server.Config, inbox *Inbox) {
	s := &service{config: *c, inbox: inbox, started: time.Now()}
	c.OptionalTemplate, c.DetailsForAll = true, true
	c.AnyPage = true // guardDNSRebinding and IsCrossOrigin protect the inbox
	c.WrapCalls = func(next pb.PhoneNumberServiceServer) pb.PhoneNumberServiceServer {
		s.PhoneNumberServiceServer = next
		return s
	}
	c.WrapHTTP = s.wrapHTTP
}

// service wraps the two calls: after each call it updates the states of codes in the inbox. It also
// serves the page and the endpoints for automated tests.
type service struct {
	pb.PhoneNumberServiceServer
	config  server.Config
	inbox   *Inbox
	started time.Time

	// syncMu is locked from the read of the store to the update of the inbox. So an older state
	// cannot overwrite a newer one.
	syncMu sync.Mutex
}

func (s *service) SendSMS(ctx context.Context, r *pb.SendSMSRequest) (*pb.Empty, error) {
	defer s.syncInbox(ctx, r.GetPhoneNumber(), "")
	return s.PhoneNumberServiceServer.SendSMS(ctx, r)
}

func (s *service) Valid(ctx context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
	res, err := s.PhoneNumberServiceServer.Valid(ctx, r)
	used := ""
	if res.GetValid() {
		used = r.GetCode()
	}
	s.syncInbox(ctx, r.GetPhoneNumber(), used)
	return res, err
}

// syncInbox reads the state of a number from the store, and updates the inbox. It continues if the
// caller disconnects. used is the code that Valid has just accepted, or "".
func (s *service) syncInbox(ctx context.Context, phoneNumber, used string) {
	n, invalid := s.config.Numbers.Parse(phoneNumber)
	if invalid != nil {
		return
	}
	s.syncMu.Lock()
	defer s.syncMu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	seen, err := s.config.Verifier.Inspect(ctx, n)
	if err != nil {
		s.config.Verifier.Log.Warn("failed to read the state of a number, so the page may show an old one", "number", n.Masked(), "error", err)
		return
	}
	s.inbox.updateStates(n, used, seen)
}

// wrapHTTP returns a handler that serves the page, the endpoints for automated tests, and next for
// all other paths.
func (s *service) wrapHTTP(stopping context.Context, next http.Handler) http.Handler {
	address := s.config.Listener.Addr()
	if a, ok := address.(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		s.config.Telemetry.Log.Warn("every host that can reach this address can read all codes in the inbox", "address", address.String())
	}
	mux := http.NewServeMux()
	mux.Handle("/", next)
	registerPage(mux)
	s.registerRoutes(stopping, mux)
	return guardDNSRebinding(mux)
}

// nonPublicSuffix matches the end of host names that nobody can register in public DNS.
var nonPublicSuffix = regexp.MustCompile(`\.(internal|local|localhost|test)$`)

// guardDNSRebinding rejects requests whose Host is a name that can be registered in public DNS.
// Otherwise an attacker's page could change the address of its own name to this address (DNS
// rebinding). Then the browser would treat the page and the inbox as one origin, and the page could
// read the codes.
func guardDNSRebinding(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = strings.ToLower(strings.TrimSuffix(host, ".")) // a final dot is optional
		public := host == "" || strings.Contains(host, ".") && !nonPublicSuffix.MatchString(host)
		if public && net.ParseIP(host) == nil {
			http.Error(w, "rejected the host name: dev accepts IP addresses, names without a dot, and names in .internal, .local, .localhost and .test", http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}
