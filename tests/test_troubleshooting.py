"""docs/troubleshooting.md has the messages that people meet most, and none that no code writes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from .shared import ROOT

STAGES = ("pastkey", "runtime", "train", "export")
HOLE = "…"  # what a sentence fills in


def literal(node: ast.AST) -> str | None:
    """The text of a string or f-string, with holes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{literal(node.left) or HOLE}{literal(node.right) or HOLE}"
    return None


def trees() -> Iterator[tuple[str, ast.Module]]:
    for stage in STAGES:
        for file in (ROOT / stage).rglob("*.py"):
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def flat(text: str) -> str:
    return " ".join(text.split())


def messages() -> list[re.Pattern[str]]:
    """Those of the first column of each table, as patterns."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = page[: page.index("## It works, but")]
    cells = re.findall(r"^\| (`.*?`) \| ", tables, re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`(.+?)`(?:<br>|$)", cell)]
    assert 30 <= len(quoted) <= 50
    return [re.compile(".*".join(map(re.escape, message.split(HOLE)))) for message in quoted]


def test_every_message_of_the_page_is_in_the_code():
    written = [flat(text) for _, tree in trees() for node in ast.walk(tree) if (text := literal(node))]
    unknown = [message.pattern for message in messages() if not any(map(message.search, written))]
    assert not unknown, "\n".join(unknown)
