"""All pictures of the repository that show what a page's tables say, drawn anew from these pages."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import ROOT, Answer, rows_of

from . import bars, scores
from .charts import draw_results, draw_streams, draw_training

PAGES = ROOT / "benchmarks"
RESULTS = PAGES / "results.md"
IN_README = PAGES / "results-epyc.md"


def of_readme() -> list[dict[str, str]]:
    """The rows of README's chart: the engines in int8 and float32 on the quiet machine whose ratios README has."""
    rows = rows_of(IN_README.read_text(encoding="utf-8"), "engine")
    return [row for row in rows if not any(bits in row["engine"] for bits in ("int4", "Q4"))]


def pictures(*, charts: Path | None = None) -> Answer:
    """Into their places, or all into the folder of --charts."""
    results, vnni = RESULTS.read_text(encoding="utf-8"), (PAGES / "results-without-vnni.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")

    def place(folder: str, name: str) -> Path:
        return (ROOT / folder if charts is None else charts) / name

    draw_results(results, place("benchmarks", "results.png"))
    draw_results(vnni, place("benchmarks", "results-without-vnni.png"))
    draw_streams(page, place("docs", "performance-streams.png"))
    draw_training((ROOT / "docs" / "dev" / "training.md").read_text(encoding="utf-8"), place("docs", "training.png"))
    place("docs", "speed-and-error.svg").write_text(bars.draw(of_readme()), encoding="utf-8")
    place("docs", "time-axis.svg").write_text(scores.draw(), encoding="utf-8")
    png = "results.png, results-without-vnni.png, performance-streams.png, training.png"
    yield f"Drawn: {png}, speed-and-error.svg, time-axis.svg."
