"""One file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import numpy as np

from pastkey.see.inline import page


def example(word: str = "a") -> dict[str, Any]:
    weights = np.tril(np.random.default_rng(0).random((2, 3, 4, 4), np.float32))
    return {"model": {"source": f"<{word}>"}, "attention": {"weights": weights}, "vocabulary": [word]}


def data_of(content: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    return json.loads(found)


def test_the_policy_allows_its_own_script_and_style_alone():
    content = page(example())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', content)
    (style,) = re.findall(r"<style>(.*?)</style>", content, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert policy.split("; ")[:3] == [
        "default-src 'none'", f"style-src 'sha256-{hashes[0]}'", f"script-src 'sha256-{hashes[1]}'"
    ]  # fmt: skip
    assert not re.findall(r"""(?:src|href)=["'](?!#)|\bon\w+=|style=["']|@import|url\(""", content)


def test_no_token_ends_the_data_or_stands_for_a_part_of_the_page():
    word = "</script><script>alert(1)</script>{{script}}{{data}}<!--"
    content = page(example(word))
    assert data_of(content)["vocabulary"] == [word]
    assert content.count("<script>") == 1
    assert "<h1>Inside &lt;&lt;/script" in content


def test_weights_are_bytes_without_what_is_masked():
    panels = example()
    packed = data_of(page(panels))["attention"]["weights"]
    assert (packed["low"], packed["high"], packed["columns"]) == (0, 1, 4)
    assert packed["codes"]["shape"] == [2, 3, 10]
    codes = np.frombuffer(base64.b64decode(packed["codes"]["data"]), np.uint8).reshape(2, 3, 10)
    expected = np.sqrt(panels["attention"]["weights"][:, :, *np.tril_indices(4)])
    assert np.abs(codes / 255 - expected).max() <= 0.5 / 255 + 1e-6


def test_weights_below_zero_keep_their_sign():
    panels = example()
    panels["attention"]["weights"][0, 0, 3, 0] = -0.25
    packed = data_of(page(panels))["attention"]["weights"]
    assert packed["low"] == -0.5
    codes = np.frombuffer(base64.b64decode(packed["codes"]["data"]), np.uint8).reshape(2, 3, 10)
    assert codes[0, 0, 6] == 0
