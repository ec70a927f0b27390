#!/bin/sh
# Measure again all that README's performance section shows: benchmarks/all.sh DEVICE CLONE_OF_THE_ORIGINAL
# On a GPU the last two lines also say how much of its peak a batch of 32 reaches.
set -e
device=$1 original=$2
training=$([ "$device" = cuda ] && echo --training || true)
python benchmarks/compare.py --original "$original" --device "$device" $training --output "benchmarks/compare_$device.json"
python benchmarks/scaling.py --config yolact_lite --device "$device" --output "benchmarks/scaling_lite_$device.json"
for config in yolact_lite yolact_resnet50; do
    python eval.py --config $config --benchmark --device "$device" --output "benchmarks/stages_${config}_$device.json"
    python eval.py --config $config --benchmark --device "$device" --compile --output "benchmarks/stages_${config}_${device}_compiled.json"
done
if [ "$device" = cuda ]; then
    for config in yolact_resnet50 yolact_base; do
        python eval.py --config $config --benchmark --device cuda --compile --batch_size 32 --output "benchmarks/batch32_$config.json"
    done
fi
python benchmarks/report.py
