"""Promise: the page needs nothing but its server, and shows what the server does. With a browser on this machine, in that; else its text alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.resources import files

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from tests.serving.process import ServerProcess, serving

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PAGE = files("twinpilots.server").joinpath("page.html").read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving("smollm2-135m", "--device", "cpu", "--max-num-seqs", "4", key=None) as running:
        yield running


def test_the_page_asks_nobody_else() -> None:
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", PAGE))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "innerHTML" not in PAGE  # what a model writes is text


def test_it_comes_with_a_policy_that_holds_it_to_that(server: ServerProcess) -> None:
    reply = server.ask("GET", "/")
    assert reply.body.decode() == PAGE
    assert "default-src 'none'" in reply.headers["content-security-policy"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_engine_at_work(server: ServerProcess) -> None:
    server.ask("POST", "/v1/completions", {"prompt": "The sea", "max_tokens": 24, "ignore_eos": True})
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--virtual-time-budget=4000", "--dump-dom"]
        shown = subprocess.run([BROWSER, *flags, f"{server.url}/"], capture_output=True, text=True, timeout=120, check=True).stdout
    assert '<span id="state" role="status" class="">ready</span>' in shown
    assert "smollm2-135m, version" in shown and "tokens/s generated" in shown
    assert shown.count('<div class="bar">') == 7  # an operation each: who computes what
    assert shown.count("<path") >= 3  # lines in the charts
