"""Puts the panels' numbers into one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

_PAGE = Path(__file__).parent / "page"
_PANELS = ("tokens", "embedding", "attention", "layers", "next", "sampler", "cache", "reference")
_SCRIPTS = ("data", "matrix", "bars", *_PANELS, "position")  # each uses names of those before it


def page(panels: dict[str, Any], title: str | None = None) -> str:
    """Returns the page, with this title or the model's name.

    Its policy lets the browser load nothing, and run only the script in it.
    """
    style, template = _read("page.css"), _read("page.html")
    script = "".join(_read(f"{name}.js") for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    attention = panels["attention"]
    packed = panels | {"attention": attention | {"weights": _triangles(attention["weights"])}}
    data = json.dumps(packed, default=_packed, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    filled = {
        "policy": policy,
        "title": html.escape(title or f"Inside {panels['model']['source']}"),
        "style": style,
        "script": script,
        "data": data.replace("<", "\\u003c"),
    }
    return re.sub(r"{{(\w+)}}", lambda found: filled[found[1]], template)


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _packed(array: Any) -> dict[str, Any]:
    """An array as JSON: its shape, and its little-endian numbers in base64."""
    assert isinstance(array, np.ndarray)
    kind = {"f": "<f4", "i": "<i4", "u": "u1"}[array.dtype.kind]
    content = np.ascontiguousarray(array, kind).tobytes()
    return {"shape": list(array.shape), "type": kind[-2:], "data": base64.b64encode(content).decode()}


def _triangles(weights: np.ndarray) -> dict[str, Any]:
    """Weights (calls, H, W, C) without the zeros above the diagonal: bytes, their square roots from `low` to `high`.

    A token among hundreds has a weight below 1 %, which is less than a step of plain bytes.
    """
    weights = np.sign(weights) * np.sqrt(np.abs(weights))
    low, high = min(0.0, float(weights.min())), max(1.0, float(weights.max()))
    rows, columns = weights.shape[2:]
    seen = np.tri(rows, columns, columns - rows, dtype=bool)
    codes = np.rint((weights[:, :, seen] - low) / (high - low) * 255).astype(np.uint8)
    return {"low": low, "high": high, "columns": columns, "codes": codes}
