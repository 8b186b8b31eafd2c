"""A real browser for the pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

expect.set_options(timeout=60_000)  # milliseconds: on a busy machine a page may take longer than the usual five seconds


@pytest.fixture(scope="module")  # not longer: other tests fork, and a fork holds on to the browser's pipes
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium-headless-shell")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path):
    """Opens a page at a width; afterwards there must have been no error and no request but for the file itself."""
    said: list[str] = []

    def note_request(request: Request) -> None:
        if not request.url.startswith(("file:", "data:")):
            said.append(request.url)

    def open_page(html: str, width: int = 1280) -> Page:
        path = tmp_path / "page.html"
        path.write_text(html)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", note_request)
        page.goto(path.as_uri())
        return page

    yield open_page
    assert said == []
