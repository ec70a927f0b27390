#!/usr/bin/env bash
# Fill .pack with what benchmarks/gpu.sh needs on a machine without internet: a wheel of pycocotools and the original.
# Usage: benchmarks/pack.sh [Python version of that machine, default 3.12] [an existing clone of dbolya/yolact]
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .pack
python -m pip download --quiet --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp \
    --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 --dest .pack pycocotools
git clone --quiet --depth 1 "${2:-https://github.com/dbolya/yolact}" .pack/yolact
rm -rf .pack/yolact/.git .pack/yolact/data/*.png .pack/yolact/data/*.jpg
