"""Rows for the tiny decoder."""

import json
from pathlib import Path
from typing import Any

DRAWN = {"temperature": 1.0, "max_new_tokens": 12}
HI = [{"role": "user", "content": "hi"}]


def plain_rows(count: int) -> list[Any]:
    """Prompts of several lengths, some of which begin alike."""
    prompts = ["abc def " * (5 * (number % 3)) + "ghijklmnop"[: 1 + number % 9] for number in range(count)]
    return [{"id": number, "prompt": prompt, "topic": f"t{number}"} for number, prompt in enumerate(prompts)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a text is a line, unchanged."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
