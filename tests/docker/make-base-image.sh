#!/bin/bash
# make-base-image.sh [IMAGE]: a local stand-in for an official python:3.11-slim image, out of Debian packages alone, for
# machines that reach no registry. Mirror, certificates and pip's settings are those of the machine that runs it, so the
# image is for tests on that machine: never publish or cache it.
#
# Wants root, mmdebstrap, and an engine (DOCKER names the client, DOCKER_HOST the engine).
#
# shellcheck disable=SC2016  # mmdebstrap expands "$1" in its hooks, apt its own $(...)
set -euo pipefail
image=${1:-python:3.11-slim-bookworm}
docker=${DOCKER:-docker}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/ca"
cp /usr/local/share/ca-certificates/*.crt "$work/ca/" 2>/dev/null || true
cat > "$work/pip.conf" <<'P'
[global]
cert = /etc/ssl/certs/ca-certificates.crt
disable-pip-version-check = true
timeout = 180
P
# the machine's own sources, in one-line form
apt-get indextargets --format 'deb $(SITE) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' | sort -u > "$work/sources"
clean=$(find /etc/apt/apt.conf.d -name 'docker-*' -printf '%p ' 2>/dev/null || true)
hooks=(
  --customize-hook='mkdir -p "$1/usr/local/share/ca-certificates"'
  --customize-hook="sync-in $work/ca /usr/local/share/ca-certificates"
  --customize-hook='chroot "$1" update-ca-certificates >/dev/null'
  --customize-hook="copy-in $work/pip.conf /etc"
)
if [ -n "$clean" ]; then
  hooks+=(--customize-hook="copy-in $clean /etc/apt/apt.conf.d")
fi
# the official image has its Python in /usr/local/bin, and lets pip install into it
hooks+=(--customize-hook='ln -s /usr/bin/python3 "$1/usr/local/bin/python"; ln -s /usr/bin/python3 "$1/usr/local/bin/python3"; rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED')
# apt's own index of packages is a quarter of the image, and made again when it is wanted
hooks+=(--customize-hook='rm -f "$1"/var/cache/apt/*.bin')
mmdebstrap --quiet --variant=minbase --format=tar \
  --include=python3,python3-venv,python3-pip,ca-certificates \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  "${hooks[@]}" bookworm "$work/base.tar" "$work/sources"
"$docker" import --change 'CMD ["python3"]' --change 'ENV LANG=C.UTF-8' \
  --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' "$work/base.tar" "$image"
