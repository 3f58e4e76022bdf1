package server

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

	"google.golang.org/grpc/credentials"
)

// A File is one that a setting names, as it was read.
type File struct{ Name, Content string }

// CertificateFiles are PEM files: the certificate that the port shows, with its chain,
// its key, and the CAs that client certificates must come from ("" for none).
type CertificateFiles struct{ Certificate, Key, ClientCA File }

// Certificates are what the port shows and asks for under TLS. They can be replaced at
// any time, for connections that come then.
type Certificates struct{ config atomic.Pointer[tls.Config] }

// Replace takes files, or says what is wrong with them; then those before stay.
func (c *Certificates) Replace(f CertificateFiles) error {
	own, faults := readKeyPair(f)
	config := &tls.Config{
		Certificates: []tls.Certificate{own},
		MinVersion:   tls.VersionTLS12,
		// Ours is the order that counts: who can do both, as a browser, gets JSON and
		// gRPC-Web; gRPC clients offer h2 alone.
		NextProtos: []string{"http/1.1", "h2"},
	}
	if f.ClientCA.Name != "" {
		var err error
		if config.ClientCAs, err = readCAs(f.ClientCA); err != nil {
			faults = append(faults, err)
		}
		// Without one a connection is good for health; calls look for themselves.
		config.ClientAuth = tls.VerifyClientCertIfGiven
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	c.config.Store(config) // whose keys for session tickets are new
	return nil
}

// Expires is when the certificate that is shown ends.
func (c *Certificates) Expires() time.Time { return c.config.Load().Certificates[0].Leaf.NotAfter }

// AsksClients reports whether there are CAs for client certificates.
func (c *Certificates) AsksClients() bool { return c.config.Load().ClientCAs != nil }

func readKeyPair(f CertificateFiles) (tls.Certificate, []error) {
	var faults []error
	if _, err := readCertificates(f.Certificate); err != nil {
		faults = append(faults, err)
	}
	if !strings.Contains(f.Key.Content, "PRIVATE KEY-----") {
		faults = append(faults, fmt.Errorf("%s: line 1: must be a private key in PEM, from a line -----BEGIN PRIVATE KEY----- on, without a password", f.Key.Name))
	}
	if faults != nil {
		return tls.Certificate{}, faults
	}
	// The words of its errors quote nothing of the files.
	pair, err := tls.X509KeyPair([]byte(f.Certificate.Content), []byte(f.Key.Content))
	if err != nil {
		return pair, []error{fmt.Errorf("%s: line 1: must be the key of the first certificate in %s: %w", f.Key.Name, f.Certificate.Name, err)}
	}
	return pair, nil
}

func readCAs(f File) (*x509.CertPool, error) {
	certificates, err := readCertificates(f)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certificates {
		pool.AddCert(c)
	}
	return pool, nil
}

// readCertificates returns one certificate or more. What else is in the file does not
// count: some tools put the key in too.
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

// A tlsConn is a connection whose handshake is done. net/http, too, asks it for its
// state.
type tlsConn struct {
	prefixedConn
	state tls.ConnectionState
}

func (c *tlsConn) ConnectionState() tls.ConnectionState { return c.state }

// An connInfo is the connection that a call comes over.
type connInfo struct {
	tls  *tls.ConnectionState // nil for plaintext
	conn *http2Conn           // nil over HTTP/1.1
}

// AuthType implements credentials.AuthInfo.
func (*connInfo) AuthType() string { return "arrival" }

// completedHandshakeCreds are credentials that tell grpc-go of a handshake it had no part in.
type completedHandshakeCreds struct {
	credentials.TransportCredentials
}

// ServerHandshake implements credentials.TransportCredentials.
func (completedHandshakeCreds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn := c.(*http2Conn)
	return c, &connInfo{conn.tls, conn}, nil
}

// Clone implements credentials.TransportCredentials.
func (h completedHandshakeCreds) Clone() credentials.TransportCredentials { return h }

// handshake brings a connection under TLS.
func (c *Certificates) handshake(plain net.Conn) (*tls.Conn, error) {
	conn := tls.Server(plain, c.config.Load())
	err := conn.Handshake()
	var other tls.RecordHeaderError
	if errors.As(err, &other) && other.Conn != nil && strings.Contains("GET HEAD POST PUT DELETE OPTIONS PATCH", string(other.RecordHeader[:3])) {
		fmt.Fprint(other.Conn, "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\nThis port speaks TLS: use https://\n")
	}
	return conn, err
}
