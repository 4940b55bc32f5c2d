"""The picture of docs/time-axis.md is the one that benchmarks/scores_picture.py draws."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks import scores_picture as picture


def test_the_picture_is_the_one_that_is_drawn() -> None:
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw()


def test_the_row_of_the_new_token_meets_the_keys_of_all() -> None:
    cells = ElementTree.fromstring(picture.draw()).iter("{http://www.w3.org/2000/svg}text")
    computed = [cell.text for cell in cells if cell.get("fill") == "#ffffff"]
    assert computed == ["k₄", "v₄", "q₄", "y₄", *(f"q₄·k{i}" for i in "₀₁₂₃₄")]
