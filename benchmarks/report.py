"""Write benchmarks/README.md and the speed rows of README.md from the JSON files in this folder.

python benchmarks/report.py            # write them
python benchmarks/report.py --check    # exit with 1 if they differ from the files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
README, TABLES = FOLDER.parent / "README.md", FOLDER / "README.md"
BEGIN, END = "<!-- written by benchmarks/report.py -->", "<!-- end -->"
Report = dict[str, Any]

VARIED = {"size": "input, pixels a side", "batch_size": "images at once", "detections": "detections", "image": "image"}
NAMES = {"network": "network and NMS", "image": "image to masks", "training": "training step"}
INTRODUCTION = """# Measurements

Written by `benchmarks/report.py` from the JSON files in this folder; each table names the command that made its file.
Times are medians after warm-up. Machines differ and are shared, so compare within a table, not between tables.
`benchmarks/all.sh DEVICE ../yolact` measures everything that needs no images again; `nms.py`, `precision.py` and
`loader.py` need a data set, and `failures.py` draws the image in the model card."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a file would change")
    args = parser.parse_args()
    wanted = {README: readme(), TABLES: tables()}
    if args.check:
        return int(any(path.read_text(encoding="utf-8") != text for path, text in wanted.items()))
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


def readme() -> str:
    """README.md with its speed rows made anew."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{speed_rows()}\n{END}{rest.split(END)[1]}"


def speed_rows() -> str:
    """The comparison with the original and the small network in five rows."""
    report = read("compare_cpu.json")
    rows = []
    shown = (("yolact_resnet50", "ResNet-50, 550 px"), ("yolact_base", "ResNet-101, 550 px"))
    for config, name in shown:
        for variant in ("ours float32", "ours bfloat16"):
            for row in report["rows"]:
                if (row["configuration"], row["what"], row.get("variant")) == (config, "image", variant):
                    rows.append([name, variant[5:], f"{row['ms']:.0f}", f"{row['times_the_original']:.1f}"])
    lite = read("stages_yolact_lite_cpu_bf16.json")
    ms = lite["stages_ms"]["image to masks"]["median"]
    rows.append([f"EfficientNet-Lite0, {lite['size'][0]} px", lite["precision"], f"{ms:.0f}", ""])
    height, width = report["image"]
    return (
        f"From an image of {height}x{width} in memory to its masks in memory, batch 1, on {report['machine']}:\n\n"
        + table(["network", "precision", "ms", "times as fast as the original"], rows)
    )


def tables() -> str:
    """benchmarks/README.md."""
    parts = [INTRODUCTION, *(comparison(kind) for kind in ("cpu", "cuda"))]
    parts += [*stages(), *(scaling(read(path.name)) for path in sorted(FOLDER.glob("scaling_*.json")))]
    parts += [precision(read("precision.json")), nms(read("nms.json")), loader(read("loader.json"))]
    return "\n\n".join(part for part in parts if part) + "\n"


def read(name: str) -> Report:
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def comparison(kind: str) -> str:
    """Compare with the original, or say how to measure it."""
    report = read(f"compare_{kind}.json")
    if not report:
        command = f"python benchmarks/compare.py --original ../yolact --device {kind} --training"
        return f"## Beside the original, {kind.upper()}\n\nNot measured yet; `{command}` does it."
    rows = []
    floors = {row["configuration"]: row["ms"] for row in report["rows"] if row["what"] == "floor"}
    timed = [row for row in report["rows"] if row["what"] != "floor"]
    for row in sorted(timed, key=lambda r: (r["configuration"], list(NAMES).index(r["what"]))):
        floor = f"{row['ms'] / floors[row['configuration']]:.2f}" if row["what"] == "network" else ""
        ratio = f"{row['times_the_original']:.2f}"
        rows.append([row["configuration"], NAMES[row["what"]], row["variant"], f"{row['ms']:.0f}", ratio, floor])
    agreement = next(row["agreement"] for row in report["rows"] if row["what"] == "floor")
    height, width = report["image"]
    return (
        f"## Beside the original, {kind.upper()}\n\nIn turns in one run, the same weights and image "
        f"({height}x{width}), on {report['machine']}, PyTorch {report['torch']}. Both find {agreement}. The last "
        "column is the time as a multiple of the network's operations at this machine's measured peak of "
        f"{report['matmul_peak_gflops']} GFLOP/s (a large matrix product, in the fastest precision).\n\n"
        + table(["configuration", "what", "variant", "ms", "times as fast", "times the floor"], rows)
        + f"\n\n`{report['command']}`"
    )


def stages() -> list[str]:
    """Where the time goes: a table for each device, with a column for each file."""
    reports = [read(path.name) for path in sorted(FOLDER.glob("stages_*.json"))]
    devices = dict.fromkeys(r["device"] for r in reports)
    return [stage_table([r for r in reports if r["device"] == device], device) for device in devices]


def stage_table(reports: list[Report], device: str) -> str:
    head = ["ms, median"]
    for r in reports:
        compiled = ", compiled" if r["compiled"] else ""
        batch = f", batch {r['batch_size']}" if r["batch_size"] > 1 else ""
        head.append(f"{r['configuration']}, {r['size'][0]} px, {r['precision']}{batch}{compiled}")
    rows = [[stage, *(f"{r['stages_ms'][stage]['median']:.2f}" for r in reports)] for stage in reports[0]["stages_ms"]]
    rows.append(["frames/s, network", *(f"{r['network_fps']:.1f}" for r in reports)])
    rows.append(["frames/s, image to masks", *(f"{r['image_to_masks_fps']:.1f}" for r in reports)])
    rows.append(["large matrix product, GFLOP/s", *(f"{r['matmul_peak_gflops']:.0f}" for r in reports)])
    rows.append(["network, share of that rate", *(f"{100 * r['share_of_peak']:.0f} %" for r in reports)])
    rows.append(["seconds to compile", *(f"{r['seconds_to_compile']:.0f}" for r in reports)])
    rows.append(["peak memory, MiB", *(f"{r['peak_memory_mib']:.0f}" for r in reports)])
    return (
        f"## Where the time goes\n\nOn {device}, an image of {'x'.join(map(str, reports[0]['image']))}. `network` is "
        "backbone to head as they run together, `image to masks` everything from an image in memory to its masks in "
        "memory.\n\n" + table(head, rows) + "\n\n" + "<br>\n".join(f"`python {r['command']}`" for r in reports)
    )


def scaling(report: Report) -> str:
    """How cost grows with each thing that can be varied."""
    usual = dict(report["usual"])
    usual["image"] = "x".join(map(str, usual["image"]))
    rows = []
    for row in report["rows"]:
        value = "x".join(map(str, row["value"])) if isinstance(row["value"], list) else row["value"]
        times = [f"{row[key]:.1f}" for key in ("network_ms", "masks_ms", "image_to_masks_ms")]
        rows.append([VARIED[row["varied"]], value, *times, row["memory_mib"]])
    return (
        f"## How cost grows\n\n{report['configuration']} in {report['precision']} on {report['device']}; what is not "
        f"varied is {usual['size']} px, {usual['batch_size']} image of {usual['image']}, {usual['detections']} "
        "detections.\n\n"
        + table(["varied", "to", "network, ms", "masks, ms", "image to masks, ms", "memory, MiB"], rows)
        + f"\n\n`{report['command']}`"
    )


def precision(report: Report) -> str:
    """AP of each precision and of the model as written."""
    if not report:
        return ""
    rows = [
        [row["variant"], f"{100 * row['box_AP']:.2f}", f"{100 * row['mask_AP']:.2f}"]
        + [f"{100 * row[key]:+.2f}" for key in ("box_difference", "mask_difference")]
        for row in report["rows"]
    ]
    return (
        f"## Precision\n\nAP of {report['configuration']} at {report['input']} px on {report['images']} images.\n\n"
        + table(["", "box AP", "mask AP", "box, difference", "mask, difference"], rows)
        + f"\n\n`{report['command']}`"
    )


def nms(report: Report) -> str:
    """AP and time of each NMS and each way to crop masks."""
    names = {
        "fast": "`--nms fast` (default)",
        "standard": "`--nms standard` (torchvision)",
        "crop before resize": "masks cropped before upsampling (published)",
        "no crop": "`--no_crop`",
        "crop after resize": "`--crop_after_resize`",
    }
    rows = [
        [names.get(row["variant"], f"`--nms {row['variant']}`")]
        + [f"{100 * row[key]:.1f}" for key in ("box_AP", "mask_AP", "mask_AP50")]
        + [f"{row['ms']:.2f}"]
        for row in report["rows"]
    ]
    return (
        f"## NMS and cropping\n\nOn {report['images']} images with a `{report['configuration']}` at {report['input']} "
        f"px of {report['classes']} class. The time is that of the step alone: raw outputs to detections, or for the "
        "crops detections to masks. With one class, `cross_class` is `fast`.\n\n"
        + table(["variant", "box AP", "mask AP", "mask AP50", "ms"], rows)
        + f"\n\n`{report['command']}`"
    )


def loader(report: Report) -> str:
    """Reading and augmenting."""
    ours, theirs = report["mean_ms"]["ours"], report["mean_ms"]["original"]
    return (
        f"## Reading and augmenting\n\nTakes {ours} ms per sample and core, the original {theirs}, means over "
        f"{report['samples']} samples in turns (medians {report['median_ms']['ours']} and "
        f"{report['median_ms']['original']}), for 550 px.\n\n`{report['command']}`"
    )


if __name__ == "__main__":
    sys.exit(main())
