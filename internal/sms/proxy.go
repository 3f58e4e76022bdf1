package sms

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpproxy"
)

// CheckProxy reports that the environment names a proxy for endpoint, and that its
// value cannot be used. The error names the variable and quotes nothing, since a value
// can hold a password.
func CheckProxy(endpoint *url.URL) error {
	_, err := proxyFor(endpoint)
	return err
}

// proxyFor returns the proxy for endpoint, or nil for none. Which variable counts, and
// for which hosts, is as in net/http. The value is read here, since net/http reads
// "http:/10.0.0.1:3128" and a password with "#" as a proxy at the host name "http", and
// takes no proxy for what it cannot read.
func proxyFor(endpoint *url.URL) (*url.URL, error) {
	name := "HTTPS_PROXY"
	if os.Getenv(name) == "" {
		name = "https_proxy"
	}
	value := os.Getenv(name)
	ifReadable := httpproxy.Config{HTTPSProxy: "http://proxy.invalid", NoProxy: cmp.Or(os.Getenv("NO_PROXY"), os.Getenv("no_proxy"))}
	if used, _ := ifReadable.ProxyFunc()(endpoint); value == "" || used == nil {
		return nil, nil
	}
	if !strings.Contains(value, "://") {
		value = "http://" + value
	}
	if proxy, err := url.Parse(value); err == nil && isProxy(proxy) {
		return proxy, nil
	}
	return nil, errors.New(name + " must be http://HOST:PORT or http://USER:PASSWORD@HOST:PORT (or https, socks5, socks5h), " +
		"with no path, space or quotation mark, and with %23 for # and so on in USER and PASSWORD; " +
		"NO_PROXY lists hosts that are reached without it")
}

var hostName = regexp.MustCompile(`^[\pL\pN_-]+(\.[\pL\pN_-]+)*\.?$`)

func isProxy(u *url.URL) bool {
	_, notAnAddress := netip.ParseAddr(u.Hostname())
	port, badPort := strconv.ParseUint(cmp.Or(u.Port(), "1"), 10, 16)
	return slices.Contains([]string{"http", "https", "socks5", "socks5h"}, u.Scheme) &&
		(notAnAddress == nil || hostName.MatchString(u.Hostname())) &&
		badPort == nil && port > 0 && !strings.HasSuffix(u.Host, ":") &&
		(u.Path == "" || u.Path == "/") && u.RawQuery == "" && !u.ForceQuery && u.Fragment == ""
}

// A proxyRefusal is a proxy's answer that it does not connect to Aliyun.
type proxyRefusal struct{ status int }

func (e *proxyRefusal) Error() string {
	return fmt.Sprintf("refused to connect to Aliyun, HTTP %d", e.status)
}

// refusedByProxy keeps the status of a refusal, of which net/http's own error has the
// proxy's text alone.
func refusedByProxy(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
	if answer.StatusCode != http.StatusOK {
		return &proxyRefusal{answer.StatusCode}
	}
	return nil
}
