"""Exported models: ONNX Runtime and OpenVINO against Predictor, and what goes wrong with files."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys

import cv2
import numpy as np
import pytest
import recipe
import torch
from conftest import ROOT, random_image, run, spawn

from config import get_config, to_dict
from data.image import resize, resize_like_opencv
from inference import Predictor
from inference.runtime import ExportedNetwork
from tools.export.graph import DetectionGraph
from tools.export.onnx_export import export_program
from weights import load_model
from weights.checkpoint import save_checkpoint
from yolact import Yolact

pytest.importorskip("onnx", reason="needs requirements-export.txt")
pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
pytest.importorskip("openvino", reason="needs requirements-export.txt")

ASTRONAUT = ROOT / "data/demo/astronaut.jpg"
KEYS = ("max_size", "anchor_sizes", "aspect_ratios", "mask_threshold", "crop_after_resize", "maskness",
        "box_voting", "class_names", "category_ids")  # fmt: skip
SIZES = [(96, 96), (70, 130), (150, 110), (20, 300)]  # of images


def random_model(name, **overrides):
    """A model of a named configuration with random weights whose scores are spread, so that few of them tie."""
    config = get_config(name, **overrides)
    model = Yolact(config).eval()
    model.load_state_dict(recipe.state_dict({k: list(v.shape) for k, v in model.state_dict().items()}, seed=3))
    side = config.model.max_size
    images = torch.from_numpy(np.stack([random_image(side, side, i) for i in range(4)])).permute(0, 3, 1, 2)
    images = (images.flip(1) - 127.0) / 64
    with torch.no_grad():
        model.head.cls.weight *= 2 / model(images).logits.std()
        logits = model(images).logits
        margin = logits[..., 1:].logsumexp(dim=-1) - logits[..., 0]
        model.head.cls.bias.view(-1, config.num_classes + 1)[:, 0] += margin.flatten().quantile(0.95)
    return model


def export(model, folder, suffix, *more):
    save_checkpoint(folder / "model.pth", model)
    path = folder / f"model{suffix}"
    run("tools.export", "--weights", folder / "model.pth", "--output", path, *more)
    return path


def to_batch(images):
    return np.ascontiguousarray(np.stack(images)[..., ::-1].transpose(0, 3, 1, 2))


def check_same(expected, boxes, scores, labels, masks):
    """The same detections; those with equal scores may change places, as pixels may differ by 1 after resizing."""
    assert len(expected) == len(scores)
    if not len(expected):
        return
    distances = np.abs(expected.boxes.numpy()[:, None] - boxes).max(axis=2)
    distances[expected.labels.numpy()[:, None] != labels] = np.inf
    order = distances.argmin(axis=1)
    assert len(set(order.tolist())) == len(order)
    assert distances.min(axis=1).max() < 0.5
    assert np.abs(expected.mask_scores.numpy() - scores[order]).max() < 0.01
    assert np.abs(expected.mask_scores.numpy() - scores).max() < 0.01  # the best are first
    assert (expected.masks.numpy() != masks[order]).mean() < 2e-3


def check_cropped(boxes, masks, counts, cropped):
    """Each cropped mask has the pixels of the whole mask in its box, which begin at the rounded up corner."""
    corners = np.ceil(boxes).astype(int)
    differ = total = 0
    for i, count in enumerate(counts):
        for (x1, y1, x2, y2), mask, part in zip(corners[i, :count], masks[i], cropped[i], strict=False):
            height, width = y2 - y1, x2 - x1
            differ += (part[:height, :width] != mask[y1:y2, x1:x2]).sum()
            total += height * width
            assert not part[height:].any()
            assert not part[:, width:].any()
    assert differ <= total * 1e-4


def check_graph(path, model, sizes, batch_sizes=(1, 3), **detection):
    network = ExportedNetwork(path)
    predictor = Predictor(model, device="cpu", precision="fp32", size=network.size, **detection).published()
    graph = network.runtime.start((), (), "fp32")
    total = 0
    for size in sizes:
        for count in batch_sizes:
            images = [random_image(*size, seed=seed) for seed in range(count)]
            outputs = graph(to_batch(images))
            boxes, scores, labels, masks, counts = outputs[:5]
            scores = next((x for x in outputs[5:] if x.ndim == 2), scores)  # mask_scores
            if outputs[-1].ndim == 4:
                check_cropped(boxes, masks, counts, outputs[-1])
            for i, expected in enumerate(predictor(images)):
                used = slice(int(counts[i]))
                check_same(expected, boxes[i, used], scores[i, used], labels[i, used], masks[i, used])
                total += len(expected)
    assert total > 10


@pytest.fixture(scope="module")
def weights(tmp_path_factory, small_config):
    """A small model for two classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save_checkpoint(path, random_model("yolact_lite", **{k: v for k, v in to_dict(small_config).items() if k in KEYS}))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory, weights):
    """The small model, exported to both formats."""
    folder = tmp_path_factory.mktemp("export")
    for suffix in (".onnx", ".xml"):
        run("tools.export", "--weights", weights, "--output", folder / f"small{suffix}", "--masks_cropped")
    return folder


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_graph_finds_what_predictor_finds(small, weights, suffix):
    check_graph(small / f"small{suffix}", load_model(weights), SIZES)


