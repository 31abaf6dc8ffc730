#!/bin/sh
# Called as MinIO is: server FOLDER --address :PORT
set -eu
exec /opt/moto/bin/moto_server --host 0.0.0.0 --port "${4#:}"
