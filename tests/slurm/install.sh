#!/usr/bin/env bash
# Installs what the virtual cluster needs from Debian's or Ubuntu's archive. Needs root; starts no service.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2)
missing=()
for package in "${packages[@]}"; do
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) = installed ]] || missing+=("$package")
done
((${#missing[@]} > 0)) || exit 0

# Tells the packages' scripts to start no daemon: the tests start their own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends "${missing[@]}"
