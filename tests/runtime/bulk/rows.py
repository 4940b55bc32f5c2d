"""Rows for the tiny decoder, and a bundle of it that holds conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRAWN: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12}


def plain_rows(count: int) -> list[dict[str, Any]]:
    """Prompts of several lengths, some of which begin alike."""
    return [
        {
            "id": number,
            "prompt": "abc def " * (5 * (number % 3)) + "ghijklmnop"[: 1 + number % 9],
            "topic": f"t{number}",
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """JSON lines; a text is a line as it stands."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
