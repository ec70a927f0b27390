"""Segment images in a browser: a local page with sliders, prototypes and downloads.

python -m tools.demo                          # the bundled weights, on http://127.0.0.1:7860
python -m tools.demo --weights yolact_r50     # a released name, a run, a checkpoint, or an exported model
python -m tools.demo --host 0.0.0.0           # reachable from other computers

Needs `pip install -r requirements-tools.txt`.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import DISPLAY
from data.image import read_image, write_image
from inference import Detections, Predictor
from inference.detections import TOOLS
from inference.runtime import ExportedNetwork, is_exported
from layers.nms import NMS
from layers.structures import Predictions
from tools.prototypes import arrange, composition_tiles, prototype_tiles
from utils.device import PRECISIONS, configure_process
from utils.errors import ArgumentParser, UserError, integer, join_names, require, run_main
from utils.files import write_json
from weights import load_model
from weights.released import BUNDLED

MAX_PIXELS = 50_000_000  # larger uploads are refused
MAX_UPLOAD = "50mb"
COMPOSED = 2  # detections whose masks are explained, each in two rows of four tiles
COLUMNS = 6  # prototypes in a row
TABLE = ("class", "mask_score", "x1", "y1", "x2", "y2", "area")  # columns
EXAMPLES = [Path(__file__).parents[1] / "data/demo" / name for name in ("astronaut.jpg", "camera.jpg")]
KEPT_SECONDS = 3600  # for which downloads stay available


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Segment images in a browser.")
    parser.add_argument("--weights", default=str(BUNDLED), help="a file, a run's folder, a name, or an exported model")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS], help="precision of the network")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=integer(1), default=7860, help="port to listen on (%(default)s)")
    return parser


class Segmenter:
    """Segments uploaded images and writes the files that the page offers for download."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.model = ExportedNetwork(args.weights) if is_exported(args.weights) else load_model(args.weights)
        self.fixed = isinstance(self.model, ExportedNetwork)  # an exported model has one input size
        start = functools.partial(Predictor, self.model, args.device, args.precision)
        # The last few sizes stay loaded. The limit keeps the memory of a long session bounded.
        self.predictor = functools.lru_cache(maxsize=3)(lambda size: start(size=None if self.fixed else size))
        # The network runs once for an image and a size; sliders repeat only what follows it.
        self.raw = functools.lru_cache(maxsize=4)(self._raw)
        self.config, self.folder = self.model.config, folder
        self.size = (
            int(np.max(self.model.size)) if isinstance(self.model, ExportedNetwork) else self.config.model.max_size
        )

    def __call__(self, path: str | None, second: float, classes: Sequence[str], *choices: Any) -> list[Any]:
        """Return what the page shows: a line of text, a table, and four images in RGB.

        Without `classes`, all are shown. One of the images compares the threshold with a `second` one. See `detect` for
        the other `choices`.
        """
        if path is None:
            return ["Choose an image.", *[None] * 5]
        try:
            image, found = self.detect(path, classes, *choices)
        except UserError as error:
            return [f"**{str(error).replace(str(Path(path).parent) + '/', '')}**", *[None] * 5]
        overlay = found.draw(image)
        right = self.detect(path, classes, second, *choices[1:])[1].draw(image)
        pages = [overlay, np.hstack((overlay, right)), *explained(found, image)]
        names = sorted({found.class_names[label] for label in found.labels.tolist()})
        text = f"{len(found)} detection{'' if len(found) == 1 else 's'}{': ' if names else ''}{', '.join(names)}"
        table = [
            [row[key] if isinstance(row[key], str) else round(row[key], 2) for key in TABLE] for row in found.to_dicts()
        ]
        return [text, table, *(page[..., ::-1] for page in pages)]

    def detect(
        self, path: str, classes: Sequence[str], threshold: float, top_k: int, nms: str, size: int
    ) -> tuple[np.ndarray, Detections]:
        """Return an uploaded image and its detections. Raises UserError if it cannot be read."""
        image, predictions = self.raw(path, int(size))
        predictor = self.predictor(int(size)).with_detection(score_threshold=threshold, top_k=int(top_k), nms=nms)
        with torch.inference_mode():
            selected = predictor.detect(predictions)
        found = predictor.postprocess(selected, predictions.prototypes, [image.shape[:2]])[0]
        return image, found[[not classes or found.class_names[label] in classes for label in found.labels.tolist()]]

    def _raw(self, path: str, size: int) -> tuple[np.ndarray, Predictions]:
        """Return an uploaded image, and the network's outputs for it at an input size."""
        image = read_image(path, max_pixels=MAX_PIXELS)
        predictor = self.predictor(size)
        with torch.inference_mode():
            return image, predictor.predict(predictor.preprocess(image)[None])

    def write(self, path: str | None, _: float, classes: Sequence[str], *choices: Any) -> list[str | None]:
        """Write overlay, COCO JSON and LabelMe JSON for the arguments of `__call__`, and return the three paths."""
        if path is None:
            return [None] * 3
        try:
            image, found = self.detect(path, classes, *choices)
        except UserError:
            return [None] * 3
        name, folder = Path(path), self.folder / Path(path).parent.name  # each upload has a folder of its own
        files = [folder / f"{name.stem}_segmented.png", folder / f"{name.stem}_coco.json", folder / f"{name.stem}.json"]
        write_image(files[0], found.draw(image))
        pairs = zip(self.config.category_ids, self.config.class_names, strict=True)
        content = {
            "images": [{"id": 1, "file_name": name.name, "height": found.size[0], "width": found.size[1]}],
            "annotations": [{"id": i} | row | {"iscrowd": 0} for i, row in enumerate(found.to_coco(1), 1)],
            "categories": [{"id": i, "name": category} for i, category in pairs],
        }
        write_json(files[1], content)
        write_json(files[2], found.to_labelme(name.name))
        return [str(file) for file in files]


