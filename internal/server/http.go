package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/rs/cors"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/liulinhuai/phone-number-service/internal/verify"
	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// newHTTPServer returns the server for the HTTP/1.1 connections of the port. It serves the two calls
// as gRPC-Web, as gRPC, and in the Connect protocol, which includes plain JSON.
func newHTTPServer(svc pb.PhoneNumberServiceServer, handle handler, c Config) *http.Server {
	const sendSMS, valid = pb.PhoneNumberService_SendSMS_FullMethodName, pb.PhoneNumberService_Valid_FullMethodName
	mux := http.NewServeMux()
	mux.Handle(sendSMS, withCORS(c.Origins, unaryHandler(sendSMS, handle, c, svc.SendSMS)))
	mux.Handle(valid, withCORS(c.Origins, unaryHandler(valid, handle, c, svc.Valid)))
	errorWriter := connect.NewErrorWriter()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/" {
			w = statusWriter{w, http.StatusNotImplemented, http.StatusNotFound}
			errorWriter.Write(w, r, connectError(unknownPath.status())) //nolint:errcheck // the client disconnected
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "phone-number-service %s\n\nPOST %s\nPOST %s\n\nas gRPC, gRPC-Web or JSON on this port. Documentation: https://github.com/liulinhuai/phone-number-service\n",
			c.Version, sendSMS, valid)
	})
	return &http.Server{
		Handler: mux,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, acceptedAtKey{}, time.Now())
		},
		ReadHeaderTimeout: c.Limits.ConnectionTimeout,
		ReadTimeout:       c.Limits.ReadTimeout,
		WriteTimeout:      c.Limits.CallTimeout + 10*time.Second,
		IdleTimeout:       c.Limits.IdleTimeout,
		MaxHeaderBytes:    max(c.Limits.HeaderBytes-4<<10, 1), // net/http allows 4 KiB more
		ErrorLog:          slog.NewLogLogger(c.Telemetry.Log.Handler(), slog.LevelDebug),
	}
}

// unaryHandler serves one method over HTTP/1.1. Each call runs through handle, the same interceptors as
// a call over gRPC, even if the request is invalid. Then the library connect (connectrpc.com/connect)
// writes the result. It gets an empty request without the client's headers and message, so that it never
// rejects a request with its own error text.
func unaryHandler[Req, Res any](method string, handle handler, config Config, f func(context.Context, *Req) (*Res, error)) http.Handler {
	writer := connect.NewUnaryHandler(method, func(ctx context.Context, _ *connect.Request[struct{}]) (*connect.Response[Res], error) {
		r := ctx.Value(resultKey{}).(result)
		if r.err != nil {
			e := connectError(status.Convert(r.err))
			setHeaders(e.Meta(), r.metadata)
			return nil, e
		}
		res := connect.NewResponse(r.message.(*Res))
		setHeaders(res.Header(), r.metadata)
		return res, nil
	}, connect.WithCodec(codec{"json", marshalJSON}), connect.WithCodec(codec{"json; charset=utf-8", marshalJSON}),
		connect.WithCodec(codec{"proto", proto.Marshal}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		if acceptedAt, ok := r.Context().Value(acceptedAtKey{}).(time.Time); ok && start.Sub(acceptedAt) > config.Limits.ConnectionAge {
			w.Header().Set("Connection", "close")
		}
		q := readRequest(w.Header(), r, config)
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		c := &call{peer: host, tls: r.TLS, fullMethod: method, headers: metadata.MD{
			"authorization": r.Header.Values("Authorization"),
			"traceparent":   r.Header.Values("Traceparent"),
			"tracestate":    r.Header.Values("Tracestate"),
		}}
		for _, name := range requestMetadata {
			if values := r.Header.Values(name); values != nil {
				c.headers[name] = values
			}
		}
		c.handler = func(ctx context.Context, _ any) (any, error) {
			if q.err != nil {
				return nil, q.err
			}
			request := new(Req)
			if err := q.format.unmarshal(q.message, any(request).(proto.Message)); err != nil {
				return nil, err
			}
			return f(ctx, request)
		}
		ctx, cancel := context.WithDeadline(context.WithValue(r.Context(), callKey{}, c), start.Add(q.timeout))
		defer cancel()
		message, err := handle(ctx, c)
		if q.httpStatus != 0 {
			w = statusWriter{w, http.StatusBadRequest, q.httpStatus}
		}
		empty := &http.Request{
			Method: http.MethodPost, URL: &url.URL{Path: method}, ContentLength: int64(q.format.prefixBytes),
			Header: http.Header{"Content-Type": {q.contentType}}, Body: io.NopCloser(bytes.NewReader(make([]byte, q.format.prefixBytes))),
		}
		// Do not pass ctx: if it is done, connect writes its own error.
		writer.ServeHTTP(w, empty.WithContext(context.WithValue(context.Background(), resultKey{}, result{message, err, c.response})))
	})
}

