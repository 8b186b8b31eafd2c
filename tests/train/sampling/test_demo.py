"""`sdd demo` in a browser: a picture is dropped, clicked, placed and drawn; and what the page refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.inspect.conftest import browser
from tests.toy import PROJECT
from toyworld.render import Scene
from train.sampling.drawing import KEY
from train.sampling.page import studio

pytest.importorskip("gradio", reason="gradio is not installed")

__all__ = ["browser"]


def free_port() -> int:
    with contextlib.closing(socket.socket()) as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


@contextlib.contextmanager
def demo(*words: str, cwd: Path) -> Iterator[str]:
    """The address of the page that a command of its own serves."""
    command = [sys.executable, "-m", "sdd", "demo", *words, "--port", str(free_port())]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"the page is at (\S+)", line):
                yield found[1]
                break
        else:
            raise AssertionError("".join(said))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stdout.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo(str(run), cwd=tmp_path_factory.mktemp("demo")) as found:
        yield found


@pytest.fixture
def opened(browser: Browser, address: str):
    """Opens the page at a width; afterwards there must have been no error and no request to elsewhere."""
    said: list[str] = []

    def open_page(width: int = 1280) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60_000)
        page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else said.append(r.url))
        page.goto(address)
        expect(page.locator("#canvas .box")).to_have_count(1)
        return page

    yield open_page
    assert said == []


def drag(page: Page, handle: str, dx: float, dy: float) -> None:
    """By shares of the canvas."""
    page.locator(handle).scroll_into_view_if_needed()
    box, side = page.locator(handle).bounding_box(), page.locator("#canvas .paper").bounding_box()
    assert box and side
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx * side["width"] / 2, y + dy * side["height"] / 2)
    page.mouse.move(x + dx * side["width"], y + dy * side["height"])
    page.mouse.up()


def click_subject(page: Page, scene: Scene, number: int, panel: int) -> None:
    """Where the subject of the scene is, in the picture as the page shows it."""
    rows, columns = np.nonzero(scene.subjects[number].mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    picture = page.locator(f"#upload-{panel} img")
    expect(picture).to_be_visible()
    shown = picture.bounding_box()
    assert shown
    scale = min(shown["width"], shown["height"]) / scene.image.shape[0]  # it is square, and fitted
    left = (shown["width"] - scale * scene.image.shape[1]) / 2
    top = (shown["height"] - scale * scene.image.shape[0]) / 2
    at = {"x": left + scale * (columns[nearest] + 0.5), "y": top + scale * (rows[nearest] + 0.5)}
    picture.click(position=at)  # type: ignore[arg-type]  # it is a typed dictionary of these keys
    expect(page.locator(f"#cut-{panel} img")).to_be_visible()


def drawn(page: Page, count: int) -> list[dict[str, Any]]:
    """How the pictures in the gallery were made, as their own files say."""
    pictures = page.locator("#drawn .grid-container img")
    expect(pictures).to_have_count(count, timeout=180_000)
    found = []
    for picture in pictures.all():
        response = page.request.get(str(picture.get_attribute("src")))
        assert response.ok
        path = Path("of-the-page.png")
        path.write_bytes(response.body())
        found.append(json.loads(Image.open(path).info[KEY]))
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_a_picture_is_dropped_clicked_placed_and_drawn(opened, pictures, scene, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#tag-1 input, #tag-1 textarea").fill("mug")
    page.locator("#upload-1 input[type=file]").set_input_files("scene.png")
    click_subject(page, scene, 0, 1)
    page.locator("#prompt input, #prompt textarea").fill("a mug on grass")
    expect(page.locator("#canvas .box-0 span")).to_have_text("mug")
    drag(page, "#canvas .box-0 span", 0.3, -0.2)
    drag(page, "#canvas .box-0 i", -0.1, 0.1)
    page.locator("#seed input").fill("7")
    page.locator("#draw").click()
    made = drawn(page, 4)
    assert [one["seed"] for one in made] == [7, 8, 9, 10]
    (mug,) = made[0]["subjects"]
    assert mug["box"] == pytest.approx((0.38, 0.1, 0.68, 0.75), abs=0.02)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#drawn .grid-container img").first.click()
    page.get_by_text("How it was made").click()
    expect(page.locator("#made")).to_contain_text('"a mug on grass"')


def test_an_example_draws_two_subjects_at_one_click(opened, pictures):
    page = opened()
    page.get_by_role("button", name="a mug and a fish on grass").click()
    expect(page.locator("#canvas .box span")).to_have_text(["mug", "fish"])
    made = drawn(page, 4)
    assert [s["tag"] for s in made[0]["subjects"]] == ["mug", "fish"]


def test_what_cannot_be_drawn_is_a_note_on_the_page(opened, pictures):
    page = opened()
    page.locator("#upload-1 input[type=file]").set_input_files("mug.png")
    expect(page.locator("#cut-1 img")).to_be_visible()
    page.locator("#draw").click()
    expect(page.get_by_text("Say what the prompt calls each subject")).to_be_visible()
    page.locator("#tag-1 input, #tag-1 textarea").fill("mug")
    page.locator("#prompt input, #prompt textarea").fill("a hat")
    page.locator("#draw").click()
    expect(page.get_by_text("does not contain its subject's tag")).to_be_visible()


def test_no_file_but_the_pages_own_is_served_and_uploads_are_bounded(address, pictures):
    for path in ("/etc/passwd", str(PROJECT / "README.md"), str(pictures / "mug.png"), "../../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")  # an address of this test's own
        assert refused.value.code in (403, 404)
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"0" * (21 << 20)
    request = urllib.request.Request(  # as above
        f"{address}gradio_api/upload",
        body + b"\r\n--b--\r\n",
        {"Content-Type": "multipart/form-data; boundary=b"},
    )
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as refused_upload:
        urllib.request.urlopen(request)  # as above
    if isinstance(refused_upload.value, urllib.error.HTTPError):
        assert refused_upload.value.code == 413


def test_no_url_is_fetched_for_a_request_and_no_other_sites_page_gets_in(address):
    def status(path: str, host: str, *data: object) -> int:
        body = json.dumps({"data": data, "fn_index": 0, "session_hash": "s"}).encode() if data else None
        headers = {"Content-Type": "application/json", "Host": host}
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, body, headers)) as response:  # as above
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    own = address.split("/")[2]
    file = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
    for named in (file, [{"image": file}]):
        assert status("gradio_api/queue/join", own, named) == 400
    assert status("", "rebound.example") == 400
    assert status("", own) == status("", own.replace("127.0.0.1", "localhost")) == 200


def test_a_photos_cutout_is_shown_small(tmp_path):
    Image.new("RGB", (1200, 900)).save(tmp_path / "photo.png")
    mask = np.zeros((900, 1200), bool)
    mask[300:600, 600:900] = True
    shown = studio.tinted((str(tmp_path / "photo.png"), mask))
    assert shown.size == (520, 390)
    pixels = np.asarray(shown)
    assert not pixels[195, 325].any() and pixels[195, 100].min() > 128


def test_bad_words_are_one_line_before_anything_is_loaded(tmp_path):
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        mistakes = [
            (["demo", "nowhere"], "nowhere: no training run"),
            (["demo", "--labels", "nowhere"], "nowhere: no such file"),
            (["demo", "--port", port], f"127.0.0.1:{port}: "),
            (["demo", "--host", "256.0.0.1"], "256.0.0.1:7860: "),
        ]
        code = f"""
import sys
from sdd.cli import main
for words in {[words for words, _ in mistakes]!r}:
    sys.argv = ["sdd", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2
print({{"torch", "gradio"}} & sys.modules.keys())
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    for line, (_, named) in zip(done.stderr.splitlines(), mistakes, strict=True):
        assert line.startswith("sdd: ") and named in line
