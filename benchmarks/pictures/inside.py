"""The pictures of docs/decoder-only.md: panels of its page, as Chromium shows them.

pastkey see classic-bundle --prompt "what is statquest" --out page.html
python -m benchmarks decoder-pictures page.html docs
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.image import imread, imsave

from benchmarks.measure import Answer, TextFile
from pastkey.errors import InputError

PANELS = {"embedding": 3, "attention": 3, "layers": 3, "next": 1}  # the place of the token that is looked at
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1.25")
_WINDOW = "680,1600"  # pixels; what a panel leaves is cut off
_BORDER = 12  # pixels


def decoder_pictures(html: TextFile, folder: Path) -> Answer:
    """HTML is the page that `pastkey see` writes, and the folder gets decoder-PANEL.png."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise InputError("there is no Chromium on PATH, which draws the pictures: install the package chromium")
    content = html.read_text(encoding="utf-8")
    for panel, at in PANELS.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
            shown, drawn = Path(made) / "page.html", Path(made) / "drawn.png"
            shown.write_text(_alone(content, panel, at), encoding="utf-8")
            flags = (*_FLAGS, f"--user-data-dir={made}/profile", f"--window-size={_WINDOW}", f"--screenshot={drawn}")
            subprocess.run([chromium, *flags, shown.as_uri()], check=True, capture_output=True, timeout=120)
            imsave(folder / f"decoder-{panel}.png", _cut(imread(drawn)))
    yield f"Drawn: {', '.join(f'decoder-{panel}.png' for panel in PANELS)}."


def _alone(page: str, panel: str, at: int) -> str:
    """The page with one panel, at one position. Its policy is removed, since it allows only the page's own script."""
    _, policy, rest = page.partition('<meta http-equiv="Content-Security-Policy"')
    style = f"header, nav, main > :not(#{panel}) {{ display: none !important }}"
    return (
        page.replace(policy + rest.partition("/>")[0] + "/>", f"<style>{style}</style>") + f"<script>go({at})</script>"
    )


def _cut(pixels: np.ndarray) -> np.ndarray:
    """The part of an image (H, W, 4) that is not its background, and a border."""
    rows, columns = (np.flatnonzero((pixels != pixels[0, 0]).any(axis)) for axis in ((1, 2), (0, 2)))
    return pixels[
        max(0, rows[0] - _BORDER) : rows[-1] + _BORDER, max(0, columns[0] - _BORDER) : columns[-1] + _BORDER
    ].copy()
