package sms

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/verify"
)

// Whatever the gateway writes, and however long it takes, a send ends with its time, its
// outcome is unknown, and its connection is closed.
func TestSend_EndsAtTheDeadlineWhateverIsAnswered(t *testing.T) {
	const upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
	const patience = 500 * time.Millisecond
	type conversation struct{ name, text, drip string }
	conversations := []conversation{
		{"101, then silence", "HTTP/1.1 101 Switching Protocols\r\n" + upgrade + "\r\n", ""},
		{"101, then bytes without end", "HTTP/1.1 101 Switching Protocols\r\n" + upgrade + "\r\n", "x"},
		{"101 with an answer behind it", "HTTP/1.1 101 Switching Protocols\r\n" + upgrade + "\r\n" + `{"Code":"OK","BizId":"1"}`, ""},
		{"101 that switches to nothing", "HTTP/1.1 101 Switching Protocols\r\nContent-Length: 9\r\n\r\n", ""},
		{"100 without end", "", "HTTP/1.1 100 Continue\r\n\r\n"},
		{"103 without end", "", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"},
		{"a status line without end", "HTTP/1.1 200 ", "x"},
		{"a header without end", "HTTP/1.1 200 OK\r\nA: ", "x"},
		{"a body without end", "HTTP/1.1 200 OK\r\n\r\n", " "},
		{"chunks without end", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n"},
		{"a chunk's extension without end", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=", "x"},
		{"trailers without end", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n0\r\n", "A: x\r\n"},
	}
	for _, status := range []int{100, 102, 200, 202, 302, 407, 426, 500, 999} {
		conversations = append(conversations, conversation{fmt.Sprint("a silent ", status), fmt.Sprintf("HTTP/1.1 %d X\r\n%sContent-Length: 99\r\n\r\n", status, upgrade), ""})
	}
	for _, c := range conversations {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fake, hungUp := dysmsapitest.New(t), make(chan struct{})
			fake.Next(dysmsapitest.Raw(c.text, c.drip, sync.OnceFunc(func() { close(hungUp) })))
			a := sender(t, fake, "")
			ctx := deadline(t, patience)
			type result struct {
				receipt verify.Receipt
				err     error
			}
			ended := make(chan result, 1)
			go func() {
				receipt, err := a.Send(ctx, message)
				ended <- result{receipt, err}
			}()
			const late = patience + 15*time.Second
			select {
			case got := <-ended:
				var e *verify.SendError
				if !errors.As(got.err, &e) || e.Kind != verify.SendTimedOut && e.Kind != verify.SendUnknown {
					t.Errorf("got %+v, %v; want an unknown outcome", got.receipt, got.err)
				}
			case <-time.After(late):
				t.Fatalf("the send goes on %v after its time", late-patience)
			}
			select {
			case <-hungUp:
			case <-time.After(late):
				t.Error("the connection is still open")
			}
		})
	}
}
