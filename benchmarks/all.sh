#!/bin/sh
# What README's section on speed shows of a device, measured again: benchmarks/all.sh DEVICE CLONE_OF_THE_ORIGINAL
# (nms.py, precision.py and loader.py beside it need photos.) On a GPU a batch of 32 too, for its share of the peak.
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
        python eval.py --config $config --benchmark --device cuda --compile --batch_size 32 --output "benchmarks/stages_${config}_cuda_batch32.json"
    done
fi
python benchmarks/report.py
