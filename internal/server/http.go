package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/liulinhuai/phone-number-service/internal/sms"
	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// newHTTPServer serves what arrives as HTTP/1.1 on the port: the two calls as
// JSON and gRPC-Web, and in development the inbox.
func newHTTPServer(svc *service, around grpc.UnaryServerInterceptor, version string) *http.Server {
	mux := http.NewServeMux()
	mux.Handle(pb.PhoneNumberService_SendSMS_FullMethodName, bridge(pb.PhoneNumberService_SendSMS_FullMethodName, around, svc.SendSMS))
	mux.Handle(pb.PhoneNumberService_Valid_FullMethodName, bridge(pb.PhoneNumberService_Valid_FullMethodName, around, svc.Valid))
	if svc.inbox != nil {
		mux.Handle("GET /inbox.json", inboxHandler(svc.inbox, svc.numbers))
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if r.URL.Path != "/" {
			w.WriteHeader(http.StatusNotFound)
		}
		fmt.Fprintf(w, "phone-number-service %s\n\nPOST %s\nPOST %s\n\nas gRPC, gRPC-Web or JSON on this port.\n", version,
			pb.PhoneNumberService_SendSMS_FullMethodName, pb.PhoneNumberService_Valid_FullMethodName)
	})
	return &http.Server{
		Handler:           jsonByDefault(mux),
		ReadHeaderTimeout: connectionTimeout,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      defaultDeadline + 15*time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeaderBytes,
	}
}

// bridge serves one call over HTTP/1.1. It passes through around exactly as a
// call over gRPC does.
func bridge[Req, Res any](method string, around grpc.UnaryServerInterceptor, f func(context.Context, *Req) (*Res, error)) http.Handler {
	unary := func(ctx context.Context, r *connect.Request[Req]) (*connect.Response[Res], error) {
		ctx = peer.NewContext(ctx, &peer.Peer{Addr: httpAddr(r.Peer().Addr)})
		res, err := around(ctx, r.Msg, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, req any) (any, error) {
			return f(ctx, req.(*Req))
		})
		if err != nil {
			return nil, connectError(status.Convert(err))
		}
		return connect.NewResponse(res.(*Res)), nil
	}
	return connect.NewUnaryHandler(method, unary,
		connect.WithCodec(jsonCodec{"json"}), connect.WithCodec(jsonCodec{"json; charset=utf-8"}),
		connect.WithReadMaxBytes(maxMessageBytes))
}

type httpAddr string

func (httpAddr) Network() string  { return "tcp" }
func (a httpAddr) String() string { return string(a) }

// connectError carries a status over with its details; the codes are the same.
func connectError(s *status.Status) error {
	e := connect.NewError(connect.Code(s.Code()), errors.New(s.Message()))
	for _, d := range s.Details() {
		if m, ok := d.(proto.Message); ok {
			if detail, err := connect.NewErrorDetail(m); err == nil {
				e.AddDetail(detail)
			}
		}
	}
	return e
}

// jsonByDefault takes a body of no declared type as JSON, so that a plain
// "curl -d" works. A foreign web page can make a visitor's browser send just
// such a body without asking first, so from there it is refused.
func jsonByDefault(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		declared, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
		switch strings.TrimSpace(declared) {
		case "", "application/x-www-form-urlencoded", "text/plain":
			if r.Method == http.MethodPost && !fromForeignPage(r) {
				r.Header.Set("Content-Type", "application/json")
			}
		}
		next.ServeHTTP(w, r)
	})
}

func fromForeignPage(r *http.Request) bool {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		return true
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	u, err := url.Parse(origin)
	return err != nil || u.Host != r.Host
}

// jsonCodec is proto JSON that refuses what it does not know, by name, and shows
// valid: false. Its errors never repeat a value: it could be a code.
type jsonCodec struct{ name string }

func (c jsonCodec) Name() string { return c.name }

func (jsonCodec) Marshal(m any) ([]byte, error) {
	return protojson.MarshalOptions{EmitDefaultValues: true, UseProtoNames: true}.Marshal(m.(proto.Message))
}

func (jsonCodec) Unmarshal(b []byte, m any) error {
	msg := m.(proto.Message)
	if protojson.Unmarshal(b, msg) == nil {
		return nil
	}
	return explainJSON(b, msg.ProtoReflect().Descriptor().Fields())
}

// explainJSON says what is wrong with a body that proto JSON refused.
func explainJSON(b []byte, fields protoreflect.FieldDescriptors) error {
	var known []string
	for i := range fields.Len() {
		known = append(known, string(fields.Get(i).Name()))
	}
	var object map[string]json.RawMessage
	if json.Unmarshal(b, &object) != nil {
		return fmt.Errorf("the body must be one JSON object with the fields %s", strings.Join(known, ", "))
	}
	for name, value := range object {
		if f := fields.ByJSONName(name); f == nil && !slices.Contains(known, name) {
			return fmt.Errorf("unknown field %.40q; the fields are %s", name, strings.Join(known, ", "))
		}
		if len(value) == 0 || value[0] != '"' {
			return fmt.Errorf("%s must be a JSON string, in double quotes", name)
		}
	}
	return errors.New("the body must be valid UTF-8, with each field once")
}

// inboxHandler answers /inbox.json, see the README.
func inboxHandler(inbox *sms.Inbox, numbers verify.NumberParser) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var number verify.Number
		// An unescaped + in a query arrives as a space, and means +.
		if raw := r.URL.Query().Get("phone_number"); raw != "" {
			if strings.HasPrefix(raw, " ") {
				raw = "+" + raw[1:]
			}
			n, fault := numbers.Parse(raw)
			if fault != nil {
				http.Error(w, fault.Error(), http.StatusBadRequest)
				return
			}
			number = n
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		json.NewEncoder(w).Encode(inbox.Messages(number))
	})
}