def explained(found: Detections, image: np.ndarray) -> list[np.ndarray]:
    """Return images of the prototypes and of the masks of the best detections as sums of them."""
    prototypes = prototype_tiles(found, image)
    tiles = [composition_tiles(found, i, height=200) for i in range(min(COMPOSED, len(found)))]
    rows = [row[start : start + 4] for row in tiles for start in (0, 4)]
    return [
        arrange([prototypes[i : i + COLUMNS] for i in range(0, len(prototypes), COLUMNS)]),
        arrange(rows) if rows else np.full((138, 138, 3), 255, np.uint8),
    ]


def build_page(segmenter: Segmenter, title: str) -> Any:
    """Return the page as gradio.Blocks."""
    import gradio as gr

    detection = segmenter.config.detection
    shown: Any = {"format": "jpeg", "interactive": False, "show_label": False, "buttons": ["download", "fullscreen"]}
    with gr.Blocks(title="YOLACT", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(f"# YOLACT\n{title}")
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.Image(label="Image", type="filepath", image_mode=None, sources=["upload", "webcam"])
                threshold = gr.Slider(
                    0,
                    1,
                    detection.best_score_threshold or DISPLAY["score_threshold"],
                    step=0.01,
                    label="Score threshold",
                )
                top_k = gr.Slider(1, 200, detection.top_k, step=1, label="Maximum number of detections")
                nms = gr.Dropdown(list(NMS), value=detection.nms, label="NMS")
                size = gr.Slider(
                    128, max(1024, segmenter.size), segmenter.size, step=32, label="Input size of the network, px",
                    interactive=not segmenter.fixed,
                )  # fmt: skip
                classes = gr.Dropdown(list(segmenter.config.class_names), multiselect=True, label="Classes (none: all)")
                gr.Examples([str(path) for path in EXAMPLES], image)
            with gr.Column(scale=2):
                text = gr.Markdown("Choose an image.", elem_id="status")
                with gr.Tab("Overlay"):
                    overlay = gr.Image(**shown)
                with gr.Tab("Compare"):
                    second = gr.Slider(0, 1, 0.5, step=0.01, label="Threshold on the right")
                    compared = gr.Image(**shown)
                with gr.Tab("Table"):
                    table = gr.Dataframe(headers=list(TABLE), interactive=False)
                with gr.Tab("Prototypes"):
                    gr.Markdown("The prototypes and their coefficients for the best detection. Red is positive.")
                    prototypes = gr.Image(**shown)
                with gr.Tab("Composition of masks"):
                    gr.Markdown(
                        "For each of the best detections: weighted sums of its strongest prototypes, then of all of "
                        "them, the sigmoid, and the mask, cropped to the box (figure 5 of the paper)."
                    )
                    composition = gr.Image(**shown)
                with gr.Row():
                    files = [
                        gr.DownloadButton(label, size="sm") for label in ("Overlay PNG", "COCO JSON", "LabelMe JSON")
                    ]

        choices: Any = [image, second, classes, threshold, top_k, nms, size]
        changed = gr.on(
            [item.change for item in choices],
            lambda *values: [*segmenter(*values), *[None] * len(files)],  # no files of earlier choices
            choices,
            [text, table, overlay, compared, prototypes, composition, *files],
            trigger_mode="always_last",
            show_progress="minimal",
        )
        changed.then(segmenter.write, choices, files, show_progress="hidden")  # what is shown need not wait for it
    return page


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    configure_process()
    with require("gradio", install=TOOLS):
        import gradio as gr
    with tempfile.TemporaryDirectory() as folder:
        segmenter = Segmenter(args, Path(folder))
        classes = segmenter.config.class_names
        count = f"{len(classes)} class{'es' if len(classes) > 1 else ''}"
        title = f"{segmenter.config.name}, {count}: {join_names(classes, 10)}"
        page = build_page(segmenter, title)
        # Fonts of the system, because the default ones are loaded from the internet.
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                max_file_size=MAX_UPLOAD,
                show_error=True,
                theme=theme,
                quiet=True,
                prevent_thread_lock=True,
            )
        except (OSError, OverflowError) as error:
            raise UserError(f"--host {args.host} --port {args.port}: cannot be used ({error})") from None
        print(f"http://{args.host}:{args.port} (stop with Ctrl-C)", flush=True)
        page.block_thread()
    return 0


if __name__ == "__main__":
    run_main(main)
