"""README's performance section, written from the JSON files in this folder.

python benchmarks/report.py            # write it
python benchmarks/report.py --check    # exit with 1 when README says something else than the files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- from here on written by benchmarks/report.py -->", "<!-- to here -->"
Report = dict[str, Any]

VARIED = {
    "size": "input, pixels a side",
    "batch_size": "images at once",
    "detections": "detections",
    "image": "image",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{section()}\n{END}{after}"
    if args.check:
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    return 0


def section() -> str:
    """The whole of it, as Markdown."""
    parts = [comparison(kind) for kind in ("cpu", "cuda")]
    parts += [*stages(), *(scaling(read(path.name)) for path in sorted(FOLDER.glob("scaling_*.json")))]
    parts += [precision(read("precision.json")), nms(read("nms.json")), loader(read("loader.json"))]
    return "\n\n".join(part for part in parts if part)


def read(name: str) -> Report:
    path = FOLDER / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def comparison(kind: str) -> str:
    """Beside the original; which figures are missing is said."""
    report = read(f"compare_{kind}.json")
    if not report:
        command = f"python benchmarks/compare.py --original ../yolact --device {kind} --training"
        return f"**Beside the original, {kind.upper()}**: not measured; `{command}` measures it."
    rows = []
    floors = {row["configuration"]: row["ms"] for row in report["rows"] if row["what"] == "floor"}
    names = {"network": "network and NMS", "image": "image to masks", "training": "training step"}
    timed = [row for row in report["rows"] if row["what"] != "floor"]
    for row in sorted(timed, key=lambda r: (r["configuration"], list(names).index(r["what"]))):
        floor = f"{row['ms'] / floors[row['configuration']]:.2f}" if row["what"] == "network" else ""
        ratio = f"{row['times_the_original']:.2f}"
        rows.append([row["configuration"], names[row["what"]], row["variant"], f"{row['ms']:.0f}", ratio, floor])
    agreement = next(row["agreement"] for row in report["rows"] if row["what"] == "floor")
    height, width = report["image"]
    return (
        f"**Beside the original**, in turns in one run, same weights and image ({height}x{width}), on "
        f"{report['machine']}, PyTorch {report['torch']}. Both find {agreement}. The last column is the time as a "
        "multiple of the network's operations at this machine's measured peak of "
        f"{report['matmul_peak_gflops']} GFLOP/s (a large matrix product); under 1 is possible where Winograd's scheme "
        "leaves operations out.\n\n"
        + table(["configuration", "what", "variant", "ms", "times as fast", "of the floor"], rows)
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
    rows.append(["measured peak, GFLOP/s", *(f"{r['matmul_peak_gflops']:.0f}" for r in reports)])
    rows.append(["share of it, network", *(f"{100 * r['share_of_peak']:.0f} %" for r in reports)])
    rows.append(["seconds to compile", *(f"{r['seconds_to_compile']:.0f}" for r in reports)])
    rows.append(["peak memory, MiB", *(f"{r['peak_memory_mib']:.0f}" for r in reports)])
    return (
        f"**Where the time goes**, on {device}, a image of {'x'.join(map(str, reports[0]['image']))}. `network` is "
        "backbone to head as they run together, `image to masks` all from a image in memory to its masks in "
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
        f"**How cost grows**, {report['configuration']} in {report['precision']} on {report['device']}; what is not "
        f"varied is {usual['size']} px, {usual['batch_size']} image of {usual['image']}, {usual['detections']} "
        "detections.\n\n"
        + table(["varied", "to", "network, ms", "masks, ms", "image to masks, ms", "memory, MiB"], rows)
        + f"\n\n`{report['command']}`"
    )


def precision(report: Report) -> str:
    """The fast paths' AP."""
    if not report:
        return ""
    rows = [
        [row["variant"], f"{100 * row['box_AP']:.2f}", f"{100 * row['mask_AP']:.2f}"]
        + [f"{100 * row[key]:+.2f}" for key in ("box_difference", "mask_difference")]
        for row in report["rows"]
    ]
    return (
        f"**Same answers**: AP of {report['configuration']} at {report['input']} px on {report['images']} images.\n\n"
        + table(["", "box AP", "mask AP", "box, difference", "mask, difference"], rows)
        + f"\n\n`{report['command']}`"
    )


def nms(report: Report) -> str:
    """What the choices cost."""
    names = {
        "fast": "`--nms fast` (default)",
        "standard": "`--nms standard` (torchvision)",
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
        f"**What the choices cost**, on {report['images']} images with a `{report['configuration']}` at "
        f"{report['input']} px of {report['classes']} class. The time is that of the step alone: raw outputs to "
        "detections, or for the crops detections to masks. With one class, `cross_class` is `fast`.\n\n"
        + table(["variant", "box AP", "mask AP", "mask AP50", "ms"], rows)
        + f"\n\n`{report['command']}`"
    )


def loader(report: Report) -> str:
    """Reading and augmenting."""
    ours, theirs = report["mean_ms"]["ours"], report["mean_ms"]["original"]
    return (
        f"**Reading and augmenting** takes {ours} ms a sample and core, the original {theirs}, means over "
        f"{report['samples']} samples in turns (medians {report['median_ms']['ours']} and "
        f"{report['median_ms']['original']}), for 550 px.\n\n`{report['command']}`"
    )


if __name__ == "__main__":
    sys.exit(main())