// result is the result of a call, which connect writes.
type result struct {
	message  any
	err      error
	metadata metadata.MD
}

func setHeaders(h http.Header, md metadata.MD) {
	for name, values := range md {
		h[http.CanonicalHeaderKey(name)] = values
	}
}

type (
	resultKey     struct{}
	acceptedAtKey struct{}
)

// httpRequest is a request over HTTP/1.1 after its body was read.
type httpRequest struct {
	format      format
	contentType string        // of the response
	timeout     time.Duration // of the whole call
	message     []byte        // without the prefix of gRPC, decompressed
	err         error         // set if the request is invalid
	httpStatus  int           // for err; 0 for connect's default
}

// format is the encoding of a message over HTTP/1.1: protobuf or JSON, with or without the prefix of gRPC.
type format struct {
	unmarshal   func([]byte, proto.Message) error
	prefixBytes int // 0 or grpcPrefixBytes
}

// grpcPrefixBytes is the size of the prefix of gRPC's Length-Prefixed-Message: the compressed flag and
// the message length.
const grpcPrefixBytes = 5

var (
	// formats has the format of each media type.
	formats = map[string]format{
		"application/json":           {unmarshalJSON, 0},
		"application/proto":          {unmarshalProto, 0},
		"application/grpc-web":       {unmarshalProto, grpcPrefixBytes},
		"application/grpc-web+proto": {unmarshalProto, grpcPrefixBytes},
		"application/grpc-web+json":  {unmarshalJSON, grpcPrefixBytes},
		"application/grpc":           {unmarshalProto, grpcPrefixBytes},
		"application/grpc+proto":     {unmarshalProto, grpcPrefixBytes},
		"application/grpc+json":      {unmarshalJSON, grpcPrefixBytes},
	}
	connectTimeout = regexp.MustCompile(`^[0-9]{1,10}$`)
	grpcTimeout    = regexp.MustCompile(`^[0-9]{1,8}[HMSmun]$`)
	timeoutUnits   = map[byte]time.Duration{
		'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond,
	}
)

