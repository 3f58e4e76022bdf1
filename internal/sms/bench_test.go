package sms

import (
	"testing"
	"time"
)

func BenchmarkNewRequest(b *testing.B) {
	key := Credentials{AccessKeyID: "LTAI5tTestAccessKeyID", AccessKeySecret: "TestAccessKeySecret0123456789"}
	a, err := NewAliyun(AliyunConfig{Credentials: key})
	if err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		a.NewRequest(b.Context(), message, now, "3156853299f313e23d1673dc12e1703d")
	}
}

func BenchmarkReadReply(b *testing.B) {
	body := []byte(`{"Code":"OK","Message":"OK","BizId":"900619746936498440^0","RequestId":"F655A8D5-B967-440B-8683-DAD6FF8DE990"}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ReadReply(message, 200, body); err != nil {
			b.Fatal(err)
		}
	}
}
