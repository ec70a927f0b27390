"""The page of tools.demo, used in a real browser as a person would."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, run

from tools import demo

DRIVER = shutil.which("chromedriver")


def test_sliders_do_not_run_the_network_again(weights, tmp_path):
    upload = tmp_path / "a1b2/photo.png"
    upload.parent.mkdir()
    shutil.copy(ROOT / "data/demo/astronaut.jpg", upload)
    (tmp_path / "out").mkdir()
    args = demo.build_parser().parse_args(["--weights", str(weights), "--device", "cpu", "--precision", "fp32"])
    segmenter = demo.Segmenter(args, tmp_path / "out")
    runs = []
    predictor = segmenter.predictor(96)
    network = predictor.backend.network
    predictor.backend.network = lambda batch: runs.append(1) or network(batch)
    counts = {}
    for threshold, top_k in ((0.0, 10), (0.5, 10), (0.0, 2)):
        choices = str(upload), 0.9, [], threshold, top_k, "fast", 96
        text, table, *_ = segmenter(*choices)
        assert len(table) == int(text.split()[0])
        _, json_file, _ = segmenter.write(*choices)
        counts[threshold, top_k] = len(json.loads(Path(json_file).read_text())["annotations"])
        wanted = predictor.with_detection(score_threshold=threshold, top_k=top_k)(str(upload))
        assert counts[threshold, top_k] == len(wanted)
        runs.pop()  # that of `wanted`
        assert text.startswith(f"{len(wanted)} detection")
    assert counts[0.0, 10] > counts[0.0, 2] == 2
    name = table[0][0]
    text, table, overlay, compared, *_ = segmenter(str(upload), 1.0, [name], 0.0, 10, "fast", 96)
    assert {row[0] for row in table} == {name}
    assert compared.shape[1] == 2 * overlay.shape[1]
    assert (compared[:, : overlay.shape[1]] == overlay).all()
    assert (compared[:, overlay.shape[1] :] == cv2.imread(str(upload))[..., ::-1]).all()  # nothing scores 1
    assert len(runs) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a1b2"]  # replaced at each step


def test_missing_gradio_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "gradio is not installed; run: pip install -r requirements-tools.txt" in run("tools.demo", code=2)


def wait_for(condition, seconds=60, what="the page"):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what} did not change within {seconds} s")


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio", reason="needs requirements-tools.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tools.demo", "--port", port, "--device", "cpu", "--precision", "fp32"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port} (stop with Ctrl-C)\n"
        yield f"http://127.0.0.1:{port}"
        process.kill()


@pytest.fixture
def browser(tmp_path, chromium):
    """Chromium, with a webcam that always shows the astronaut."""
    if DRIVER is None:
        pytest.skip("needs the driver of Chromium (chromium-driver in Debian)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium[0]
    webcam = tmp_path / "webcam.mjpeg"
    webcam.write_bytes((ROOT / "data/demo/astronaut.jpg").read_bytes() * 30)
    for argument in (*chromium[1:], "--window-size=1300,1000"):
        options.add_argument(argument)
    for argument in ("device-for-media-stream", "ui-for-media-stream"):
        options.add_argument(f"--use-fake-{argument}")
    options.add_argument(f"--use-file-for-fake-video-capture={webcam}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does with the page."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        wait_for(lambda: self.all("input[type=file]"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def upload(self, path):
        for button in self.all("button[aria-label='Clear'], button[aria-label='Remove Image']"):
            button.click()
        wait_for(lambda: self.all("input[type=file]"), what="the upload field")[0].send_keys(str(path))

    def visible_button(self, name):
        """Return the button whose text or label starts with `name`, or None if there is none."""
        for button in self.all("button"):
            if button.is_displayed() and (button.text or button.get_attribute("aria-label") or "").startswith(name):
                return button
        return None

    @property
    def status(self):
        return self.all("#status")[0].text

    @property
    def count(self):
        found = re.match(r"(\d+) detection", self.status)
        return int(found[1]) if found else None

    def set_slider(self, label, value):
        box = self.all(f"input[type=number][aria-label*='{label}']")[0]
        self.browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('change', {bubbles: true})); arguments[0].blur()",
            box,
            str(value),
        )

    def download(self, label, path):
        def click():  # nothing happens until the file is written
            next(button for button in self.all("button, a") if button.text == label).click()
            return path if path.exists() else None

        return wait_for(click, what=str(path))


@pytest.mark.slow
def test_the_page(address, browser, tmp_path):
    page = Page(browser, address)
    page.upload(ROOT / "data/demo/camera.jpg")
    wait_for(lambda: page.count)
    many = page.count
    assert many >= 2
    page.set_slider("Score threshold", 0.8)
    wait_for(lambda: page.count not in (None, many), what="the count")
    assert 0 < page.count < many
    few = page.count
    downloads = tmp_path / "downloads"
    overlay = cv2.imread(str(page.download("Overlay PNG", downloads / "camera_segmented.png")))
    assert overlay.shape == cv2.imread(str(ROOT / "data/demo/camera.jpg")).shape
    coco = json.loads(page.download("COCO JSON", downloads / "camera_coco.json").read_text())
    assert coco["images"][0]["file_name"] == "camera.jpg"
    assert len(coco["annotations"]) == few
    labelme = json.loads(page.download("LabelMe JSON", downloads / "camera.json").read_text())
    assert len({shape["group_id"] for shape in labelme["shapes"]}) == few
    page.set_slider("Score threshold", 0.1)
    wait_for(lambda: (page.count or 0) > 1, what="the count")
    page.set_slider("Maximum number", 1)
    wait_for(lambda: page.count == 1, what="the count")
    for name in ("Compare", "Prototypes", "Composition of masks"):
        # Gradio keeps an invisible copy of the tabs, to measure their width.
        next(
            tab for tab in page.all("button[role=tab]") if tab.text == name and tab.get_attribute("tabindex") != "-1"
        ).click()
        image = wait_for(lambda: [i for i in page.all("[role=tabpanel] img") if i.is_displayed()], what="the tab")[0]
        assert int(image.get_property("naturalWidth")) > 500
    browser.set_window_size(420, 900)  # a phone: no horizontal scrolling
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_the_webcam(address, browser):
    page = Page(browser, address)
    for action in ("Capture from camera", "Click to Access Webcam", "capture "):
        wait_for(lambda name=action: page.visible_button(name), what=action).click()
    wait_for(lambda: page.count)
    assert page.status.endswith(": person")


@pytest.mark.slow
def test_broken_and_large_uploads_get_a_message(address, browser, tmp_path):
    page = Page(browser, address)
    photo = (ROOT / "data/demo/astronaut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(photo[: len(photo) // 2])
    page.upload(tmp_path / "cut.jpg")
    wait_for(lambda: "cut.jpg: the end of the file is missing" in page.status)
    assert str(tmp_path) not in page.status
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((8000, 7000, 3), np.uint8))
    page.upload(tmp_path / "large.png")
    wait_for(lambda: "large.png: 7000x8000 is more than the limit" in page.status)
    page.upload(ROOT / "data/demo/astronaut.jpg")  # the page still works
    wait_for(lambda: page.count)
    (tmp_path / "text.jpg").write_text("no image at all")
    page.upload(tmp_path / "text.jpg")
    wait_for(lambda: any("cannot identify image file" in e.text for e in page.all(".toast-body, .toast-wrap, .error")))


def test_wrong_weights_and_a_port_in_use(tmp_path):
    pytest.importorskip("gradio", reason="needs requirements-tools.txt")
    assert "no such weights file" in run("tools.demo", "--weights", tmp_path / "none.pth", code=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = run("tools.demo", "--port", taken.getsockname()[1], "--device", "cpu", code=2)
    assert "cannot be used" in message
    assert "cannot be used" in run("tools.demo", "--port", 70000, "--device", "cpu", code=2)
