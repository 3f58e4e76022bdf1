package connmux

import (
	"strings"
	"testing"

	"github.com/liulinhuai/phone-number-service/internal/testutil/catest"
)

// A truncated file is rejected, unless complete certificates remain. A reload logs that these are
// fewer than before.
func TestCertificates_RejectATruncatedFile(t *testing.T) {
	ca := catest.New(t)
	good := CertificateFiles{ClientCA: File{Name: "ca.crt", Content: ca.PEM}}
	good.Certificate.Name, good.Key.Name = "tls.crt", "tls.key"
	good.Certificate.Content, good.Key.Content = ca.Issue("127.0.0.1")
	good.Certificate.Content += ca.PEM
	good.ClientCA.Content += catest.New(t).PEM
	certs := &Certificates{}
	for name, file := range map[string]func(*CertificateFiles) *string{
		"certificate": func(f *CertificateFiles) *string { return &f.Certificate.Content },
		"key":         func(f *CertificateFiles) *string { return &f.Key.Content },
		"client CA":   func(f *CertificateFiles) *string { return &f.ClientCA.Content },
	} {
		complete := *file(&good)
		for i := 0; i < len(strings.TrimSpace(complete)); i += 3 {
			truncated := good
			*file(&truncated) = complete[:i]
			const begin = "-----BEGIN CERTIFICATE-----"
			if certs.Replace(truncated) == nil && strings.Count(complete[:i], begin) >= strings.Count(complete, begin) {
				t.Errorf("%s truncated after %d of %d bytes: got no error; want one", name, i, len(complete))
			}
		}
	}
	if err := certs.Replace(good); err != nil {
		t.Errorf("the complete files: got %v; want no error", err)
	}
}
