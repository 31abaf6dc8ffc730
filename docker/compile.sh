#!/bin/sh
# Compiles a folder to bytecode that is never compared with its source: a read-only container could not renew it, and
# without bytecode every start would pay for it again.
set -eu
# Tests of libraries are for other versions of Python too, and are never imported here.
exec python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x '/tests?/|/py312_' "$1"
