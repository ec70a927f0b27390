"""The structure that keeps the project easy to change: imports point down, nothing happens at import.

The core is the paper; tools are built on top of it, and only scripts reach into them, in the branch that needs them.
"""

from __future__ import annotations

import ast
import re
import sys

import pytest
import torch
from conftest import ROOT, random_image, spawn
from torch import nn

from backbone import BACKBONES
from config import get_config
from inference import Predictor
from layers.nms import NMS
from yolact import Yolact

# What the core may import besides Python; Pillow is a dependency of torchvision.
PACKAGES = {"torch", "torchvision", "pycocotools", "numpy", "cv2", "tqdm", "PIL"}
SCRIPTS = ("train.py", "eval.py")
# Every import points down this list, or stays in its room.
ROOMS = (
    ("train", "eval", "hubconf"),
    ("benchmarks",),
    ("tools",),
    ("training",),
    ("evaluation",),
    ("inference",),
    ("weights",),
    ("yolact",),
    ("backbone", "data"),
    ("layers",),
    ("config",),
    ("utils",),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
FILES = [
    path.relative_to(ROOT)
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).with_suffix("").parts[0] in RANK and path.parent.name != "benchmarks"
] + [(ROOT / "benchmarks/stages.py").relative_to(ROOT)]


def module_of(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """The modules that a file imports from the project, with whether the import is at the top of the file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    blocks = (node.body for node in tree.body if isinstance(node, ast.With))  # hubconf.py imports in one
    top = {id(node) for body in (tree.body, *blocks) for node in body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in RANK:
                yield name, id(node) in top


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    room = path.with_suffix("").parts[0]
    for name, _ in imports(path):
        assert RANK[name.split(".")[0]] >= RANK[room], f"{path} imports {name}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_import_is_hidden(path):
    """In a function, or behind TYPE_CHECKING, an import can hide a circle. Scripts reach into tools from a branch."""
    hidden = [name for name, at_top in imports(path) if not at_top]
    if str(path) in SCRIPTS:
        assert {name.split(".")[0] for name in hidden} <= {"tools", "benchmarks"}
        assert not [name for name, at_top in imports(path) if at_top and name.split(".")[0] in ("tools", "benchmarks")]
    else:
        assert hidden == []
    assert "TYPE_CHECKING" not in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] not in ("tools", "benchmarks")], ids=str)
def test_the_core_needs_six_packages(path):
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            package = name.split(".")[0]
            assert package in PACKAGES | sys.stdlib_module_names or package in RANK, f"{path} needs {package}"


def test_there_are_no_circles():
    graph = {module_of(path): {name for name, _ in imports(path)} for path in FILES}
    remaining = dict(graph)
    while remaining:
        leaves = [name for name, used in remaining.items() if not used & set(remaining) - {name}]
        assert leaves, f"a circle among {sorted(remaining)}"
        for name in leaves:
            del remaining[name]


IMPORT_ONLY = """
import sys, torch, torchvision
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
before = set(dir(torch.ops)) | set(torch._C._dispatch_get_all_op_names())
import yolact, inference, weights
files = [f for f in opened if f.startswith(sys.argv[1]) and not f.endswith((".py", ".pyc")) and "__pycache__" not in f]
print(files, torch.cuda.is_initialized())
ours = [n for n in torch._C._dispatch_get_all_op_names() if n not in before and n.startswith("yolact")]
print(ours)
"""


def test_importing_reads_no_file_and_touches_no_device():
    assert spawn("-W", "ignore", "-c", IMPORT_ONLY, ROOT).split("\n")[:2] == ["[] False", "[]"]


def test_readme_shows_how_to_extend(monkeypatch):
    """The blocks of docs/extending.md add a backbone and an NMS that run in the whole network."""
    readme = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    section = readme.split("\n## Extend\n")[1]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    before = {*BACKBONES, *NMS}
    for block in blocks:
        exec(block, {"__name__": "example"})
    (backbone,), (name,) = BACKBONES.keys() - before, NMS.keys() - before
    monkeypatch.setitem(BACKBONES, backbone, BACKBONES.pop(backbone))  # removed at the end of the test
    monkeypatch.setitem(NMS, name, NMS.pop(name))
    model = Yolact(get_config("yolact_lite", backbone=backbone, max_size=96, freeze_stages=1)).train()
    loss = sum(out.float().mean() for out in model(torch.randn(2, 3, 96, 96)))
    loss.backward()
    assert any(p.grad is None for p in model.backbone.parameters())  # the frozen stem
    assert any(p.grad is not None for p in model.backbone.parameters())
    predictor = Predictor(model, "cpu", "fp32", nms=name, score_threshold=0.0, top_k=10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in predictor.backend.model.modules())
    assert 0 < len(predictor(random_image())) <= 10
