#!/bin/sh
# Installs the packages that parts of the Makefile need: tools/deps.sh PART…
# On Debian it installs the missing packages. On other systems it prints them and fails.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
missing=   # packages to install
downloads= # packages to unpack in .bin, since installing starts a server
mysql=     # yes if MySQL is missing

# need PACKAGE FILE-OR-COMMAND adds the package if the file or command is missing.
need() {
  command -v "$2" >/dev/null || [ -e "$2" ] && return
  case "$missing " in *" $1 "*) ;; *) missing="$missing $1" ;; esac
}

need_part() {
  case $1 in
  proto) need npm npx ;; # for buf
  tests)
    need_part proto
    need mariadb-server-core mariadbd
    need_part mysql
    need "gcc libc6-dev" cc # for -race
    need curl curl            # for the commands of the documents
    command -v prometheus >/dev/null || [ -e .bin/prometheus/usr/bin/promtool ] ||
      downloads="$downloads prometheus"
    ;;
  mysql) [ -x .bin/mysql/mysqld ] || mysql=yes ;;
  deploy) need systemd systemd-analyze ;;
  page)
    need_part tests
    need chromium /usr/bin/chromium
    ;;
  fonts)
    need fonts-inter /usr/share/fonts/opentype/inter
    need fonts-jetbrains-mono /usr/share/fonts/truetype/jetbrains-mono
    need fonts-noto-cjk /usr/share/fonts/opentype/noto
    ;;
  disks)
    need e2fsprogs mkfs.ext4
    need mount mount
    ;;
  cluster)
    need_part mysql
    need mariadb-server-core mariadbd
    need galera-4 /usr/lib/galera/libgalera_smm.so
    need rsync rsync
    need procps ps
    need iproute2 ip
    [ -e .bin/galera/downloaded ] || downloads="$downloads mariadb-server mariadb-client-core"
    ;;
  examples)
    need mariadb-server-core mariadbd
    need npm npm
    need curl curl
    need default-jdk-headless javac
    need maven mvn
    need python3 python3
    python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
    need php-cli php
    php -m 2>/dev/null | grep -q curl || missing="$missing php-curl"
    need ruby ruby
    ruby -e 'require "grpc"' 2>/dev/null || missing="$missing ruby-grpc"
    need protobuf-compiler-grpc grpc_ruby_plugin
    need g++ g++
    need cmake cmake
    need libgrpc++-dev /usr/include/grpcpp/grpcpp.h
    need libprotobuf-dev /usr/include/google/protobuf/any.h
    need "rustc-web cargo-web" cargo
    need "mono-mcs mono-runtime" mcs
    need libmono-system-net-http4.0-cil /usr/lib/mono/4.5/System.Net.Http.dll
    need libmono-system-runtime-serialization4.0-cil /usr/lib/mono/4.5/System.Runtime.Serialization.dll
    need libmono-system-xml-linq4.0-cil /usr/lib/mono/4.5/System.Xml.Linq.dll
    need jq jq
    ;;
  image)
    need buildah buildah
    need busybox-static /bin/busybox
    need procps pgrep
    need ca-certificates /etc/ssl/certs/ca-certificates.crt
    ;;
  *) echo "deps.sh: unknown part $1" >&2 && exit 2 ;;
  esac
}

# get_mysql fails only in CI. Elsewhere, tests skip MySQL if the machine cannot get it.
get_mysql() {
  if [ -n "$mysql" ] && ! tools/mysql.sh; then
    echo "deps.sh: cannot get MySQL on this machine, which takes apt with an index of Debian; tests skip it" >&2
    [ -z "${CI:-}" ] || exit 1
  fi
}

for part; do need_part "$part"; done
if [ -z "$missing$downloads" ]; then
  get_mysql
  exit
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  echo "deps.sh: install the contents of these Debian packages, then run make again:$missing$downloads" >&2
  exit 1
fi

sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
$sudo apt-get update -qq
if [ -n "$missing" ]; then
  # shellcheck disable=SC2086 # a list of words
  $sudo apt-get install -y -qq --no-install-recommends $missing
fi
download() { # DIRECTORY PACKAGE…
  mkdir -p ".bin/$1"
  (cd ".bin/$1" && shift && apt-get -qq -o APT::Sandbox::User=root download "$@")
}
case $downloads in *prometheus*)
  download prometheus prometheus
  dpkg-deb -x .bin/prometheus/prometheus_*.deb .bin/prometheus
  ;;
esac
case $downloads in *mariadb-server*) # only their scripts are used
  download galera mariadb-server mariadb-client-core
  touch .bin/galera/downloaded
  ;;
esac
get_mysql
