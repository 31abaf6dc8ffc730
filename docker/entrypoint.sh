#!/bin/sh
# The image's entry point: `docker run IMAGE stage latents ...` is loraline; Prefect's workers start runs with a whole
# command line of their own, and a person may want a shell.
set -eu
mkdir -p "$HOME" "$HF_HOME" "$PREFECT_HOME" || {
    echo "loraline: $HOME, \$HF_HOME and \$PREFECT_HOME must be writable: mount a volume or a tmpfs on /tmp" >&2
    exit 73
}
case ${1-} in
    prefect | python | python3 | sh) exec "$@" ;;
    *) exec loraline "$@" ;;
esac
