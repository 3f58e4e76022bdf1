# One command does everything: make test. See CONTRIBUTING.md.
BUF      := npx --yes @bufbuild/buf@1.75.0
LINT     := .bin/golangci-lint-2.15.0
GRPCURL  := .bin/grpcurl-1.9.4
SBOM     := .bin/cyclonedx-gomod-1.10.0
SUDO     := $(if $(filter 0,$(shell id -u)),,sudo)
export npm_config_loglevel := error

.PHONY: test page screenshots page-figures prove prove-cluster bench soak tools browser lint generate generated-is-current proto image fuzz deploy release

# All checks and all tests, installing what they need on Debian.
test: tools lint
	go test -race -timeout 20m ./...
	cd internal/sms/oracle && go vet ./... && go test ./...
	$(MAKE) deploy
	$(MAKE) page

# The files of deploy/ against what reads them: Kubernetes' types, compose's loader, systemd.
# Not from the cache, which does not watch files outside the module.
deploy:
	@command -v systemd-analyze >/dev/null || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends systemd; }
	cd internal/deploytest && go test -count=1 .

# The page of development in a real browser, and the example that is tested by it.
page: browser $(GRPCURL)
	cd internal/pagetest && npx playwright test --project tests && CHROMIUM=/usr/bin/chromium npx playwright test -c ../../examples/login

# The images of the page in docs/.
screenshots: browser
	@ls /usr/share/fonts/opentype/inter /usr/share/fonts/truetype/jetbrains-mono /usr/share/fonts/opentype/noto >/dev/null 2>&1 || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends fonts-inter fonts-jetbrains-mono fonts-noto-cjk; }
	cd internal/pagetest && FONTCONFIG_FILE=$(CURDIR)/internal/pagetest/fonts.conf npx playwright test --project screenshots --workers 1

# How fast the page is here.
page-figures: browser
	cd internal/pagetest && npx playwright test --project figures --workers 1

browser: tools
	@ls /usr/bin/chromium /usr/bin/curl >/dev/null 2>&1 || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium curl; }
	cd internal/pagetest && npm ci
	ln -sfn ../../internal/pagetest/node_modules examples/login/node_modules

# The proofs of the guarantees on the built program: docs/guarantees.md. As root, who may
# mount disks that lose power or fill up.
prove: tools
	@ls /usr/sbin/mkfs.ext4 /usr/bin/mount >/dev/null 2>&1 || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends e2fsprogs mount; }
	go test -count=1 -v -run WallClock ./internal/verify
	cd internal/prove && go test -count=1 -v -timeout 10m -skip '^TestCluster' .

# The same on three Galera nodes: docs/scaling.md. As root, on Debian. Of mariadb-server
# and mariadb-client-core only scripts are used: to install the server would start one.
prove-cluster:
	@ls /usr/sbin/mariadbd /usr/lib/galera/libgalera_smm.so /usr/bin/rsync /usr/bin/ps /usr/sbin/ip >/dev/null 2>&1 || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends mariadb-server-core galera-4 rsync procps iproute2; }
	@test -e .bin/galera/downloaded || \
	 { $(SUDO) apt-get update -qq && mkdir -p .bin/galera && cd .bin/galera && apt-get -qq -o APT::Sandbox::User=root download mariadb-server mariadb-client-core && touch downloaded; }
	cd internal/prove && go test -count=1 -v -timeout 10m -run '^TestCluster' .

# How fast it is here, as ratios of what the database alone does: docs/performance.md.
# Of the benchmarks of single functions, one round.
bench: tools
	go test -run '^$$' -bench . -benchtime 1x -timeout 60m ./internal/bench $(BENCH)
	go test -run '^$$' -bench . -benchmem ./internal/verify ./internal/sms ./internal/numberplan ./internal/server ./internal/store

# Whether anything grows in ten minutes at half of what it can.
soak: tools
	go test -run '^$$' -bench Soak -benchtime 1x -timeout 60m ./internal/bench -soak 10m

