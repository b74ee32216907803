#!/bin/sh
# Install what is missing of PROGRAM:PACKAGE ... from Debian, as root, starting no daemons. Nothing to do: no network.
PATH=$PATH:/usr/sbin:/sbin
wanted=
for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null || wanted="$wanted ${pair#*:}"
done
[ -n "$wanted" ] || exit 0
echo "missing:$wanted"
[ "$(id -u)" = 0 ] || { echo "installing needs root" && exit 1; }
command -v apt-get >/dev/null || { echo "installing needs apt-get" && exit 1; }

# Packages' own scripts start no daemon where this says no; a site's own policy is put back.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update >/dev/null
# One by one: what one lacks is no reason to go without the others.
failed=0
for package in $wanted; do
    apt-get -qq install --yes --no-install-recommends "$package" >/dev/null || failed=1
done
exit $failed