MODELS = {
    "lite": ("yolact_lite", {"max_size": 96, "box_voting": False}),
    "voting": ("yolact_lite", {"max_size": 96}),
    "penalty": ("yolact_lite", {"max_size": 96, "box_voting": False, "nms": "cluster_penalty"}),
    "resnet50": ("yolact_resnet50", {"max_size": 128}),
    "mmdetection": ("yolact_r50", {"max_size": 128}),
    "pascal": ("yolact_resnet50_pascal", {"max_size": 128}),
    "plus": ("yolact_plus_resnet50", {"max_size": 160}),
}


# The two that differ from "lite" only in what follows the network are exported to one format each.
LAYOUTS = [
    (name, suffix)
    for name in MODELS
    for suffix in (".onnx", ".xml")
    if (name, suffix) not in (("voting", ".onnx"), ("penalty", ".xml"))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "suffix"), LAYOUTS)
def test_every_layout_exports(tmp_path, name, suffix):
    config, overrides = MODELS[name]
    model = random_model(config, **overrides)
    # Random anchors do not agree, so voting lowers their scores; a threshold above 0.05 would drop all detections.
    threshold = 0.05 if model.config.detection.box_voting else 0.1
    detection = {"score_threshold": threshold, "top_k": 30}  # at few anchors of many classes, ties are rare
    # A graph that follows the aspect ratio takes twice as long to trace, so that one of these models has it.
    side = model.config.model.max_size
    size = ["--size", f"{side}x{side}"] if name in ("voting", "penalty") else []
    path = export(model, tmp_path, suffix, "--score_threshold", threshold, "--top_k", 30, *size)
    check_graph(path, model, SIZES, **detection)
    predictor = Predictor.from_weights(path, precision="fp32", **detection)
    image = random_image(120, 100)
    expected = Predictor(model, device="cpu", precision="fp32", size=predictor.backend.size, **detection)(image)
    found = predictor(image)
    check_same(expected, *(x.numpy() for x in (found.boxes, found.mask_scores, found.labels, found.masks)))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64x64", "96x160", "200x96"])
def test_sizes_of_the_network(tmp_path, weights, size):
    path = tmp_path / "model.onnx"
    run("tools.export", "--weights", weights, "--output", path, "--size", size)
    check_graph(path, load_model(weights), SIZES[:3])  # in the last one, squeezed to a square, objects coincide