tools:
	@command -v npx >/dev/null || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends npm; } # for buf
	@command -v mariadbd >/dev/null || test -x /usr/sbin/mariadbd || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends mariadb-server-core; }
	@command -v cc >/dev/null || \
	 { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends gcc libc6-dev; } # for -race
	@command -v prometheus >/dev/null || test -e .bin/prometheus/usr/bin/promtool || \
	 { $(SUDO) apt-get update -qq && mkdir -p .bin/prometheus && cd .bin/prometheus && apt-get -qq -o APT::Sandbox::User=root download prometheus && dpkg-deb -x prometheus_*.deb .; } # to install it would start it

lint: $(LINT) proto
	for module in . tools internal/sms/oracle internal/prove internal/deploytest; do (cd $$module && go mod verify && go mod tidy -diff) || exit 1; done
	go vet ./...
	$(LINT) run ./...
	cd internal/prove && go vet ./... && ../../$(LINT) run ./...
	cd internal/deploytest && go vet ./... && ../../$(LINT) run ./...

$(LINT):
	GOBIN=$(CURDIR)/.bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$(subst .bin/golangci-lint-,,$@)
	mv .bin/golangci-lint $@

$(GRPCURL):
	GOBIN=$(CURDIR)/.bin go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v$(subst .bin/grpcurl-,,$@)
	cp .bin/grpcurl $@ # page tests call it by its name

$(SBOM):
	GOBIN=$(CURDIR)/.bin go install github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v$(subst .bin/cyclonedx-gomod-,,$@)
	mv .bin/cyclonedx-gomod $@

# The wire contract is well-formed, and nothing that a client relies on changed.
proto:
	$(BUF) lint
	$(BUF) breaking --against phonenumberservice/frozen.json

generate:
	rm -f phonenumberservice/*.pb.go
	$(BUF) generate

generated-is-current: generate
	git status --porcelain -- phonenumberservice | tee -a /dev/stderr | (! grep -q .)

# Every fuzz target for a little while.
fuzz:
	@for p in $$(go list ./internal/...); do for f in $$(go test -list '^Fuzz' $$p | grep ^Fuzz); do \
	 go test -run '^$$' -fuzz "^$$f$$" -fuzztime 20s -fuzzminimizetime 10x $$p || exit 1; done; done

image:
	docker build --build-arg VERSION=$$(git describe --tags --always) -t phone-number-service .

# The archives of a release, in dist/, and of each program what is in it (CycloneDX): the same
# bytes wherever a commit is built with one version of Go. So the time is the commit's, and the
# hashes of cyclonedx-gomod's own file, which differ by where it was built, are left out.
release: $(SBOM)
	rm -rf dist
	set -e; version=$$(git describe --tags --always --dirty); for arch in amd64 arm64; do \
	 name=phone-number-service_$${version}_linux_$$arch; mkdir -p dist/$$name; \
	 GOOS=linux GOARCH=$$arch CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$$version" -o dist/$$name .; \
	 $(SBOM) bin -json -std -noserial -notimestamp -version $$version -output dist/$$name.cdx.json dist/$$name/phone-number-service; \
	 sed -i -e '/^    "tools": /,/"externalReferences"/{/"hashes"/,/\]/d}' -e 's/^  "metadata": {$$/&\n    "timestamp": "'$$(git log -1 --format=%cI)'",/' dist/$$name.cdx.json; \
	 cp LICENSE README.md phonenumberservice.sql deploy/systemd/phone-number-service.service dist/$$name; \
	 tar -C dist --format=ustar --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime=@$$(git log -1 --format=%ct) -cf dist/$$name.tar $$name; \
	 gzip -9n dist/$$name.tar; rm -r dist/$$name; \
	done
	cd dist && sha256sum *.tar.gz *.cdx.json >SHA256SUMS
