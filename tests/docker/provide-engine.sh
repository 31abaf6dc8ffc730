#!/bin/sh
# Sees to it that the tests with containers can run: installs an engine from Debian's packages where there is none and
# this is root, and starts one for a moment. With --build it also makes the image that they start with. PYTHON names the
# Python to look with.
#
# Exit code 0: they can run. 69: they cannot, and the last line says why. Another: the image could not be built.
set -u
cd "$(dirname "$0")/../.." || exit 69
PATH=$PATH:/usr/sbin
python=${PYTHON:-python3}
missing=
# A client alone may be there.
command -v dockerd > /dev/null || missing="$missing docker.io"
command -v iptables > /dev/null || missing="$missing iptables"  # the engine will not start without
command -v mmdebstrap > /dev/null || missing="$missing mmdebstrap"  # makes the base image where no registry is reached
if [ -z "${DOCKER_HOST:-}" ] && [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "no docker engine:$missing cannot be installed here (not root, or not Debian)" >&2
        exit 69
    fi
    # shellcheck disable=SC2086  # several words are meant
    if ! said=$({ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $missing; } 2>&1); then
        echo "$said" | tail -n 5 >&2
        echo "no docker engine:$missing cannot be installed" >&2
        exit 69
    fi
fi
exec "$python" -m tests.docker.engine "$@"
