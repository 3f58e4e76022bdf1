// Package dev is the part of the service that only the command dev has: an inbox in place of
// Aliyun, a page that shows it, and endpoints for automated tests. It is a package of its own
// so that no package of production imports it.
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

// Configure makes c the configuration of dev, with inbox as the Sender of c.Verifier. It must
// be called last: it reads the other fields.
func Configure(c *server.Config, inbox *Inbox) {
	d := &service{config: *c, inbox: inbox, started: time.Now()}
	c.OptionalTemplate, c.AnyPage = true, true // guardDNSRebinding protects the inbox from pages
	c.WrapCalls = d.wrapCalls
	c.WrapHTTP = d.wrapHTTP
}

// service updates the states of codes in the inbox after each call, and serves the page and
// the endpoints for automated tests.
type service struct {
	pb.PhoneNumberServiceServer
	config  server.Config
	inbox   *Inbox
	started time.Time

	// syncMu is held from reading the store to updating the inbox, so that updates are in order.
	syncMu sync.Mutex
}

func (d *service) wrapCalls(next pb.PhoneNumberServiceServer) pb.PhoneNumberServiceServer {
	d.PhoneNumberServiceServer = next
	return d
}

func (d *service) SendSMS(ctx context.Context, r *pb.SendSMSRequest) (*pb.Empty, error) {
	defer d.syncInbox(ctx, r.GetPhoneNumber(), "")
	return d.PhoneNumberServiceServer.SendSMS(ctx, r)
}

func (d *service) Valid(ctx context.Context, r *pb.ValidRequest) (*pb.ValidResponse, error) {
	res, err := d.PhoneNumberServiceServer.Valid(ctx, r)
	used := ""
	if res.GetValid() {
		used = r.GetCode()
	}
	d.syncInbox(ctx, r.GetPhoneNumber(), used)
	return res, err
}

// syncInbox reads the state of a number from the store into the inbox. It continues after
// the caller disconnects. used is the code that Valid has just accepted, or "".
func (d *service) syncInbox(ctx context.Context, phoneNumber, used string) {
	n, invalid := d.config.Numbers.Parse(phoneNumber)
	if invalid != nil {
		return
	}
	d.syncMu.Lock()
	defer d.syncMu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	seen, err := d.config.Verifier.Inspect(ctx, n)
	if err != nil {
		d.config.Verifier.Log.Warn("the page may show an old state", "number", n.Masked(), "error", err)
		return
	}
	d.inbox.updateStates(n, used, seen)
}

// wrapHTTP adds the page and the endpoints to next.
func (d *service) wrapHTTP(draining context.Context, next http.Handler) http.Handler {
	address := d.config.Listener.Addr()
	if a, ok := address.(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
		d.config.Telemetry.Log.Warn("the inbox shows every code to whoever reaches this address", "address", address.String())
	}
	mux := http.NewServeMux()
	mux.Handle("/", next)
	registerPage(mux)
	d.registerRoutes(draining, mux)
	return guardDNSRebinding(mux)
}

// Suffixes of names that cannot be registered in public DNS.
var nonPublicSuffix = regexp.MustCompile(`\.(internal|local|localhost|test)$`)

// guardDNSRebinding rejects Host names that can be registered in public DNS. Otherwise an
// attacker's page could rebind its own name to this address and read the inbox as
// same-origin.
func guardDNSRebinding(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = strings.ToLower(strings.TrimSuffix(host, ".")) // a final dot is optional
		public := host == "" || strings.Contains(host, ".") && !nonPublicSuffix.MatchString(host)
		if public && net.ParseIP(host) == nil {
			http.Error(w, "development answers to IP addresses, names without a dot, and names in .internal, .local, .localhost and .test", http.StatusMisdirectedRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}
