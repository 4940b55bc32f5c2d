"""The page of `pastkey see` in Chromium: drawn, silent, by keys, in both colours, on a phone, clean for axe."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from pastkey.__main__ import main

from ..see.conftest import data_of
from .environments import had, install_chromium, node_environment

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FLAGS = {
    "llama": ["--prompt", "Tom had 2 red", "--temperature", "0.8", "--seed", "1"],
    "gpt2": ["--prompt", "Zoë had 37", "--last", "6", "--max-new-tokens", "4"],
}


@pytest.fixture(scope="module")
def browser():
    chromium = had(install_chromium(), "chromium is")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def axe():
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
@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 390)])
def test_the_page_is_drawn_without_a_request_or_a_message(page_of, browser, axe, name, scheme, width):
    file = page_of(name)
    requests, messages = [], []
    size = {"width": width, "height": 900}
    with browser.new_context(viewport=size, color_scheme=scheme, is_mobile=width < 600, offline=True) as context:
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(file.as_uri())
        assert requests == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        pixels = "one.getContext('2d').getImageData(0, 0, one.width, one.height).data.some(number => number)"
        assert page.evaluate(f"[...document.querySelectorAll('canvas')].every(one => {pixels})")
        shown = 7 if "--last" in FLAGS[name] else page.evaluate("ids.length")
        assert page.locator("#chips .chip").count() == shown
        assert messages == []
        page.evaluate(axe)
        violations = "axe.run().then(found => found.violations.map(one => one.id + ': ' + one.nodes[0].html))"
        assert page.evaluate(violations) == []


def test_the_slider_leads_from_the_prompt_to_the_end(page_of, browser):
    page = browser.new_page()
    page.goto(page_of("llama").as_uri())

    def press(key: str) -> str:
        page.press("#slider", key)
        return str(page.text_content("#where"))

    assert "Read up to token 1," in press("Home")
    assert "inside the prompt" in press("ArrowRight")
    assert "all" in page.text_content("#cache-text")  # the prompt is read at once
    assert ("the end token follows" in press("End")) == page.evaluate("data.text.ended")
    read = page.evaluate("ids.length - 1")
    assert f"keys and values of {read - 1} tokens come from the cache" in page.text_content("#cache-text")
    assert page.locator("#bars .value").count() == 10
    page.press("#weights", "ArrowUp")
    assert "%" in page.text_content("#weights-out")
    press("Home")  # the first token can read nothing but itself
    assert page.text_content("#reads").endswith("(itself)100 %")


def test_the_middle_of_a_deep_model_is_folded_and_each_head_has_a_picture(page_of, browser, tmp_path):
    content, file = page_of("llama").read_text(encoding="utf-8"), tmp_path / "deep.html"
    data = data_of(content)
    data["layers"]["at"] = [layer for layer in data["layers"]["at"] for _ in range(8)]
    deep = re.sub(r'(id="data">).*?(</script>)', lambda m: m[1] + json.dumps(data) + m[2], content, flags=re.DOTALL)
    file.write_text(deep, encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    rows = page.locator("#guesses tbody tr")
    folded = rows.count()
    assert page.locator("#guesses tr.first").count() == 1  # where the final answer first leads
    page.locator("#guesses button").first.click()
    assert folded < rows.count() == len(data["layers"]["at"])
    assert page.locator("#guesses button").count() == 0
    assert page.locator("#heads button").count() == data["model"]["heads"]
    page.locator("#heads button").nth(1).click()
    assert page.locator("#head").evaluate("choice => choice.selectedIndex") == 1
