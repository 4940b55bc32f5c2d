"""The README's picture is the one that benchmarks/picture.py draws from benchmarks/results.md."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from benchmarks import picture


def test_the_picture_shows_the_figures_of_the_results() -> None:
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw(
        picture.table(picture.RESULTS.read_text(encoding="utf-8"))
    )


def test_a_bar_is_as_long_as_its_figure_says(tmp_path: Path) -> None:
    head = ["engine", *picture.PANELS]
    rows = [["pastkey int8", "200.0", "0.002", "100"], ["other & more", "50.0", "0.004", "400"]]
    results, drawn = tmp_path / "results.md", tmp_path / "picture.svg"
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * 4, *rows)]
    results.write_text("# Results\n\n" + "\n".join(lines) + "\n\nMB: all files.\n", encoding="utf-8")
    assert picture.main([str(results), str(drawn)]) == 0

    bars = [
        float(element.get("width", ""))
        for element in ElementTree.parse(drawn).iter("{http://www.w3.org/2000/svg}rect")
        if element.get("height") == "18"
    ]
    assert bars == [picture.BAR, picture.BAR / 4, picture.BAR / 2, picture.BAR, picture.BAR / 4, picture.BAR]
