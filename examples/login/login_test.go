package main

import (
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
)

// someNumber returns a random number for one test, so that tests can run in parallel.
func someNumber() string { return "186" + strconv.Itoa(10_000_000+rand.IntN(90_000_000)) }

func TestLogin_AcceptsTheSentCode(t *testing.T) {
	app, number := startApp(t), someNumber()
	post(t, app+"/code", url.Values{"number": {number}}, 200)

	res, err := http.Get(sms + "/inbox.json?phone_number=" + number + "&wait=5s")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var messages []struct{ Code, Signature string }
	if err := json.NewDecoder(res.Body).Decode(&messages); err != nil || len(messages) != 1 || messages[0].Signature != "Acme" {
		t.Fatalf("inbox: got %v, %v; want one message of Acme", messages, err)
	}

	post(t, app+"/login", url.Values{"number": {number}, "code": {"000000x"}}, 401)
	if body := post(t, app+"/login", url.Values{"number": {number}, "code": {messages[0].Code}}, 200); !strings.Contains(body,
		"Welcome, "+number) {
		t.Errorf("login: got %s; want a welcome", body)
	}
}

func TestLogin_ExplainsFailedSends(t *testing.T) {
	for kind, want := range map[string]struct {
		code int
		text string
	}{
		"limit_hour":     {429, "Try again in 1h0m0s."},
		"illegal_number": {400, "That is no mobile number."},
		"no_balance":     {503, "No code could be sent."},
	} {
		app, number := startApp(t), someNumber()
		q, _ := http.NewRequest("PUT", sms+"/failures.json", strings.NewReader(`{"phone_number":"`+number+`","kind":"`+kind+`","times":1}`))
		res, err := http.DefaultClient.Do(q)
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("%s: got %v, %v; want 200", kind, res, err)
		}
		res.Body.Close()
		if body := post(t, app+"/code", url.Values{"number": {number}}, want.code); !strings.Contains(body, want.text) {
			t.Errorf("%s: got %s; want %q", kind, body, want.text)
		}
	}
}

func TestLogin_AcceptsOneFormOfANumber(t *testing.T) {
	app := startApp(t)
	for _, number := range []string{"", "10086", "+8618600000000", "186 0000 0000"} {
		post(t, app+"/code", url.Values{"number": {number}}, 400)
		post(t, app+"/login", url.Values{"number": {number}}, 400)
	}
}

// startApp starts the example and returns its URL.
func startApp(t *testing.T) string {
	t.Helper()
	handler, err := newLogin(strings.TrimPrefix(sms, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	app := httptest.NewServer(handler)
	t.Cleanup(app.Close)
	return app.URL
}

// post sends a form, checks the status code, and returns the body.
func post(t *testing.T, path string, form url.Values, want int) string {
	t.Helper()
	res, err := http.PostForm(path, form)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != want {
		t.Fatalf("%s: got %d %s, %v; want %d", path, res.StatusCode, body, err, want)
	}
	return string(body)
}
