package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/rs/cors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

const documentation = "https://github.com/liulinhuai/phone-number-service"

// newHTTPServer serves what arrives as HTTP/1.1 on the port: the two calls as
// JSON and gRPC-Web, and what dev, where it is not nil, has beside them.
func newHTTPServer(svc pb.PhoneNumberServiceServer, dev *development, around grpc.UnaryServerInterceptor, admitted *admission, c Config) *http.Server {
	mux := http.NewServeMux()
	call := func(method string, handler http.Handler) {
		mux.Handle(method, forOrigins(c.Origins, asIncoming(c.Limits.ConnectionAge, admitted.http(jsonByDefault(handler)))))
	}
	call(pb.PhoneNumberService_SendSMS_FullMethodName, bridge(pb.PhoneNumberService_SendSMS_FullMethodName, around, c.Limits, svc.SendSMS))
	call(pb.PhoneNumberService_Valid_FullMethodName, bridge(pb.PhoneNumberService_Valid_FullMethodName, around, c.Limits, svc.Valid))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if r.URL.Path != "/" {
			w.WriteHeader(http.StatusNotFound)
		}
		fmt.Fprintf(w, "phone-number-service %s\n\nPOST %s\nPOST %s\n\nas gRPC, gRPC-Web or JSON on this port. Documentation: %s\n", c.Version,
			pb.PhoneNumberService_SendSMS_FullMethodName, pb.PhoneNumberService_Valid_FullMethodName, documentation)
	})
	var handler http.Handler = mux
	if dev != nil {
		dev.register(mux)
		handler = fromPrivateNames(handler)
		if a, ok := c.Listener.Addr().(*net.TCPAddr); !ok || !a.IP.IsLoopback() {
			c.Watch.Log.Warn("the inbox shows every code to whoever reaches this address", "address", c.Listener.Addr().String())
		}
	}
	return &http.Server{
		Handler: handler,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, arrivedKey{}, time.Now())
		},
		ReadHeaderTimeout: c.Limits.ConnectionTimeout,
		ReadTimeout:       c.Limits.ReadTimeout,
		WriteTimeout:      c.Limits.CallTimeout + 10*time.Second,
		IdleTimeout:       c.Limits.IdleTimeout,
		MaxHeaderBytes:    max(c.Limits.HeaderBytes-4<<10, 1), // net/http adds 4 KiB, and another on a connection in use
		ErrorLog:          slog.NewLogLogger(c.Watch.Log.Handler(), slog.LevelDebug),
	}
}

// bridge serves one call over HTTP/1.1. It passes through around exactly as a
// call over gRPC does.
func bridge[Req, Res any](method string, around grpc.UnaryServerInterceptor, limits Limits, f func(context.Context, *Req) (*Res, error)) http.Handler {
	unary := func(ctx context.Context, r *connect.Request[body]) (*connect.Response[Res], error) {
		res, err := around(ctx, nil, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, _ any) (any, error) {
			request := new(Req)
			if err := r.Msg.decode(any(request).(proto.Message)); err != nil {
				return nil, err
			}
			return f(ctx, request)
		})
		if err != nil {
			return nil, connectError(status.Convert(err))
		}
		return connect.NewResponse(res.(*Res)), nil
	}
	return connect.NewUnaryHandler(method, unary, connect.WithReadMaxBytes(limits.MessageBytes),
		connect.WithCodec(jsonCodec("json")), connect.WithCodec(jsonCodec("json; charset=utf-8")),
		connect.WithCodec(codec{"proto", proto.Marshal, unmarshalProto}))
}

// asIncoming gives a request's context what that of a call over gRPC has, where it is
// looked for.
func asIncoming(oldest time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if arrived, ok := r.Context().Value(arrivedKey{}).(time.Time); ok && time.Since(arrived) > oldest {
			w.Header().Set("Connection", "close")
		}
		p := &peer.Peer{Addr: address(r.RemoteAddr), AuthInfo: &arrival{tls: r.TLS}}
		incoming := metadata.MD{}
		for _, name := range []string{"authorization", "traceparent", "tracestate"} {
			if values := r.Header.Values(name); values != nil {
				incoming[name] = values
			}
		}
		next.ServeHTTP(w, r.WithContext(metadata.NewIncomingContext(peer.NewContext(r.Context(), p), incoming)))
	})
}

