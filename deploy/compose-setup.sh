#!/bin/sh
# What docker/compose.yaml runs once everything is up: a bucket, a store that keeps its word, pools and deployments.
# Every step may be repeated.
set -eu
store=${1:?usage: compose-setup.sh s3://BUCKET/PREFIX}
python - "$store" <<'PYTHON'
import sys
import time

import s3fs

bucket = sys.argv[1].removeprefix("s3://").partition("/")[0]
for attempt in range(30):
    try:
        files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        if not files.exists(bucket):
            files.mkdir(bucket)
        break
    except OSError as error:  # the server is still starting
        if attempt == 29:
            sys.exit(f"no bucket {bucket}: {error}")
        time.sleep(1)
print(f"bucket {bucket} is there")
PYTHON
loraline doctor --store "$store"
/srv/deploy/apply.py process 1
