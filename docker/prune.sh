#!/bin/sh
# Takes out of a virtual environment what nothing in an image can use: the libraries' own tests, and headers and static
# libraries, which want a compiler. A tenth of the image.
set -eu
packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
find "$packages" -type d \( -name tests -o -path '*/torch/test' -o -path '*/torch/include' -o -path '*/nvidia/*/include' \) \
    -prune -exec rm -rf {} +
find "$packages" -name '*.a' -delete
# Of PyTorch's programs only the one that shares memory between processes is ever called.
if [ -d "$packages/torch/bin" ]; then
    find "$packages/torch/bin" -type f ! -name torch_shm_manager -delete
fi
