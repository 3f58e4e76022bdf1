// Package catest is a certificate authority for tests.
package catest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"testing"
	"time"
)

// A CA issues certificates.
type CA struct {
	PEM  string // its own certificate
	Pool *x509.CertPool

	t           testing.TB
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// New returns a new CA.
func New(t testing.TB) *CA {
	t.Helper()
	ca := &CA{t: t, Pool: x509.NewCertPool()}
	ca.key = newKey(t)
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	ca.certificate = template // signs itself
	ca.PEM, ca.certificate = ca.sign(template, ca.key)
	ca.Pool.AddCert(ca.certificate)
	return ca
}

// Issue returns a certificate for these names, and its key, in PEM. Each name is an IP address, a
// URI or a DNS name. The certificate is for servers and clients, and valid for one hour.
func (ca *CA) Issue(names ...string) (certificate, key string) {
	ca.t.Helper()
	return ca.IssueUntil(time.Now().Add(time.Hour), names...)
}

// IssueUntil is Issue with another end.
func (ca *CA) IssueUntil(end time.Time, names ...string) (certificate, key string) {
	ca.t.Helper()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, name := range names {
		uri, err := url.Parse(name)
		switch ip := net.ParseIP(name); {
		case ip != nil:
			template.IPAddresses = append(template.IPAddresses, ip)
		case err == nil && uri.Scheme != "":
			template.URIs = append(template.URIs, uri)
		default:
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	subjectKey := newKey(ca.t)
	certificate, _ = ca.sign(template, subjectKey)
	der, err := x509.MarshalPKCS8PrivateKey(subjectKey)
	if err != nil {
		ca.t.Fatal(err)
	}
	return certificate, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// Client returns a TLS configuration that trusts the CA. If there are names, it has a client
// certificate for them.
func (ca *CA) Client(names ...string) *tls.Config {
	ca.t.Helper()
	config := &tls.Config{RootCAs: ca.Pool, MinVersion: tls.VersionTLS12}
	if names == nil {
		return config
	}
	certificate, key := ca.Issue(names...)
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
	if err != nil {
		ca.t.Fatal(err)
	}
	config.Certificates = []tls.Certificate{pair}
	return config
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sign signs a certificate for subjectKey.
func (ca *CA) sign(template *x509.Certificate, subjectKey *ecdsa.PrivateKey) (string, *x509.Certificate) {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		ca.t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore = serial, time.Now().Add(-time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, ca.certificate, subjectKey.Public(), ca.key)
	if err != nil {
		ca.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), c
}
