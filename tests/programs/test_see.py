"""The page of `pastkey see` in Chromium: drawn, silent, by keys, in both colours, on a phone, clean for axe."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest

from pastkey.__main__ import main

from .devtools import opened
from .environments import install_chromium, node_environment

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FLAGS = {
    "llama": ["--prompt", "Tom had 2 red", "--temperature", "0.8", "--seed", "1"],
    "gpt2": ["--prompt", "Zoë had 37", "--last", "6", "--max-new-tokens", "4"],
}


@pytest.fixture(scope="module")
def browser():
    chromium = install_chromium()
    if chromium is None:
        pytest.skip("chromium is not installed; PASTKEY_INSTALL=1 installs Debian's")
    with opened(chromium) as page:
        yield page


@pytest.fixture(scope="module")
def axe():
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = node_environment(HERE / "axe" / "package.json", "axe")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page_of(bundles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")

    @functools.cache
    def page(name: str) -> Path:
        file = folder / f"{name}.html"
        more = ["--reference", bundles("llama-fp32")] if name == "llama" else []
        assert main(["see", *map(str, [bundles(name), *FLAGS[name], *more, "--out", file])]) == 0
        assert file.stat().st_size < 2_000_000
        return file

    return page


@pytest.mark.parametrize("name", FLAGS)
def test_the_page_is_drawn_without_a_request_or_a_message(page_of, browser, axe, name):
    file = page_of(name)
    for scheme, width in (("light", 1100), ("dark", 1100), ("light", 390), ("dark", 390)):
        browser.requests.clear()
        browser.open(file, width=width, scheme=scheme)
        assert browser.requests == [file.as_uri()]
        assert browser.messages == []
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(
            "[...document.querySelectorAll('canvas')].every(one => one.getContext('2d')"
            ".getImageData(0, 0, one.width, one.height).data.some(number => number))"
        )
        assert browser.run("document.querySelectorAll('#chips .chip').length") == (
            7 if "--last" in FLAGS[name] else browser.run("ids.length")
        )
        if (scheme, width) in {("light", 390), ("dark", 1100)}:
            continue  # the rules of axe are of colours or of widths
        browser.run(axe)
        faults = browser.run("axe.run().then(found => found.violations.map(one => one.id + ': ' + one.nodes[0].html))")
        assert faults == []


def test_the_slider_leads_from_the_prompt_to_the_end(page_of, browser):
    browser.open(page_of("llama"))
    browser.run("document.getElementById('slider').focus()")

    def press(key: str) -> str:
        for kind in ("rawKeyDown", "keyUp"):
            code = {"Home": 36, "End": 35, "ArrowRight": 39}[key]
            browser.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        return str(browser.run("document.getElementById('where').textContent"))

    assert "Read up to token 1," in press("Home")
    assert "inside the prompt" in press("ArrowRight")
    assert "all" in browser.run("document.getElementById('cache-text').textContent")  # the prompt is read at once
    last = press("End")
    ended = browser.run("data.text.ended")
    assert ("the end token follows" in last) == ended
    read = browser.run("ids.length - 1")
    assert f"keys and values of {read - 1} tokens come from the cache" in browser.run(
        "document.getElementById('cache-text').textContent"
    )
    shown = browser.run("[...document.querySelectorAll('#bars .value')].map(one => one.textContent)")
    assert len(shown) == 10
    browser.run("document.getElementById('weights').focus()")
    browser.send("Input.dispatchKeyEvent", type="rawKeyDown", key="ArrowUp", code="ArrowUp", windowsVirtualKeyCode=38)
    assert "%" in browser.run("document.getElementById('weights-out').textContent")
    browser.run("go(0)")  # the first token can read nothing but itself
    assert browser.run("document.getElementById('reads').textContent").endswith("(itself)100 %")
