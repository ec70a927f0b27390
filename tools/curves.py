"""The curves of a run: losses, learning rate, and AP, drawn from its log."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import write_bytes

SMOOTHING = 50  # losses are averaged over this part of the run: 1/50 of its steps


def draw_curves(log: Path, output: Path) -> bool:
    """Draw the curves of `log`, a log.jsonl, as a PNG. Returns False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps, validations = read_log(log)
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates, scores = figure.subplots(1, 3)
    x = np.array([row["step"] for row in steps])
    width = max(1, len(x) // SMOOTHING)
    for name in ("total", "box", "class", "mask", "semantic"):
        values = np.array([row.get(name, np.nan) for row in steps], float)
        if len(values) >= width:
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            losses.plot(x[width - 1 :], smooth, label=name)
    losses.set(title=f"losses, mean of {width} steps", xlabel="step", yscale="log")
    rates.plot(x, [row["lr"] for row in steps])
    rates.set(title="learning rate", xlabel="step")
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for key, style in (("AP", "-"), ("AP50", "--")):
            points = [(row["step"], row[kind][key]) for row in validations]
            if points:
                scores.plot(*zip(*points, strict=True), style, marker="o", label=f"{name} {key}")
    scores.set(title="validation", xlabel="step", ylim=(0, None))
    for axes in (losses, scores):
        if axes.lines:
            axes.legend(fontsize="small")
    for axes in (losses, rates, scores):
        axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    write_bytes(output, file.getvalue())
    return True


def read_log(log: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of the steps and those of the validations."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [line for line in lines if "total" in line], [line for line in lines if "segm" in line]
