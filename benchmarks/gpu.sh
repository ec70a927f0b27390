#!/usr/bin/env bash
# Test and measure on a CUDA GPU, in at most 8 minutes on an H100, without internet (see pack.sh).
# Usage: benchmarks/gpu.sh FOLDER      every part writes its own JSON or log there; a failing part does not stop the next
# DEVICE=cpu QUICK=1 rehearses it without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give the folder for the results}
device=${DEVICE:-cuda}
mkdir -p "$out"
if ! python3 -c "import pycocotools" 2>/dev/null; then
    python3 -m pip install --quiet --no-index --no-deps --target .pack/site .pack/pycocotools-*.whl
    export PYTHONPATH="$PWD/.pack/site:${PYTHONPATH:-}"
fi
if [ -n "${QUICK:-}" ]; then
    small=(--batches 1 --rounds 1 --repeats 1 --no_compile --batch_size 1) gpu=(--configs yolact_lite --batches 1 --repeats 1)
else
    small=(--batches 1 32 --rounds 4 --repeats 10 --limit 30) gpu=(--batches 1 32 --repeats 30)
fi

part() { # name, limit in seconds, command
    local name=$1 limit=${QUICK:+900} started=$SECONDS
    limit=${limit:-$2}
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "$name: exit code $code after $((SECONDS - started)) s"
    grep -v Warning "$out/$name.log" | tail -n "${LINES_SHOWN:-4}"
}

compare() {
    part "compare_$1" 140 python3 benchmarks/compare.py --original .pack/yolact --configs "$1" \
        --device "$device" --training "${small[@]}" --output "$out/compare_$1.json"
}

part tests 150 python3 -m pytest -q tests/test_cuda.py -p no:cacheprovider
compare yolact_resnet50
part gpu 120 python3 benchmarks/gpu.py --device "$device" "${gpu[@]}" --output "$out/gpu.json"
compare yolact_base
