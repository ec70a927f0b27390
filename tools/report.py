"""A page about an evaluation: tables, curves, the confusion matrix, and the worst mistakes. One HTML file."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle

from config import override
from data.annotation import to_mask
from data.coco import CocoDataset
from tools.error_analysis import (
    ERROR_KINDS,
    MIN_IOU,
    MISSED,
    Outcome,
    best_threshold,
    confusion_matrix,
    count_errors,
    f1_curve,
    match_dataset,
)
from utils.draw import draw_objects
from utils.errors import UserError, count
from utils.files import write_bytes, write_json
from weights.checkpoint import save_checkpoint
from weights.load import load_state, read_weights
from weights.released import BUNDLED, find_weights
from yolact import Yolact

MISTAKES = 8  # shown of each kind
TILE = 440  # pixels: the width of each of the two images of an example
INK = "#808080"  # of figures, which are transparent: it can be read on light and on dark pages
COLOURS: dict[Any, str] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
}
CURVES_IN_ROW = 6
LARGEST_MATRIX = 20  # classes in the confusion matrix; those with the most errors
SIZES = (("all", "AP"), ("small, under 32x32 px", "APs"), ("medium", "APm"), ("large, over 96x96 px", "APl"))


@dataclass
class Mistake:
    """A mistake to show."""

    index: int  # of the image in the data set
    segmentation: dict[str, Any]  # RLE of the mask that it is about
    caption: str


def write_report(
    folder: Path,
    dataset: CocoDataset,
    metrics: dict[str, Any],
    results: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
    title: str,
) -> dict[str, Any]:
    """Write `index.html`, with all images inside, and `report.json` into a folder.

    Args:
        folder: created if necessary.
        dataset: the ground truth.
        metrics: of `evaluate`, with "per_class".
        results: COCO results.
        sizes: (height, width) of the images by id.
        title: heading of the page.

    Returns:
        The content of `report.json`: the best threshold with its F1, and the counts of errors there.

    Raises:
        UserError: if matplotlib is not installed, or the folder cannot be written.
    """
    need_matplotlib()
    outcome = match_dataset(dataset, results, sizes)
    threshold, f1 = best_threshold(outcome)
    errors = count_errors(outcome, threshold)
    names = list(dataset.class_names)
    import matplotlib

    with matplotlib.rc_context(COLOURS):
        figures = {
            "curves": curves(outcome, threshold, metrics),
            "classes": class_curves(outcome, names) if len({item.label for item in outcome.objects}) > 1 else b"",
            "confusion": confusion_figure(confusion_matrix(outcome, threshold), names),
            "errors": error_figure(errors),
        }
    examples = {
        heading: [_example(dataset, outcome, threshold, mistake) for mistake in listed]
        for heading, listed in mistakes(dataset, outcome, threshold).items()
    }
    summary = {
        "title": title,
        "images": len(sizes),
        "objects": len(outcome.objects),
        "best_threshold": threshold,
        "f1": f1,
        "errors": errors,
        "bbox": metrics["bbox"],
        "segm": metrics["segm"],
        "per_class": metrics.get("per_class", {}),
    }
    write_json(folder / "report.json", summary)
    write_bytes(folder / "index.html", page(summary, outcome, names, figures, examples).encode())
    return summary


def storable(path_or_name: str | Path) -> Path:
    """Return the path of a checkpoint in which a score threshold can be stored. Raises UserError for other weights."""
    path = find_weights(path_or_name)
    if path.resolve() == BUNDLED:
        raise UserError(f"{path}: --store_threshold would change a file of this project; copy it, and give the copy")
    weights = read_weights(path)
    if weights.layout != "own" or weights.training is not None:
        raise UserError(f"{path}: --store_threshold needs a checkpoint without training state, a run's best.pth")
    return path


def store_threshold(path_or_name: str | Path, threshold: float) -> Path:
    """Store the best score threshold in a checkpoint, see `storable`, and return its path."""
    path = storable(path_or_name)
    weights = read_weights(path)
    model = Yolact(override(weights.config, best_score_threshold=threshold))
    load_state(model, weights, path)
    save_checkpoint(path, model)
    return path


def need_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--report needs a package: pip install matplotlib") from None


def _figure(width: float, height: float, layout: Any = "constrained") -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def curves(outcome: Outcome, threshold: float, metrics: dict[str, Any]) -> bytes:
    """Draw precision against recall, and precision, recall and F1 against the score threshold, for masks."""
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    scores, precision, recall, f1 = f1_curve(outcome)
    left.plot(recall, precision)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    left.set_title(f"masks at IoU {MIN_IOU}, all classes together (AP50 {100 * metrics['segm']['AP50']:.1f})")
    for values, name in ((f1, "F1"), (precision, "precision"), (recall, "recall")):
        right.plot(scores, values, label=name)
    if len(f1):
        right.axvline(threshold, color="grey", linestyle="--", label=f"best F1 at {threshold:.2f}")
    right.set(xlabel="score threshold", xlim=(0, 1), ylim=(0, 1.02), title="choice of the score threshold")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return _png(figure)


def class_curves(outcome: Outcome, names: list[str]) -> bytes:
    """Draw precision against recall for each class that has objects."""
    labels = sorted({item.label for item in outcome.objects})
    rows, columns = -(-len(labels) // CURVES_IN_ROW), CURVES_IN_ROW
    figure = _figure(11, 0.5 + 1.7 * rows, layout=None)  # the usual layout takes seconds for 80 classes
    figure.subplots_adjust(left=0.04, right=0.98, bottom=0.2 / rows, top=1 - 0.15 / rows, hspace=0.6, wspace=0.3)
    for number, label in enumerate(labels, 1):
        found = [item for item in outcome.found if item.label == label]
        part = replace(outcome, found=found, objects=[item for item in outcome.objects if item.label == label])
        axes = figure.add_subplot(rows, columns, number)
        axes.plot(*f1_curve(part)[2:0:-1], linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(names[label].replace("$", r"\$"), fontsize=8)
        axes.tick_params(labelsize=6)
    return _png(figure)


def confusion_figure(matrix: np.ndarray, names: list[str]) -> bytes:
    """Draw the confusion matrix, or the part of it with the most errors if there are many classes."""
    classes = len(names)
    chosen = np.arange(classes)
    if classes > LARGEST_MATRIX:
        wrong = matrix.sum(axis=0)[:classes] + matrix.sum(axis=1)[:classes] - 2 * matrix.diagonal()[:classes]
        chosen = np.sort(np.argsort(-wrong)[:LARGEST_MATRIX])
    index = np.append(chosen, classes)
    part, labels = matrix[np.ix_(index, index)], [*(names[i].replace("$", r"\$") for i in chosen), "background"]
    side = max(4.0, 1.6 + 0.42 * len(labels))
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    share = part / np.maximum(part.sum(axis=1, keepdims=True), 1)
    share[-1] = 0  # the background has no objects of which these could be a share
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (y, x), value in np.ndenumerate(part):
        if value:
            axes.text(
                x, y, str(value), ha="center", va="center", fontsize=8, color="white" if share[y, x] > 0.6 else "black"
            )
    axes.set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 4 else 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true")
    return _png(figure)


def error_figure(errors: dict[str, int]) -> bytes:
    """Draw the number of each kind of error as bars."""
    figure = _figure(7, 2.8)
    axes = figure.subplots()
    names = [*ERROR_KINDS, "missed"]
    bars = axes.barh(names, [errors[name] for name in names], color="#c0504d")
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="detections, or objects for missed")
    return _png(figure)


def mistakes(dataset: CocoDataset, outcome: Outcome, threshold: float) -> dict[str, list[Mistake]]:
    """Return the worst mistakes of each kind, by its heading, one of each image."""
    names = dataset.class_names
    strong = [item for item in outcome.found if item.score >= threshold]
    wrong = sorted((item for item in strong if item.kind in ERROR_KINDS), key=lambda item: -item.score)
    bad = sorted((item for item in strong if item.kind == "correct"), key=lambda item: item.iou)
    missed = sorted(outcome.missed(threshold), key=lambda item: -float(rle.area(item.segmentation)))
    kinds = {
        "The largest objects that were missed": [
            Mistake(m.index, m.segmentation, f"missed {names[m.label]}") for m in missed
        ],
        "The false positives with the highest scores": [
            Mistake(w.index, w.result["segmentation"], f"{names[w.label]} {w.score:.2f}: {w.kind}") for w in wrong
        ],
        "The worst masks of correct detections": [
            Mistake(b.index, b.result["segmentation"], f"{names[b.label]} {b.score:.2f}: IoU {b.iou:.2f}") for b in bad
        ],
    }
    shown = {}
    for heading, listed in kinds.items():
        first: dict[int, Mistake] = {}
        for mistake in listed:
            first.setdefault(mistake.index, mistake)
        shown[heading] = list(first.values())[:MISTAKES]
    return {heading: listed for heading, listed in shown.items() if listed}


def _example(dataset: CocoDataset, outcome: Outcome, threshold: float, mistake: Mistake) -> str:
    """Return a figure of HTML: the surroundings of the mask, with the ground truth, and with all predictions."""
    index, segmentation = mistake.index, mistake.segmentation
    sample = dataset[index]
    image = sample.image
    truth = [to_mask(s, *image.shape[:2]) for s in sample.segmentations]
    strong = [item for item in outcome.found if item.index == index and item.score >= threshold]
    masks = [rle.decode(item.result["segmentation"]).astype(bool) for item in strong]
    names = dataset.class_names
    left = draw_objects(image, truth, sample.boxes, [names[label] for label in sample.labels], range(len(truth)))
    boxes = np.array([_corners(item.result["bbox"]) for item in strong]).reshape(-1, 4)
    right = draw_objects(image, masks, boxes, [f"{names[i.label]} {i.score:.2f}" for i in strong], range(len(strong)))
    y1, y2, x1, x2 = _surroundings(segmentation, image.shape[:2])
    frame = _corners(rle.toBbox(segmentation)).round().astype(int)
    tiles = []
    for drawn in (left, right):
        cv2.rectangle(drawn, tuple(frame[:2].tolist()), tuple(frame[2:].tolist()), (0, 0, 255), 2)
        part = drawn[y1:y2, x1:x2]
        scale = TILE / part.shape[1]
        tiles.append(cv2.resize(part, (TILE, max(1, round(part.shape[0] * scale))), interpolation=cv2.INTER_AREA))
    data = cv2.imencode(".jpg", np.hstack(tiles), [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    link = dataset.image_path(index).resolve().as_uri()
    name = html.escape(Path(dataset.file_name(index)).name)
    caption = f"{html.escape(mistake.caption)}, <a href='{html.escape(link)}'>{name}</a>: truth, prediction"
    return f"<figure>{_image('mistake', 'jpeg', data)}<figcaption>{caption}</figcaption></figure>"


def _corners(box: Any) -> np.ndarray:
    """x, y, width, height -> x1, y1, x2, y2."""
    x, y, width, height = (float(value) for value in box)
    return np.array([x, y, x + width, y + height])


def _surroundings(segmentation: dict[str, Any], size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return y1, y2, x1, x2 of a window with the shape of the image, around a mask and about three times its size."""
    height, width = size[:2]
    x1, y1, x2, y2 = _corners(rle.toBbox(segmentation))
    share = min(1.0, max(3 * (x2 - x1) / width, 3 * (y2 - y1) / height, 0.25))
    h, w = max(1, round(share * height)), max(1, round(share * width))
    top = int(np.clip((y1 + y2) / 2 - h / 2, 0, height - h))
    left = int(np.clip((x1 + x2) / 2 - w / 2, 0, width - w))
    return top, top + h, left, left + w


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, .text td:last-child, .text th:last-child { text-align: left; }
img { max-width: 100%; border-radius: 6px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figcaption { overflow-wrap: anywhere; }
.scroll { max-height: 32rem; overflow: auto; }
.number { font-size: 1.6rem; font-weight: 600; }
"""


def page(
    summary: dict[str, Any],
    outcome: Outcome,
    names: list[str],
    figures: dict[str, bytes],
    examples: dict[str, list[str]],
) -> str:
    """Return the HTML page, with all images inside. `figures` are PNG files, `examples` figures of HTML by heading."""
    per_class = ""
    if figures["classes"]:
        plot = _image("precision and recall of each class", "png", figures["classes"])
        per_class = f"<details><summary>Curves of each class</summary>{plot}</details>"
    box, mask = summary["bbox"], summary["segm"]
    sizes = [[name, _percent(box[key]), _percent(mask[key])] for name, key in SIZES]
    sizes.insert(1, ["IoU 0.5", _percent(box["AP50"]), _percent(mask["AP50"])])
    sizes.insert(2, ["IoU 0.75", _percent(box["AP75"]), _percent(mask["AP75"])])
    masks = summary["per_class"].get("segm", {})  # a class may have none
    classes = [
        [name, str(sum(item.label == names.index(name) for item in outcome.objects)), _percent(row["AP"])]
        + [_percent(masks.get(name, {}).get(key)) for key in ("AP", "AP50", "precision", "recall")]
        for name, row in summary["per_class"].get("bbox", {}).items()
    ]
    errors = [[name, str(summary["errors"][name]), text] for name, text in {**ERROR_KINDS, "missed": MISSED}.items()]
    sections = [
        f"<h1>{html.escape(summary['title'])}</h1>",
        f"<p>{count(summary['images'], 'image')}, {count(summary['objects'], 'object')}.</p>",
        f"<p><span class=number>{_percent(mask['AP'])}</span> mask AP, "
        f"<span class=number>{_percent(box['AP'])}</span> box AP, "
        f"best score threshold <span class=number>{summary['best_threshold']:.2f}</span> (F1 {summary['f1']:.2f}).</p>",
        "<h2>AP</h2>" + _table(["", "box", "mask"], sizes),
        "<h2>Classes</h2>",
        "<p>Precision and recall are those of masks at IoU 0.5, at the threshold with the best F1 of the class.</p>"
        "<div class=scroll>"
        + _table(["class", "objects", "box AP", "mask AP", "mask AP50", "precision", "recall"], classes)
        + "</div>",
        "<h2>Curves</h2>" + _image("precision and recall", "png", figures["curves"]) + per_class,
        f"<h2>Errors at the score threshold {summary['best_threshold']:.2f}</h2>"
        f"<p>Correct detections: {summary['errors']['correct']}.</p>"
        + _table(["error", "count", "meaning"], errors, "text")
        + _image("numbers of errors", "png", figures["errors"]),
        "<h2>Confusion matrix</h2>" + _image("confusion matrix", "png", figures["confusion"]),
    ]
    sections += [f"<h2>{head}</h2><div class=grid>{''.join(listed)}</div>" for head, listed in examples.items()]
    body = "\n".join(sections)
    return (
        "<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        "<meta name=viewport content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(summary['title'])}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table class='{kind}'><tr>{cells}</tr>{''.join(lines)}</table>"


def _image(text: str, kind: str, data: bytes) -> str:
    return f"<img alt='{text}' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
