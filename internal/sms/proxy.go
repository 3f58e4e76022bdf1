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

// proxyFor returns the proxy for endpoint, or nil for none. It uses the same variables and hosts
// as net/http, but parses the value itself. net/http reads "http:/10.0.0.1:3128" and a password
// with "#" as a proxy at the host name "http", and uses no proxy if the value is invalid. The error
// names the variable and does not quote its value, which can contain a password.
func proxyFor(endpoint *url.URL) (*url.URL, error) {
	name := "HTTPS_PROXY"
	if os.Getenv(name) == "" {
		name = "https_proxy"
	}
	value := os.Getenv(name)
	ifValid := httpproxy.Config{HTTPSProxy: "http://proxy.invalid", NoProxy: cmp.Or(os.Getenv("NO_PROXY"), os.Getenv("no_proxy"))}
	if used, _ := ifValid.ProxyFunc()(endpoint); value == "" || used == nil {
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

// proxyRefusal is the error of a proxy that does not connect to Aliyun.
type proxyRefusal struct{ status int }

func (e *proxyRefusal) Error() string {
	return fmt.Sprintf("refused to connect to Aliyun, HTTP %d", e.status)
}

// refusedByProxy returns a proxyRefusal with the HTTP status. The error of net/http contains the
// proxy's text instead.
func refusedByProxy(_ context.Context, _ *url.URL, _ *http.Request, response *http.Response) error {
	if response.StatusCode != http.StatusOK {
		return &proxyRefusal{response.StatusCode}
	}
	return nil
}
