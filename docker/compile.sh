#!/bin/sh
# Compiles a folder to bytecode that is never compared with its source: a read-only container could not renew it, and
# without bytecode every start would pay for it again.
set -eu
# A few files are for newer versions of Python.
exec python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x '/py312_' "$1"
