"""The picture of docs/how-it-works.md: the scores of a text of five tokens, and the part that a step computes."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

TOKENS, PAST = 5, 4  # of the text, and those of them that came in earlier steps
CELL, TOP = 54, 112  # pixels, as all that follows
QUERIES, SCORES, VALUES, SUMS = 98, 172, 530, 630  # where the columns of cells begin
WIDTH, HEIGHT = 720, 474
NEW, CACHED, MASKED, OLD = "#3f51b5", "#c5cae9", "#eeeeee", "#ffffff"
INK, GREY = "#212121", "#757575"


def draw() -> str:
    """The SVG: a row of cells for each query, a column for each key, values and sums at the right, and a legend."""
    middle = TOP + CELL * TOKENS / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>',
        _text(14, 26, "A text of five tokens: four came in earlier steps, one is new", INK, bold=True, size=15),
        *(
            _text(x + CELL / 2, TOP - 10, words, anchor="middle")
            for x, words in ((QUERIES, "q"), (VALUES, "v"), (SUMS, "y"))
        ),
        _text(SCORES - 10, TOP - 28, "k", anchor="end"),
        _text((SCORES + CELL * TOKENS + VALUES) / 2, middle - 4, "softmax", INK, anchor="middle"),
        _text((SCORES + CELL * TOKENS + VALUES) / 2, middle + 14, "times", INK, anchor="middle"),
        _text((VALUES + CELL + SUMS) / 2, middle + 6, "=", INK, size=18, anchor="middle"),
        *_keys(),
        *_rows(),
        *_legend(),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _keys() -> Iterator[str]:
    """k as a line of cells over the scores, v as a column of cells next to them."""
    for token in range(TOKENS):
        fill, ink = (NEW, "#ffffff") if token >= PAST else (CACHED, INK)
        yield _cell(SCORES + CELL * token, TOP - 48, f"k{_small(token)}", fill, ink, height=32)
        yield _cell(VALUES, TOP + CELL * token, f"v{_small(token)}", fill, ink)


def _rows() -> Iterator[str]:
    """q, scores and y of each token."""
    for row in range(TOKENS):
        y, new = TOP + CELL * row, row >= PAST
        fill, ink = (NEW, "#ffffff") if new else (OLD, GREY)
        yield _cell(QUERIES, y, f"q{_small(row)}", fill, ink)
        yield _cell(SUMS, y, f"y{_small(row)}", fill, ink)
        for column in range(TOKENS):
            if column <= row:
                yield _cell(SCORES + CELL * column, y, f"q{_small(row)}·k{_small(column)}", fill, ink)
            else:
                yield _cell(SCORES + CELL * column, y, "-∞", MASKED, GREY)
    for place, words, bold in (
        (PAST / 2, ("rows of", "earlier", "tokens"), False),
        (PAST + 0.5, ("the new", "row"), True),
    ):
        for line, word in enumerate(words):
            height = TOP + CELL * place + 5 + 18 * (line - (len(words) - 1) / 2)
            yield _text(14, height, word, INK if bold else GREY, bold=bold)


def _legend() -> Iterator[str]:
    entries = [
        (NEW, "computed in this step"),
        (CACHED, "from the cache: computed when these tokens were new"),
        (OLD, "computed in earlier steps, needed no more"),
        (MASKED, "hidden by the mask"),
    ]
    for number, (fill, words) in enumerate(entries):
        x, y = 14 + 330 * (number % 2), TOP + CELL * TOKENS + 40 + 30 * (number // 2)
        yield _box(x, y - 13, 18, 18, fill)
        yield _text(x + 26, y + 1, words, INK, size=12)


def _cell(x: float, y: float, words: str, fill: str, ink: str, *, height: int = CELL) -> str:
    box = _box(x + 1, y + 1, CELL - 2, height - 2, fill)
    return box + _text(x + CELL / 2, y + height / 2 + 4, words, ink, size=12, anchor="middle")


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    line = ' stroke="#9e9e9e" stroke-dasharray="3 3"' if fill == OLD else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"{line}/>'


def _text(
    x: float, y: float, words: str, ink: str = GREY, *, bold: bool = False, size: int = 13, anchor: str = "start"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{ink}" font-size="{size}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def _small(token: int) -> str:
    """A number as an index below the line."""
    return "₀₁₂₃₄₅₆₇₈₉"[token]