// readRequest reads and checks a request. It sets err of its result if the request is invalid, or comes
// from a web page that may not make calls. The response has the same format, or JSON if the format is
// unknown. readRequest sets the headers Allow and Accept-Post of the response in header.
func readRequest(header http.Header, r *http.Request, config Config) *httpRequest {
	mediaType, parameters, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	mediaType = strings.ToLower(strings.TrimSpace(mediaType))
	switch mediaType {
	case "", "application/x-www-form-urlencoded", "text/plain":
		// The type is missing or a default of curl or browsers: the body is read as JSON, so that
		// "curl -d" works without headers. A request from a page of another origin is rejected (CSRF),
		// because a browser sends these types without a CORS preflight.
		if !IsCrossOrigin(r) {
			mediaType, parameters = "application/json", ""
		}
	}
	f, known := formats[mediaType]
	q := &httpRequest{format: f, contentType: mediaType, timeout: config.Limits.CallTimeout}
	if !known || r.Method != http.MethodPost {
		q.format, q.contentType = formats["application/json"], "application/json"
	} else if mediaType == "application/json" && strings.Contains(strings.ToLower(parameters), "charset") {
		q.contentType = "application/json; charset=utf-8" // connect accepts this exact form
	}
	timeoutName, timeoutPattern, timeoutUnit, encodingName := "Connect-Timeout-Ms", connectTimeout, "m", "Content-Encoding"
	timeoutWant := "must be milliseconds, 1 to 10 digits, or left out"
	if f.prefixBytes > 0 {
		timeoutName, timeoutPattern, timeoutUnit, encodingName = "Grpc-Timeout", grpcTimeout, "", "Grpc-Encoding"
		timeoutWant = "must be 1 to 8 digits and one of H, M, S, m, u, n, or left out"
	}
	timeout, encoding := r.Header.Get(timeoutName), strings.ToLower(r.Header.Get(encodingName))
	version := r.Header.Get("Connect-Protocol-Version")
	switch {
	case r.Method != http.MethodPost:
		q.err = invalidField("method", "must be POST")
		q.httpStatus = http.StatusMethodNotAllowed
		header.Set("Allow", http.MethodPost)
	case !config.AnyPage && fromForbiddenOrigin(r, config.Origins):
		q.err = originNotAllowed
	case !known:
		q.err = invalidField("Content-Type", "must be application/json, application/proto, application/grpc or application/grpc-web, the last two with or without +proto or +json; a web page must declare it")
		q.httpStatus = http.StatusUnsupportedMediaType
		header.Set("Accept-Post", strings.Join(slices.Sorted(maps.Keys(formats)), ", "))
	case f.prefixBytes == 0 && version != "" && version != "1":
		q.err = invalidField("Connect-Protocol-Version", "must be 1, or left out")
	case timeout != "" && !timeoutPattern.MatchString(timeout):
		q.err = invalidField(timeoutName, timeoutWant)
	case encoding != "" && encoding != "identity" && encoding != "gzip":
		q.err = unknownEncoding
	default:
		if timeout != "" {
			q.timeout = min(q.timeout, parseTimeout(timeout+timeoutUnit))
		}
		q.message, q.err = f.read(r.Body, encoding == "gzip", config.Limits.MessageBytes)
	}
	return q
}

// parseTimeout parses a timeout that matches grpcTimeout, or connectTimeout and a unit.
func parseTimeout(text string) time.Duration {
	last := len(text) - 1
	unit := timeoutUnits[text[last]]
	n, _ := strconv.ParseInt(text[:last], 10, 64)
	return time.Duration(min(n, math.MaxInt64/int64(unit))) * unit
}

// invalidField returns the error of one invalid field. The client gets the text of want.
func invalidField(name, want string) error {
	return fieldErrors{{Field: name, Want: want}}
}

// read returns the message in a body. The client gets the texts of its errors.
func (f format) read(body io.Reader, compressed bool, maxBytes int) ([]byte, error) {
	maxBody := maxBytes + f.prefixBytes
	b, err := io.ReadAll(io.LimitReader(body, int64(maxBody)+1))
	if err != nil {
		return nil, bodyError(err)
	}
	if len(b) > maxBody {
		return nil, messageTooLarge
	}
	if f.prefixBytes > 0 {
		if len(b) < grpcPrefixBytes || b[0] > 1 || b[0] == 1 && !compressed || int(binary.BigEndian.Uint32(b[1:])) != len(b)-grpcPrefixBytes {
			return nil, invalidField("body", "must be one message, after its flag and its length, and compressed only as Grpc-Encoding says")
		}
		compressed = b[0] == 1
		b = b[grpcPrefixBytes:]
	}
	if !compressed || len(b) == 0 {
		return b, nil
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(b))
	if err == nil {
		b, err = io.ReadAll(io.LimitReader(unzipped, int64(maxBytes)+1))
	}
	if err != nil {
		return nil, invalidField("body", "must be gzip, as its encoding says")
	}
	if len(b) > maxBytes {
		return nil, messageTooLarge
	}
	return b, nil
}

// bodyError converts an error of reading a body. It distinguishes a peer that disconnected from a body
// that is late or malformed. It does not return the text of err, which contains addresses.
func bodyError(err error) error {
	var network net.Error
	isNetwork := errors.As(err, &network)
	switch {
	case isNetwork && network.Timeout():
		return invalidField("body", "must arrive in the time that this service has for a request")
	case isNetwork, errors.Is(err, io.ErrUnexpectedEOF):
		return verify.ErrCallerGone
	}
	return invalidField("body", "must be valid chunks of HTTP/1.1, if the header Transfer-Encoding is chunked")
}

