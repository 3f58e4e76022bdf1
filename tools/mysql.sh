#!/bin/sh
# Unpacks MySQL of Debian sid in .bin/mysql, with the libraries it needs, because no stable Debian
# has MySQL. It installs nothing and needs no root. The program is .bin/mysql/mysqld.
set -eu
cd "$(dirname "$0")/.."
mkdir -p .bin
work=$(mktemp -d "$PWD/.bin/mysql.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/mysql"
touch "$work/status" # no package is installed, so apt downloads all

# shellcheck disable=SC2016 # apt replaces $(REPO_URI)
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 'Component: main' | head -n 1)
[ -n "$mirror" ]
cat >"$work/sid.sources" <<.
Types: deb
URIs: $mirror
Suites: sid
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
.
cat >"$work/apt.conf" <<.
Dir::State "$work/state";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
Dir::Etc::sourcelist "$work/sid.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Install-Recommends "0";
APT::Sandbox::User "";
.
apt-get -c "$work/apt.conf" -qq update
apt-get -c "$work/apt.conf" -qq --download-only install mysql-server-core >/dev/null
for package in "$work"/cache/archives/*.deb; do
  case $package in */perl*) continue ;; esac # only scripts need it
  dpkg-deb -x "$package" "$work/mysql"
done
cat >"$work/mysql/mysqld" <<'.'
#!/bin/sh
# Runs mysqld with its own libraries. The first argument stays first, since it can be --no-defaults.
first=$1
shift
root=$(dirname "$(readlink -f "$0")")
lib=$(echo "$root"/usr/lib/*-linux-gnu*)
exec "$lib"/ld-linux*.so.* --library-path "$lib" --argv0 "$root/usr/sbin/mysqld" \
  "$root/usr/sbin/mysqld" "$first" --basedir="$root/usr" "$@"
.
chmod +x "$work/mysql/mysqld"
"$work/mysql/mysqld" --no-defaults --version
rm -rf .bin/mysql
mv "$work/mysql" .bin/mysql
