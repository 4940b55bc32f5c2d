"""The pictures of README and docs are those that their pages' tables give."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from benchmarks.__main__ import main
from benchmarks.measure import NOT_TOLD, ROOT
from benchmarks.pictures import bars, charts, scores, terminal
from benchmarks.pictures.render import of_readme
from pastkey.export.quantize.ranking.sensitivity import MatrixCost, Sensitivity
from pastkey.files.durable import write_json

DOCS = ROOT / "docs"
RESULTS = (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_of_the_readme_shows_the_figures_of_the_results():
    assert (DOCS / "speed-and-error.svg").read_text(encoding="utf-8") == bars.draw(of_readme())


def test_a_bar_is_as_long_as_its_figure_says():
    head = ["engine", *bars.PANELS]
    figures = [
        ["pastkey int8", "200.0", "0.002", "100"],
        ["other & more", "50.0", "0.004", "400"],
        ["quiet", "25.0", NOT_TOLD, "400"],
    ]
    drawn = bars.draw([dict(zip(head, row, strict=True)) for row in figures])
    rectangles = ElementTree.fromstring(drawn).iter(f"{SVG}rect")
    lengths = [float(one.get("width", "")) for one in rectangles if one.get("height") == "18"]
    assert [length / bars.BAR for length in lengths] == [1, 0.25, 0.125, 0.5, 1, 1 / bars.BAR, 0.25, 1, 1]


def test_the_picture_of_the_time_axis_is_the_one_that_is_drawn():
    assert (DOCS / "time-axis.svg").read_text(encoding="utf-8") == scores.draw()
    cells = ElementTree.fromstring(scores.draw()).iter(f"{SVG}text")
    computed = [cell.text for cell in cells if cell.get("fill") == "#ffffff"]
    assert computed == ["k₄", "v₄", "q₄", "y₄", *(f"q₄·k{i}" for i in "₀₁₂₃₄")]


def test_the_terminal_of_the_readme_has_its_commands():
    texts = [one.text for one in ElementTree.parse(DOCS / "terminal.svg").iter(f"{SVG}text")]
    typed = " ".join(str(text).strip(" $\\") for text in texts if str(text).startswith(("$", "    --")))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert typed == " ".join(re.findall(r"^    (pastkey (?:export examples/|run ).*)$", page, re.MULTILINE))
    assert [str(texts[-1]), "Traceback" in "".join(map(str, texts))] == ["the owl does", False]
    drawn = list(ElementTree.fromstring(terminal.draw(["$ a \\", "b", "x" * 200, "<&>"])).iter(f"{SVG}text"))
    assert [one.get("fill") == terminal.TYPED for one in drawn] == [True, True, False, False]
    assert [len(str(drawn[2].text)), drawn[3].text] == [terminal.COLUMNS, "<&>"]


@pytest.mark.parametrize("layers", [0, 30])
def test_the_costs_of_an_export_are_drawn(layers, tmp_path):
    costs = {f"model.layers.{layer}.mlp.weight": 2.0**-layer for layer in range(layers)}
    rows = [MatrixCost(name, (8, 8), cost, 0.9, 0.01, matmul=True) for name, cost in costs.items()]
    rows.append(MatrixCost("model.embed_tokens.weight", (61, 8), 0.0, 1.0, 0.1, matmul=False))
    table = Sensitivity(0.01, tuple(sorted(rows, key=lambda row: -row.kl_divergence)))
    write_json(tmp_path / "table.json", table.to_json())
    assert main(["sensitivity-chart", str(tmp_path / "table.json"), str(tmp_path / "chart.png")]) == 0
    image = imread(tmp_path / "chart.png")
    assert min(image.shape[:2]) > 400
    assert image.std() > 0.01
    assert main(["pictures", "--charts", str(tmp_path)]) == 0
    assert charts.spread_of("1.76 (1.11 to 2.45)") == (1.76, 1.11, 2.45)
