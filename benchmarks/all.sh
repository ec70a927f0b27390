#!/bin/sh
# Measure everything of benchmarks/README.md that needs no data set again: benchmarks/all.sh DEVICE CLONE_OF_THE_ORIGINAL
# On a GPU also with a batch of 32, for its share of the peak.
set -e
device=$1 original=$2
more=$([ "$device" = cuda ] && echo --training || echo --exports)  # exported models run on the CPU
python benchmarks/compare.py --original "$original" --device "$device" $more --output "benchmarks/compare_$device.json"
python benchmarks/scaling.py --config yolact_lite --device "$device" --precision fp32 --output "benchmarks/scaling_lite_$device.json"
for config in yolact_lite yolact_resnet50; do
    stages="python eval.py --config $config --benchmark --device $device --output benchmarks/stages_${config}_$device"
    $stages.json --precision fp32
    ${stages}_compiled.json --precision fp32 --compile
    ${stages}_bf16.json --precision bf16
done
python benchmarks/memory.py --output benchmarks/memory.json
if [ "$device" = cpu ]; then  # needs `pip install ultralytics`
    python benchmarks/runtimes.py --peers yolo11n-seg yolo26n-seg --output benchmarks/runtimes_cpu.json
fi
if [ "$device" = cuda ]; then
    for config in yolact_resnet50 yolact_base; do
        python eval.py --config $config --benchmark --device cuda --compile --batch_size 32 --output "benchmarks/stages_${config}_cuda_batch32.json"
    done
fi
python benchmarks/report.py