type arrivedKey struct{}

// address is a net.Addr as text.
type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

// A body is a request as it came. It is decoded within around, so that what is
// wrong with it is told and logged like every other fault.
type body struct {
	raw       []byte
	unmarshal func([]byte, proto.Message) error
}

func (b *body) decode(m proto.Message) error {
	if b.unmarshal == nil { // nothing came
		return nil
	}
	return b.unmarshal(b.raw, m)
}

// A codec writes messages and keeps what it is to read as a body.
type codec struct {
	name      string
	marshal   func(proto.Message) ([]byte, error)
	unmarshal func([]byte, proto.Message) error
}

func (c codec) Name() string                  { return c.name }
func (c codec) Marshal(m any) ([]byte, error) { return c.marshal(m.(proto.Message)) }
func (c codec) Unmarshal(b []byte, m any) error {
	*m.(*body) = body{bytes.Clone(b), c.unmarshal}
	return nil
}

// jsonCodec is proto JSON that refuses what it does not know and shows
// valid: false.
func jsonCodec(name string) codec {
	return codec{name, protojson.MarshalOptions{EmitDefaultValues: true, UseProtoNames: true}.Marshal, unmarshalJSON}
}

func unmarshalProto(b []byte, m proto.Message) error {
	if proto.Unmarshal(b, m) != nil {
		return fieldErrors{{Field: "body", Want: "must be this call's protobuf message, its texts valid UTF-8"}}
	}
	return nil
}

var fieldName = regexp.MustCompile(`^[A-Za-z_]{1,40}$`)

// unmarshalJSON names what is wrong with a body. It never repeats a value: it
// could be a code.
func unmarshalJSON(b []byte, m proto.Message) error {
	if protojson.Unmarshal(b, m) == nil {
		return nil
	}
	fields := m.ProtoReflect().Descriptor().Fields()
	var known []string
	for i := range fields.Len() {
		known = append(known, string(fields.Get(i).Name()))
	}
	var object map[string]json.RawMessage
	if json.Unmarshal(b, &object) != nil {
		return fieldErrors{{Field: "body", Want: "must be one JSON object with the fields " + strings.Join(known, ", ")}}
	}
	var faults fieldErrors
	for _, name := range slices.Sorted(maps.Keys(object)) {
		if fields.ByJSONName(name) == nil && !slices.Contains(known, name) {
			if !fieldName.MatchString(name) {
				name = "body" // what stands where a name belongs could be a code
			}
			faults = append(faults, &verify.FieldError{Field: name, Want: "is no field of this call, or holds one that is none; there are " + strings.Join(known, ", ")})
		} else if value := object[name]; value[0] != '"' && string(value) != "null" {
			faults = append(faults, &verify.FieldError{Field: name, Want: "must be a JSON string, in double quotes"})
		}
	}
	if faults == nil {
		faults = fieldErrors{{Field: "body", Want: "must be valid UTF-8, with each field once"}}
	}
	return faults
}

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

// forOrigins lets web pages of these origins call, "*" for any. A page of another one
// is told nothing, with which its browser does not let it call.
func forOrigins(origins []string, next http.Handler) http.Handler {
	if len(origins) == 0 {
		return next
	}
	return cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{http.MethodPost},
		AllowedHeaders: []string{
			"Authorization", "Content-Type", "Traceparent", "Tracestate",
			"Connect-Protocol-Version", "Connect-Timeout-Ms", "Grpc-Timeout", "X-Grpc-Web", "X-User-Agent",
		},
		ExposedHeaders: []string{"Grpc-Message", "Grpc-Status", "Grpc-Status-Details-Bin"},
		MaxAge:         7200, // seconds; no browser remembers longer
	}).Handler(next)
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
