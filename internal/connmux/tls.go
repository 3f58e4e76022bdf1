package connmux

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"time"
)

// File is the name and the content of a file.
type File struct{ Name, Content string }

// CertificateFiles are PEM files: the server certificate with its chain, its private key, and the
// certificate authorities (CAs) that sign client certificates. ClientCA is the zero File if the
// server accepts no client certificates.
type CertificateFiles struct{ Certificate, Key, ClientCA File }

// Certificates holds the TLS configuration of the port. Replace can change the configuration at
// any time, and only new connections use it.
type Certificates struct{ config atomic.Pointer[tls.Config] }

// Replace makes new connections use the certificates of f. If it returns an error, new connections
// use the previous certificates.
func (c *Certificates) Replace(f CertificateFiles) error {
	pair, err := readKeyPair(f)
	errs := []error{err}
	config := &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   tls.VersionTLS12,
		// ALPN: the server selects its first protocol that the client also offers. Clients that offer
		// both (browsers, curl) get HTTP/1.1, and can use JSON and gRPC-Web. gRPC clients offer only h2.
		NextProtos: []string{"http/1.1", "h2"},
	}
	if f.ClientCA.Name != "" {
		certificates, err := readCertificates(f.ClientCA)
		errs = append(errs, err)
		config.ClientCAs = x509.NewCertPool()
		for _, c := range certificates {
			config.ClientCAs.AddCert(c)
		}
		// A health check needs no certificate. Package server checks the certificates of calls.
		config.ClientAuth = tls.VerifyClientCertIfGiven
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// A new Config has new session-ticket keys. So a client cannot resume a session with a
	// certificate of a CA that was removed.
	c.config.Store(config)
	return nil
}

// Expires returns the time at which the server certificate expires.
func (c *Certificates) Expires() time.Time { return c.config.Load().Certificates[0].Leaf.NotAfter }

func readKeyPair(f CertificateFiles) (pair tls.Certificate, err error) {
	_, err = readCertificates(f.Certificate)
	if !strings.Contains(f.Key.Content, "PRIVATE KEY-----") {
		err = errors.Join(err, fmt.Errorf("%s: line 1: must be a private key in PEM, from a line -----BEGIN PRIVATE KEY----- on, without a password", f.Key.Name))
	}
	if err != nil {
		return pair, err
	}
	// Errors of X509KeyPair contain at most the types of the PEM blocks, and nothing of the key.
	if pair, err = tls.X509KeyPair([]byte(f.Certificate.Content), []byte(f.Key.Content)); err != nil {
		err = fmt.Errorf("%s: line 1: must be the key of the first certificate in %s: %w", f.Key.Name, f.Certificate.Name, err)
	}
	return pair, err
}

// readCertificates returns the certificates of a PEM file, and an error if there are none. It
// ignores other PEM blocks, because some tools also write the key into the file.
func readCertificates(f File) (certificates []*x509.Certificate, err error) {
	for text := f.Content; ; {
		start := strings.Index(text, "-----BEGIN CERTIFICATE-----")
		if start < 0 {
			break
		}
		line := 1 + strings.Count(f.Content[:len(f.Content)-len(text)+start], "\n")
		block, rest := pem.Decode([]byte(text[start:]))
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: line %d: is no whole certificate in PEM", f.Name, line)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: line %d: is no X.509 certificate: %w", f.Name, line, err)
		}
		certificates, text = append(certificates, c), string(rest)
	}
	if certificates == nil {
		return nil, fmt.Errorf("%s: line 1: must hold a certificate in PEM, from a line -----BEGIN CERTIFICATE----- on", f.Name)
	}
	return certificates, nil
}

// tlsConn is a connection after its TLS handshake. net/http sets Request.TLS to the result of its
// method ConnectionState.
type tlsConn struct {
	prefixedConn
	state tls.ConnectionState
}

func (c *tlsConn) ConnectionState() tls.ConnectionState { return c.state }

// handshake does the TLS handshake on a connection. If the client sends an HTTP request without
// TLS, the response is a hint to use https.
func (c *Certificates) handshake(plain net.Conn) (*tls.Conn, error) {
	conn := tls.Server(plain, c.config.Load())
	err := conn.Handshake()
	var headerErr tls.RecordHeaderError
	if errors.As(err, &headerErr) && headerErr.Conn != nil &&
		strings.Contains("GET HEAD POST PUT DELETE OPTIONS PATCH", string(headerErr.RecordHeader[:3])) {
		fmt.Fprint(headerErr.Conn, "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\nThis port speaks TLS: use https://\n")
	}
	return conn, err
}
