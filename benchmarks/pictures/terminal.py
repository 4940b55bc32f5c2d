"""The picture of a terminal in README: its commands for your own decoder, run here, and their output."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.measure import ROOT, Answer

COLUMNS, CHARACTER, LINE = 104, 7.23, 17  # pixels of a character and a line at 12 pixels
LEFT, TOP = 16, 46
GROUND, INK, TYPED, DIM = "#1e1e2e", "#cdd6f4", "#a6e3a1", "#9399b2"


def terminal_picture(picture: Path) -> Answer:
    """Runs the commands and writes the SVG."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (pastkey (?:export examples/|run ).*)$", page, re.MULTILINE)
    with tempfile.TemporaryDirectory() as place:
        lines = [line for command in commands for line in _run(command, place)]
    picture.write_text(draw(lines), encoding="utf-8")
    yield f"Drawn: {picture}, of {len(commands)} commands."


def _run(command: str, place: str) -> Iterator[str]:
    """Yields the command as it is typed, and the lines that it prints in the folder `place`."""
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in shlex.split(command)[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "pastkey", *words], cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    yield from " \\\n".join(textwrap.wrap(f"$ {command}", COLUMNS - 2, subsequent_indent="    ")).splitlines()
    yield from done.stdout.replace(f"{ROOT}/", "").splitlines()


def draw(lines: Sequence[str]) -> str:
    """The SVG of a terminal with these lines; longer ones end in an ellipsis, those from $ on are typed."""
    width, height = round(2 * LEFT + COLUMNS * CHARACTER), TOP + LINE * len(lines) + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="12">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{GROUND}"/>',
        *(f'<circle cx="{20 + 18 * i}" cy="18" r="5" fill="{DIM}"/>' for i in range(3)),
    ]
    typed = False
    for number, line in enumerate(lines):
        typed = line.startswith("$ ") or (typed and lines[number - 1].endswith("\\"))
        ink = TYPED if typed else DIM if line.startswith("  ") else INK
        shown = escape(line if len(line) <= COLUMNS else f"{line[: COLUMNS - 1]}…")
        y = TOP + LINE * number
        parts.append(f'<text x="{LEFT}" y="{y}" fill="{ink}" xml:space="preserve">{shown}</text>')
    return "\n".join([*parts, "</svg>", ""])