@pytest.mark.parametrize("suffix", [".xml", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_predictor_and_scripts_take_exported_models(small, weights, tmp_path, dataset, suffix):
    path = small / f"small{suffix}"
    image = random_image(100, 140)
    expected = Predictor(load_model(weights), device="cpu", precision="fp32", score_threshold=0.2)(image)
    found = Predictor.from_weights(path, precision="fp32", score_threshold=0.2)(image)
    assert len(found)
    check_same(expected, *(x.numpy() for x in (found.boxes, found.scores, found.labels, found.masks)))

    cv2.imwrite(str(tmp_path / "in.png"), image)
    common = ["--precision", "fp32", "--threads", 2]
    images = ["--image", tmp_path / "in.png", "--save", "overlay,json,masks,polygons,prototypes"]
    run("eval.py", "--weights", path, *common, *images, "--output", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) >= 6

    evaluation = ["--annotations", dataset, "--image_dir", dataset.parent / "images"]
    metrics = {}
    for source in (weights, path):
        output = tmp_path / f"{source.suffix[1:]}.json"
        run("eval.py", "--weights", source, *common, *evaluation, "--output", output)
        content = json.loads(output.read_text())
        metrics[source] = [content["bbox"]["AP"], content["segm"]["AP"]]
    assert metrics[weights] == pytest.approx(metrics[path], abs=1e-3)

    text = run("eval.py", "--weights", path, *common, "--benchmark")
    assert "image to masks" in text
    assert "backbone" not in text  # it runs as a whole

    video = cv2.VideoWriter(str(tmp_path / "in.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (140, 100))
    for _ in range(3):
        video.write(image)
    video.release()
    run("eval.py", "--weights", path, *common, "--video", tmp_path / "in.mp4", "--output", tmp_path / "video")
    assert (tmp_path / "video.mp4").is_file()


def test_the_file_alone_is_enough(small):
    import onnx

    properties = {entry.key: entry.value for entry in onnx.load(small / "small.onnx").metadata_props}
    assert json.loads(properties["class_names"]) == ["disc", "tile"]
    assert json.loads(properties["category_ids"]) == [7, 3]
    assert "uint8 RGB" in properties["input"]
    for suffix in (".onnx", ".xml"):
        network = ExportedNetwork(small / f"small{suffix}")
        assert network.config.class_names == ("disc", "tile")
        assert network.size == 96  # the input of an image has its aspect ratio
        report = json.loads((small / f"small{suffix}.parity.json").read_text())
        assert report["pytorch_detections"] == report["pytorch_matched"] > 0
        assert report["exported_detections"] == report["exported_matched"] == report["pytorch_matched"]
        assert max(report["raw_difference"].values()) < 1e-3


@pytest.mark.parametrize(
    "suffix", [pytest.param(".onnx", marks=pytest.mark.slow), pytest.param(".xml", marks=pytest.mark.slow)]
)
def test_raw_export_is_the_network_alone(tmp_path, weights, suffix):
    path = tmp_path / f"raw{suffix}"
    run("tools.export", "--weights", weights, "--output", path, "--raw")
    model = load_model(weights)
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = model(images)
    found = ExportedNetwork(path).runtime.start((), (), "fp32")(images.numpy())
    for a, b in zip(expected, found, strict=False):
        assert np.abs(a.numpy() - b).max() <= (1e-3 if suffix == ".onnx" else 2e-2) * a.abs().max()  # float16 weights
    image = random_image()
    expected = Predictor(model, device="cpu", precision="fp32", size=(96, 96)).published()(image)
    assert len(Predictor.from_weights(path, precision="fp32").published()(image)) == len(expected) > 0


@pytest.mark.slow
def test_a_raw_export_of_plus_is_not_run_without_its_mask_scores(tmp_path):
    pytest.importorskip("onnxscript")
    path = export(random_model("yolact_plus_resnet50", max_size=64), tmp_path, ".onnx", "--raw")
    text = run("eval.py", "--weights", path, "--image", ASTRONAUT, "--output", tmp_path / "out", code=2)
    assert "export without --raw" in text


@pytest.mark.slow
def test_int8_keeps_the_bundled_models_detections(tmp_path):
    pytest.importorskip("nncf")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        source = cv2.imread(str(ROOT / "data/demo" / ("astronaut.jpg", "camera.jpg")[i % 2]))
        cv2.imwrite(str(images / f"{i}.png"), np.roll(source, 20 * i, axis=1))
    path = tmp_path / "int8.xml"
    text = run("tools.export", "--output", path, "--size", 288, "--int8", "--calibration", images)
    assert "calibrated on 12 images" in text
    assert ExportedNetwork(path).precision == "int8"
    assert path.with_suffix(".bin").stat().st_size < 0.6 * 15_000_000  # float16 takes 15 MB
    image = cv2.imread(str(ASTRONAUT))
    bundled = load_model(ROOT / "weights/yolact_lite_person.pth")
    expected = Predictor(bundled, device="cpu", precision="fp32", size=288, score_threshold=0.5)(image)
    found = Predictor.from_weights(path, precision="fp32", score_threshold=0.4)(image)
    assert len(expected)
    assert len(found)
    a, b = expected.masks[0], found.masks[0]
    assert float((a & b).sum() / (a | b).sum()) > 0.8


@pytest.mark.parametrize("network_size", [96, (96, 96)])
def test_the_whole_way_is_one_torch_export_program(weights, network_size):
    model = load_model(weights)
    program = export_program(model, network_size, model.config.detection)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    predictor = Predictor(model, device="cpu", precision="fp32", size=network_size).published()
    for size in SIZES:
        images = [random_image(*size, seed=1), random_image(*size, seed=2)]
        boxes, scores, labels, masks, count = loaded(torch.from_numpy(to_batch(images)))
        for i, expected in enumerate(predictor(images)):
            found = (x[i, : count[i]].numpy() for x in (boxes, scores, labels, masks))
            check_same(expected, *found)


def test_rescoring_reorders_as_predictor_does(weights):
    model = load_model(weights)
    detection = {"maskness": True, "score_threshold": 0.2}
    predictor = Predictor(model, device="cpu", precision="fp32", crop_after_resize=True, **detection)
    graph = DetectionGraph(model, (96, 96), predictor.config.detection).eval()
    image = random_image(96, 96)
    boxes, _, labels, masks, count, mask_scores = graph(torch.from_numpy(to_batch([image])))
    used = slice(int(count[0]))
    expected = predictor(image)
    assert len(expected) > 3
    assert (expected.scores.argsort(descending=True) != torch.arange(len(expected))).any()  # it did reorder
    check_same(expected, *(x[0, used].numpy() for x in (boxes, mask_scores, labels, masks)))


def test_resizing_in_the_graph_gives_opencvs_values():
    image = cv2.imread(str(ASTRONAUT))[:400]
    for size in ((288, 288), (550, 550), (120, 700)):
        found = resize_like_opencv(torch.from_numpy(to_batch([image])), size)[0].permute(1, 2, 0).flip(-1).numpy()
        difference = np.abs(found - resize(image, size, uint8=True))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
    same = torch.from_numpy(to_batch([image]))
    assert torch.equal(resize_like_opencv(same, (400, 512)), same.float())


def test_whole_masks_can_be_removed(small, tmp_path, monkeypatch):
    import onnxruntime

    shutil.copy(small / "small.onnx", tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    exec(block, names := {})
    inputs = {"image": to_batch([random_image(70, 130)])}
    expected, found = (
        onnxruntime.InferenceSession(x).run(names["outputs"], inputs) for x in ("model.onnx", "cropped.onnx")
    )
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert expected[-1].any()


def test_the_example_runs_without_torch(small, tmp_path):
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.path = [p for p in sys.path if p]; "
        f"sys.argv = ['x', {str(small / 'small.onnx')!r}, {str(ASTRONAUT)!r}, {str(tmp_path / 'out.png')!r}]; "
        f"runpy.run_path({str(ROOT / 'examples/onnxruntime_only.py')!r}, run_name='__main__')"
    )
    text = spawn("-c", code, cwd=tmp_path)
    assert "mask" in text
    assert (cv2.imread(str(tmp_path / "out.png")) != cv2.imread(str(ASTRONAUT))).any()
    assert "usage: " in spawn(ROOT / "examples/onnxruntime_only.py", "--help", code=1)


def test_bad_files_get_one_line(small, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    whole = (small / "small.onnx").read_bytes()
    (tmp_path / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("not found")
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(other), tmp_path / "other.onnx")
    (tmp_path / "truncated.xml").write_bytes((small / "small.xml").read_bytes()[:5000])
    (tmp_path / "truncated.bin").write_bytes((small / "small.bin").read_bytes())
    (tmp_path / "short.xml").write_bytes((small / "small.xml").read_bytes())
    (tmp_path / "short.bin").write_bytes((small / "small.bin").read_bytes()[:1000])
    (tmp_path / "alone.xml").write_bytes((small / "small.xml").read_bytes())
    expected = {
        "truncated.onnx": "cannot be used as an ONNX model",
        "empty.onnx": "",
        "text.onnx": "cannot be used as an ONNX model",
        "other.onnx": "not written by tools.export",
        "truncated.xml": "cannot be used as an OpenVINO model",
        "short.xml": "cannot be used as",
        "alone.xml": "copy alone.bin to the same folder",
        "missing.onnx": "no such file",
    }
    for name, message in expected.items():
        text = run("eval.py", "--weights", tmp_path / name, "--image", ASTRONAUT, "--output", tmp_path / "o", code=2)
        assert message in text, name
        assert len(text.strip().splitlines()) == 1, text


def test_wrong_requests_get_one_line(small, weights, tmp_path, dataset):
    onnx_file, out = small / "small.onnx", tmp_path / "m.onnx"
    for size in ("0", "0x64", "16"):
        assert "at least 32 pixels a side" in run("tools.export", "--output", out, "--size", size, code=2)
    image = ["--image", ASTRONAUT, "--output", tmp_path / "o"]
    for words, message in (
        (["eval.py", "--weights", onnx_file, "--size", 128, *image], "exported for 96;"),
        (["eval.py", "--weights", onnx_file, "--precision", "bf16", *image], "ONNX Runtime computes in float32"),
        (["eval.py", "--weights", onnx_file, "--compile", *image], "exported"),
        (["eval.py", "--weights", onnx_file, "--config", "yolact_lite", *image], "has its own configuration"),
        (["tools.export", "--weights", onnx_file, "--output", out], "give the .pth"),
        (["tools.export", "--weights", weights, "--output", tmp_path / "m.engine"], "the suffix must be"),
        (["tools.export", "--weights", weights, "--output", out, "--int8"], "--int8 needs"),
        (
            ["tools.export", "--weights", weights, "--output", out, "--calibration", ASTRONAUT],
            "can only be used with --int8",
        ),
        (["tools.export", "--weights", weights, "--output", out, "--nms", "standard"], "invalid choice"),
        (["tools.export", "--weights", weights, "--output", out, "--set", "nms=standard"], "cannot be exported"),
        (["tools.export", "--weights", weights, "--output", out, "--set", "nms_treshold=0.4"], "nms_threshold"),
        (["tools.export", "--weights", weights, "--output", out, "--check", tmp_path / "no.jpg"], "no such image"),
    ):
        text = run(*words, code=2)
        assert message in text, text
        assert len(text.strip().splitlines()) == 1, text
    assert not out.exists()


@pytest.mark.slow
def test_an_export_that_differs_is_not_written(weights, tmp_path, monkeypatch):
    from tools.export import onnx_export

    class Wrong(DetectionGraph):
        """A graph whose boxes are a tenth too wide, as a wrong resize would make them."""

        def forward(self, image):
            boxes, *rest = super().forward(image)
            return boxes * torch.tensor([1.0, 1.0, 1.2, 1.0]), *rest

    monkeypatch.setattr(onnx_export, "DetectionGraph", Wrong)
    words = ["--weights", weights, "--output", tmp_path / "m.onnx", "--size", "96x96"]
    text = run("tools.export", *words, code=2)
    assert "not written, because its results differ from the model's: only" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino"])
def test_missing_packages_are_named(weights, small, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    suffix = ".xml" if package == "openvino" else ".onnx"
    text = run("tools.export", "--weights", weights, "--output", tmp_path / f"m{suffix}", code=2)
    assert f"{package} is not installed; run: pip install -r requirements-export.txt" in text
    if package != "onnxscript":
        text = run("eval.py", "--weights", small / f"small{suffix}", "--image", ASTRONAUT, code=2)
        assert f"{package} is not installed" in text


def test_int8_without_a_readable_image_is_not_written_in_float(weights, tmp_path):
    pytest.importorskip("nncf")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    words = ["--output", tmp_path / "m.xml", "--int8", "--calibration", tmp_path / "broken.jpg"]
    assert "none could be read" in run("tools.export", "--weights", weights, *words, code=2)
    assert not (tmp_path / "m.xml").exists()


def test_int8_needs_nncf(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    words = ["--output", tmp_path / "m.xml", "--int8", "--calibration", ASTRONAUT]
    assert "nncf is not installed" in run("tools.export", "--weights", weights, *words, code=2)
