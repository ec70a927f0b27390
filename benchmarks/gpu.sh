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
    batches=(1) small=(--rounds 1 --repeats 1 --no_compile --batch_size 1) gpu=(--configs yolact_lite --batches 1 --repeats 1)
else
    batches=(1 32) small=(--rounds 3 --repeats 10 --limit 14) gpu=(--batches 1 32 --repeats 30)
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

compare() { # name, limit in seconds, configuration, options
    local name=$1 limit=$2 config=$3
    shift 3
    part "$name" "$limit" python3 benchmarks/compare.py --original .pack/yolact --configs "$config" \
        --device "$device" "$@" "${small[@]}" --output "$out/$name.json"
}

part tests 130 python3 -m pytest -q tests/test_cuda.py -p no:cacheprovider
compare compare_yolact_resnet50 105 yolact_resnet50 --batches "${batches[@]}"
compare compare_yolact_base 60 yolact_base --batches 1
part gpu 55 python3 benchmarks/gpu.py --device "$device" "${gpu[@]}" --output "$out/gpu.json"
compare training_yolact_resnet50 65 yolact_resnet50 --batches --training
compare training_yolact_base 65 yolact_base --batches --training
