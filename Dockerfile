# Builds a static program that does not run as root, for amd64 and arm64:
#   docker build -t phone-number-service .
#   docker buildx build --platform linux/amd64,linux/arm64 -t phone-number-service .
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
ARG TARGETOS=linux
ARG TARGETARCH=amd64
ARG VERSION=
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /phone-number-service .

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /phone-number-service /phone-number-service
USER 65532:65532
EXPOSE 50511
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s CMD ["/phone-number-service", "healthcheck"]
ENTRYPOINT ["/phone-number-service"]
