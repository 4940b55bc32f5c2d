"""The README's picture, drawn from the table of benchmarks/results.md: speed, error and size side by side.

SVG without a library: bars and words are few elements, and stay sharp at every size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from benchmarks.measure import NOT_TOLD

# Column of the table -> heading of its bars, and which way is better.
PANELS = {
    "decode 512 (tok/s)": ("decode, tokens per second", "longer is better"),
    "KL divergence (nats)": ("error: KL divergence, nats", "shorter is better"),
    "MB": ("all files, MB", "shorter is better"),
}
NAMES = 262  # width of the column of names, in pixels, as all that follows
PANEL, BAR, ROW, TOP = 200, 132, 30, 62
MEASURED = (  # under the bars
    "SmolLM2-135M-Instruct, two threads of an EPYC with AVX512-VNNI, greedy decoding after 512 tokens; "
    "pastkey int8 on its native kernels"
)
OURS, OTHERS = "#3f51b5", "#9e9e9e"


def draw(rows: Sequence[Mapping[str, str]]) -> str:
    """The SVG: a line for each row, a panel of bars for each of PANELS."""
    width, height = NAMES + PANEL * len(PANELS), TOP + ROW * len(rows) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    for number, row in enumerate(rows):
        weight = ' font-weight="bold"' if number == 0 else ""
        parts.append(f'<text x="14" y="{middle(number)}" fill="#212121"{weight}>{escape(row["engine"])}</text>')
    for panel, (column, (title, better)) in enumerate(PANELS.items()):
        figures = [0.0 if row[column] == NOT_TOLD else float(row[column]) for row in rows]
        x, largest = NAMES + PANEL * panel, max(figures)
        parts.append(f'<text x="{x}" y="24" fill="#212121" font-size="12" font-weight="bold">{escape(title)}</text>')
        parts.append(f'<text x="{x}" y="42" fill="#757575" font-size="11">{better}</text>')
        for number, row in enumerate(rows):
            length = BAR * figures[number] / largest
            color = OURS if row["engine"].startswith("pastkey") else OTHERS
            y = middle(number)
            parts.append(f'<rect x="{x}" y="{y - 13}" width="{max(length, 1):.1f}" height="18" fill="{color}"/>')
            parts.append(f'<text x="{x + length + 6:.1f}" y="{y}" fill="#212121">{row[column]}</text>')
    parts.append(f'<text x="14" y="{height - 10}" fill="#757575" font-size="11">{escape(MEASURED)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def middle(number: int) -> int:
    """The base line of a row's words."""
    return TOP + ROW * number + 14
