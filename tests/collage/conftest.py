"""A headless Chromium for the tests that load pages."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for demo.py, the invented content

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def browser():
    if os.environ.get("MLCOLLAGE_NO_BROWSER") == "1":
        pytest.skip("MLCOLLAGE_NO_BROWSER=1: the pages were not loaded in a browser.")
    from playwright.sync_api import sync_playwright

    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.fail(
            "no Chromium was found, so the digest pages cannot be tested; install Chromium or Chrome, "
            "or set MLCOLLAGE_NO_BROWSER=1 to leave these tests out.",
            pytrace=False,
        )
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=program, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def browser_page(browser):
    """Opens pages: ``open(address, width=1280, ...)``; fails the test on console errors, exceptions and requests."""
    contexts, complaints = [], []

    def open_page(address, *, width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
