# `make` lists the targets. CONTRIBUTING.md says how long each takes and what it needs.
BUF      := npx --yes @bufbuild/buf@1.75.0
LINT     := .bin/golangci-lint-2.15.0
GRPCURL  := .bin/grpcurl-1.9.4
SBOM     := .bin/cyclonedx-gomod-1.10.0
export npm_config_loglevel := error

.DEFAULT_GOAL := help
.PHONY: help build run unit check deps test test-mysql page screenshots page-figures test-consistency test-consistency-mysql test-cluster test-engine bench soak browser lint generate generated-is-current proto image fuzz deploy examples release

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the program, ./phone-number-service
	CGO_ENABLED=0 go build -trimpath -o phone-number-service .

run: ## Run the service for development, http://localhost:50511
	go run . dev

# The model explores pure functions. The race detector would take minutes and find nothing.
MODEL = ^TestModel_

# The packages that start no database, no browser and no built program, without internal/server,
# whose tests wait for real timeouts. The race detector needs a C compiler.
unit: ## Run the fast tests, which need only Go
	go test $(if $(shell command -v cc),-race) -skip '$(MODEL)' $$(go list ./... | grep -vE '/internal/(bench|e2e|monitortest|server|store|testutil/testengine)$$')
	go test -run '$(MODEL)' ./internal/verify

check: lint unit ## Run the linters and the unit tests

deps: deps-page deps-deploy ## Install the Debian packages that make test needs

# deps-PART installs the packages of one part: see tools/deps.sh.
deps-%:
	@tools/deps.sh $*

test: deps lint $(GRPCURL) ## Run all linters and tests; on Debian, install what they need
	go test -race -timeout 20m -skip '$(MODEL)' ./...
	go test -run '$(MODEL)' ./internal/verify
	$(MAKE) test-mysql
	cd test && go test ./aliyunsdk
	$(MAKE) deploy
	$(MAKE) page

# The other tests use MariaDB. The skipped ones take long and use SQLite.
test-mysql: deps-mysql ## Run the tests of the store and the program on MySQL
	[ ! -x .bin/mysql/mysqld ] || TEST_ENGINE=mysql go test -race -timeout 20m \
	 -skip 'TestDocs|TestSecretFile|TestCallersFile|TestCodeKey|TestSIGHUP|TestRole|TestReload_Cert' ./internal/store ./internal/e2e

# Kubernetes' types, compose's loader and systemd read the files. -count=1, since go test's
# cache does not watch files outside the module.
deploy: deps-deploy ## Test the files of deploy/
	cd test && go test -count=1 ./deploy

page: browser $(GRPCURL) ## Test the development page and examples/login in chromium
	cd internal/pagetest && npx playwright test --project tests && CHROMIUM=/usr/bin/chromium npx playwright test -c ../../examples/login

screenshots: browser deps-fonts ## Draw the images of docs/images
	cd internal/pagetest && FONTCONFIG_FILE=$(CURDIR)/internal/pagetest/fonts.conf npx playwright test --project screenshots --workers 1

page-figures: browser ## Measure how fast the development page is
	cd internal/pagetest && npx playwright test --project figures --workers 1

browser: deps-page
	cd internal/pagetest && npm ci
	ln -sfn ../../internal/pagetest/node_modules examples/login/node_modules

# Root may mount disks that lose power or fill up. Without root, the tests of these are skipped.
test-consistency: deps-tests deps-disks ## Test the guarantees on the built program under faults
	go test -count=1 -v -run WallClock ./internal/verify
	cd test && go test -count=1 -v -timeout 10m -skip '^Test(Galera|GroupReplication)' ./consistency

# The skipped tests do not depend on the server, or use SQLite. CI also skips the planted bugs here
# ($(SKIP)), because it finds them on MariaDB.
test-consistency-mysql: deps-tests deps-disks ## Run test-consistency on MySQL
	[ ! -x .bin/mysql/mysqld ] || (cd test && TEST_ENGINE=mysql go test -count=1 -v -timeout 15m \
	 -skip '^Test(Galera|GroupReplication|Hostile|Docs|Operations)|SQLite|/SQLite$(SKIP)' ./consistency)

