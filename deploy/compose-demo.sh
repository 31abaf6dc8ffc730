#!/bin/sh
# What `docker compose run demo` runs: draws the demo's pictures, starts the pipeline through its deployment, waits for it.
set -eu
store=${1:?usage: compose-demo.sh s3://BUCKET/PREFIX}
here=/srv/loraline
cd "$here"
if [ -z "$(ls -A .loraline/demo-images 2>/dev/null)" ]; then
    python examples/demo/make_dataset.py .loraline/demo-images
fi
# Runs start in folders of their own, so folders are named in full.
parameters=$(python /srv/deploy/parameters.py examples/demo/config.yaml \
    --set "store.url=$store" --set store.cache_dir=/tmp/loraline/cache --set flow.executor=deployment \
    --set "model.pretrained_model_name_or_path=$here/examples/demo/tiny-sd3" \
    --set "datasets.0.source.path=$here/.loraline/demo-images" --set "publish.path=$here/.loraline/published/demo")
prefect deployment run loraline/pipeline --params "$parameters" --watch
