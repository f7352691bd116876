#!/bin/sh
# Installs the Debian packages named on the command line that are missing, after saying which and asking.
set -eu
missing=""
for package in "$@"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done
[ -z "$missing" ] && exit 0
echo "make test-system needs these Debian packages, which are missing:$missing"
if [ "${CI:-}" != true ]; then
  printf "Install them with apt-get? [y/N] "
  read -r answer
  case "$answer" in y | Y | yes) ;; *) echo "not installed; nothing was run" >&2; exit 4 ;; esac
fi
# Some of them are services, which the tests start themselves where they want them: none is started by its installation.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT INT TERM
fi
apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