test-cluster: deps-cluster ## Test the guarantees on Galera and MySQL Group Replication
	cd test && go test -count=1 -v -timeout 20m -run '^Test(Galera|GroupReplication)' ./consistency

# The data source name contains a password, so nothing prints it.
test-engine: export TEST_DATA_SOURCE_NAME := $(value DSN)
test-engine: ## Test the guarantees in an empty database of a running server: DSN=…
	@go run ./internal/testutil/testengine

# docs/performance.md explains the figures: ratios of the raw database's throughput.
bench: deps-tests ## Measure throughput and latency, and benchmark single functions
	go test -run '^$$' -bench . -benchtime 1x -timeout 60m ./internal/bench $(BENCH)
	go test -run '^$$' -bench . -benchmem ./internal/verify ./internal/sms ./internal/numberplan ./internal/server ./internal/store

soak: deps-tests ## Run half of the maximum load for ten minutes, and report growth
	go test -run '^$$' -bench Soak -benchtime 1x -timeout 60m ./internal/bench -soak 10m

lint: $(LINT) proto ## Run the linters
	for module in . tools test; do (cd $$module && go mod verify && go mod tidy -diff) || exit 1; done
	go vet ./...
	$(LINT) run ./...
	cd test && go vet ./... && ../$(LINT) run ./...

$(LINT):
	GOBIN=$(CURDIR)/.bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$(subst .bin/golangci-lint-,,$@)
	mv .bin/golangci-lint $@

$(GRPCURL):
	GOBIN=$(CURDIR)/.bin go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v$(subst .bin/grpcurl-,,$@)
	cp .bin/grpcurl $@ # page tests call it by its name

$(SBOM):
	GOBIN=$(CURDIR)/.bin go install github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v$(subst .bin/cyclonedx-gomod-,,$@)
	mv .bin/cyclonedx-gomod $@

proto: deps-proto ## Lint the proto, and compare it with the frozen wire contract
	$(BUF) lint
	$(BUF) breaking --against phonenumberservice/frozen.json

generate: deps-proto ## Generate code from the proto
	rm -f phonenumberservice/*.pb.go
	$(BUF) generate

generated-is-current: generate ## Generate, and fail if anything changed
	git status --porcelain -- phonenumberservice | tee -a /dev/stderr | (! grep -q .)

examples: deps-examples $(GRPCURL) ## Run the examples in every language against dev and serve
	cd test && PATH="$(CURDIR)/.bin:$$PATH" go test -count=1 -v -timeout 15m ./examples

fuzz: ## Run each fuzz target for ten seconds
	@for p in $$(go list ./internal/...); do for f in $$(go test -list '^Fuzz' $$p | grep ^Fuzz); do \
	 go test -run '^$$' -fuzz "^$$f$$" -fuzztime 10s -fuzzminimizetime 10x $$p || exit 1; done; done

image: ## Build the image with docker
	docker build --build-arg VERSION=$$(git describe --tags --always) -t phone-number-service .

# A commit gives the same archives on every machine with one version of Go. The SBOM (CycloneDX)
# also holds the hashes of the tool that wrote it.
release: $(SBOM) ## Build the archives of a release, with SBOMs, in dist/
	rm -rf dist
	set -e; version=$$(git describe --tags --always --dirty); for arch in amd64 arm64; do \
	 name=phone-number-service_$${version}_linux_$$arch; mkdir -p dist/$$name; \
	 GOOS=linux GOARCH=$$arch CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$$version" -o dist/$$name .; \
	 $(SBOM) bin -json -std -licenses -noserial -notimestamp -version $$version -output dist/$$name.cdx.json dist/$$name/phone-number-service; \
	 cp LICENSE README.md phonenumberservice.sql deploy/systemd/phone-number-service.service dist/$$name; \
	 tar -C dist --format=ustar --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime=@$$(git log -1 --format=%ct) -cf dist/$$name.tar $$name; \
	 gzip -9n dist/$$name.tar; rm -r dist/$$name; \
	done
	cd dist && sha256sum *.tar.gz *.cdx.json >SHA256SUMS
