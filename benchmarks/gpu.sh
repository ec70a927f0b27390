#!/usr/bin/env bash
# Test and measure on a CUDA GPU, in at most 8 minutes on an H100, without internet (see pack.sh).
# Usage: benchmarks/gpu.sh FOLDER      every part writes its own JSON or text there; a failing part does not stop the next
# DEVICE=cpu QUICK=1 rehearses it without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give the folder for the results}
device=${DEVICE:-cuda} quick=${QUICK:-}
mkdir -p "$out"
if ! python3 -c "import pycocotools" 2>/dev/null; then
    python3 -m pip install --quiet --no-index --no-deps --target .pack/site .pack/pycocotools-*.whl
    export PYTHONPATH="$PWD/.pack/site:${PYTHONPATH:-}"
fi

part() { # name, limit in seconds, command
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "$name: exit code $code after $((SECONDS - started)) s"
    tail -n 6 "$out/$name.log"
}

part device 60 python3 -c "import torch, sys; print(torch.__version__, sys.version, torch.cuda.get_device_name() if '$device' == 'cuda' else 'cpu')"
part tests 150 python3 -m pytest -q -x --maxfail 20 tests/test_cuda.py -p no:cacheprovider
rounds=${quick:+"--rounds 1 --repeats 1"}
rounds=${rounds:-"--rounds 3 --repeats 10"}
for config in ${CONFIGS:-yolact_resnet50 yolact_base}; do
    part "compare_$config" 150 python3 benchmarks/compare.py --original .pack/yolact --configs $config --device "$device" \
        --training --batches 1 ${quick:-32} ${quick:+--no_compile --batch_size 1} $rounds --output "$out/compare_$config.json"
done
