#!/bin/sh
# deploy/apply.sh KIND [GPUS]: makes the work pools cpu and gpu of a kind (process, docker, kubernetes, ecs, vertex), all
# deployments, and what ends runs that nobody works on. May be run again at any time: everything is updated, sensors
# (deploy/sensor.py) with their configurations and schedules kept.
#
# PREFECT_API_URL      the server
# LORALINE_IMAGE       the image of target cpu; LORALINE_GPU_IMAGE that of target cuda or rocm (the same one if unset)
# GPUS                 stages that may use a GPU at the same time (1)
set -eu
kind=${1:?usage: deploy/apply.sh process|docker|kubernetes|ecs|vertex [GPUS]}
gpus=${2:-1}
here=$(cd "$(dirname "$0")" && pwd)
case $kind in
    process) type=process ;;
    docker | kubernetes | ecs) type=$kind ;;
    vertex) type=vertex-ai ;;
    *) echo "deploy/apply.sh: $kind: no such kind; there are process, docker, kubernetes, ecs, vertex" >&2; exit 64 ;;
esac
: "${PREFECT_API_URL:?is not set: the address of your Prefect server, such as http://127.0.0.1:4200/api}"
if [ "$kind" = process ]; then
    # A process runs in its worker's own environment: there is no image to name.
    LORALINE_IMAGE=${LORALINE_IMAGE:-none}
fi
: "${LORALINE_IMAGE:?is not set: the image that stages run in, such as registry/loraline:1.0-cpu}"
export LORALINE_IMAGE
export LORALINE_GPU_IMAGE="${LORALINE_GPU_IMAGE:-$LORALINE_IMAGE}"
export LORALINE_REVISION="${LORALINE_REVISION:-unknown}"

for pool in cpu gpu; do
    template=$here/work-pools/$kind-$pool.json
    [ "$kind" = process ] && template=$here/work-pools/process.json
    prefect --no-prompt work-pool create "$pool" --type "$type" --base-job-template "$template" --overwrite
done
prefect work-pool set-concurrency-limit gpu "$gpus"
cd "$here/.."
prefect --no-prompt deploy --all --prefect-file deploy/prefect.yaml
python deploy/sensor.py --renew
python deploy/automations.py
