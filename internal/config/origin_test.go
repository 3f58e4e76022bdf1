package config

import "testing"

// The values are those of "new URL(origin).origin" in a browser. They are empty if no page can
// have that origin, or if it is rejected to keep the setting clear.
func TestBrowserOrigin_WritesOriginsAsBrowsersDo(t *testing.T) {
	for given, want := range map[string]string{
		"https://app.example.org":         "https://app.example.org",
		"https://app.example.org:443":     "https://app.example.org",
		"http://app.example.org:80":       "http://app.example.org",
		"https://app.example.org:80":      "https://app.example.org:80",
		"http://app.example.org:443":      "http://app.example.org:443",
		"HTTPS://App.Example.ORG":         "https://app.example.org",
		"https://app.example.org:08443":   "https://app.example.org:8443",
		"https://app.example.org:":        "https://app.example.org",
		"https://app.example.org.":        "https://app.example.org.",
		"https://bücher.example":          "https://xn--bcher-kva.example",
		"https://登录.example.cn":           "https://xn--w2t382c.example.cn",
		"https://faß.de":                  "https://xn--fa-hia.de",
		"https://App。example.org":         "https://app.example.org",
		"https://xn--bcher-kva.example":   "https://xn--bcher-kva.example",
		"https://my_app.example.org":      "https://my_app.example.org",
		"http://-a-.example.org":          "http://-a-.example.org",
		"https://ab--c.example":           "https://ab--c.example",
		"http://localhost:3000":           "http://localhost:3000",
		"http://127.0.0.1:3000":           "http://127.0.0.1:3000",
		"http://[::1]:3000":               "http://[::1]:3000",
		"http://[0:0:0:0:0:0:0:1]:3000":   "http://[::1]:3000",
		"http://[2001:DB8::0001]:80":      "http://[2001:db8::1]",
		"http://[::ffff:10.0.0.1]":        "",
		"http://[fe80::1%25eth0]":         "",
		"http://127.1":                    "",
		"http://0x7f.1":                   "",
		"http://256.1.1.1":                "",
		"http://127.0.0.1.":               "",
		"http://example.1":                "",
		"https://xn--a.example":           "",
		"https://a..b":                    "",
		"https://a\u200db.example":        "",
		"https://ex ample.org":            "",
		"https://a%2eb.org":               "",
		"https://app.example.org:65536":   "",
		"https://app.example.org:0":       "",
		"https://app.example.org:x":       "",
		"https://user:pw@app.example.org": "",
		"https://app.example.org/":        "",
		"https://app.example.org?":        "",
		"https://app.example.org#":        "",
		"https://*.example.org":           "",
		"https://":                        "",
		"https:app.example.org":           "",
		"app.example.org":                 "",
		"ftp://app.example.org":           "",
		"null":                            "",
		"*":                               "",
	} {
		if got, ok := browserOrigin(given); got != want || ok != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", given, got, ok, want)
		}
	}
}