// statusWriter writes the HTTP status newStatus if a handler writes oldStatus.
type statusWriter struct {
	http.ResponseWriter
	oldStatus, newStatus int
}

func (w statusWriter) WriteHeader(status int) {
	if status == w.oldStatus {
		status = w.newStatus
	}
	w.ResponseWriter.WriteHeader(status)
}

// codec implements connect.Codec. Unmarshal does nothing, because connect gets an empty message.
type codec struct {
	name    string
	marshal func(proto.Message) ([]byte, error)
}

func (c codec) Name() string                  { return c.name }
func (c codec) Marshal(m any) ([]byte, error) { return c.marshal(m.(proto.Message)) }
func (codec) Unmarshal([]byte, any) error     { return nil }

// marshalJSON also writes fields with default values, such as "valid": false.
var marshalJSON = protojson.MarshalOptions{EmitDefaultValues: true, UseProtoNames: true}.Marshal

func unmarshalProto(b []byte, m proto.Message) error {
	if proto.Unmarshal(b, m) != nil {
		return invalidField("body", "must be this call's protobuf message, its texts valid UTF-8")
	}
	return nil
}

var fieldName = regexp.MustCompile(`^[A-Za-z_]{1,40}$`)

// unmarshalJSON unmarshals proto JSON. It rejects unknown fields. Its errors list each invalid field, and
// never contain a value, which can be a code.
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
		return invalidField("body", "must be one JSON object with the fields "+strings.Join(known, ", "))
	}
	var invalid fieldErrors
	for _, name := range slices.Sorted(maps.Keys(object)) {
		if fields.ByJSONName(name) == nil && !slices.Contains(known, name) {
			if !fieldName.MatchString(name) {
				name = "body" // the name can contain a code
			}
			invalid = append(invalid, &verify.FieldError{Field: name, Want: "is not a field of this call, or contains a name that is not a field; the fields are " + strings.Join(known, ", ")})
		} else if value := object[name]; value[0] != '"' && string(value) != "null" {
			invalid = append(invalid, &verify.FieldError{Field: name, Want: "must be a JSON string, in double quotes"})
		}
	}
	if invalid == nil {
		return invalidField("body", "must be valid UTF-8, with each field once")
	}
	return invalid
}

// connectError converts a status with its details to an error of the library connect, which has the
// same codes.
func connectError(s *status.Status) *connect.Error {
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

// withCORS sets the CORS headers that allow web pages of origins to make calls ("*" for any origin). For
// other origins it sets none, so that browsers block their calls.
func withCORS(origins []string, next http.Handler) http.Handler {
	if len(origins) == 0 {
		return next
	}
	return cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{http.MethodPost},
		AllowedHeaders: append([]string{
			"Authorization", "Content-Type", "Traceparent", "Tracestate",
			"Connect-Protocol-Version", "Connect-Timeout-Ms", "Grpc-Timeout", "X-Grpc-Web", "X-User-Agent",
		}, requestMetadata...),
		ExposedHeaders: append([]string{"Grpc-Message", "Grpc-Status", "Grpc-Status-Details-Bin"}, responseMetadata...),
		MaxAge:         7200, // seconds; the longest that Chromium accepts
	}).Handler(next)
}

// fromForbiddenOrigin reports whether a request comes from a web page whose origin is not in origins.
// Only browsers send Origin and Sec-Fetch-Site. It does not accept an Origin that equals Host, because
// with DNS rebinding both are the attacker's name.
func fromForbiddenOrigin(r *http.Request, origins []string) bool {
	from := r.Header.Values("Origin")
	for _, origin := range from {
		if !slices.Contains(origins, origin) {
			return true
		}
	}
	site := r.Header.Get("Sec-Fetch-Site")
	return len(from) == 0 && site != "" && site != "none"
}

// IsCrossOrigin reports whether a request comes from a web page of another origin than Host.
func IsCrossOrigin(r *http.Request) bool {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		return true
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	u, err := url.Parse(origin)
	return err != nil || !strings.EqualFold(u.Host, r.Host)
}
