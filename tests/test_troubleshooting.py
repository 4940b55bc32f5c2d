"""docs/troubleshooting.md has the sentence of every refusal, and none that no code writes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pastkey.errors

ROOT = Path(__file__).parent.parent
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


def refusals() -> Iterator[tuple[str, str]]:
    """Where an error of pastkey.errors, or a cause of one, is made, and its sentence."""
    places = {name: 0 for name, kind in vars(pastkey.errors).items() if isinstance(kind, type)}
    places |= {"Refused": 1, "Unknown": 1, "Cause": 1}  # what stands in the way of a cache
    for file, tree in trees():
        for node in ast.walk(tree):
            place = places.get(ast.unparse(node.func)) if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and place is not None and len(node.args) > place:
                sentence = flat(literal(node.args[place]) or "")
                if re.search(r"\w", sentence):
                    yield f"{file}:{node.lineno}", sentence


def messages() -> list[re.Pattern[str]]:
    """Those of the first column of each table, as patterns."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = page[: page.index("## It works, but")]
    cells = re.findall(r"^\| (`.*?`) \| ", tables, re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`(.+?)`(?:<br>|$)", cell)]
    assert len(quoted) > 100
    return [re.compile(".*".join(map(re.escape, message.split(HOLE)))) for message in quoted]


def test_every_message_of_the_page_is_in_the_code() -> None:
    written = [flat(text) for _, tree in trees() for node in ast.walk(tree) if (text := literal(node))]
    unknown = [message.pattern for message in messages() if not any(map(message.search, written))]
    assert not unknown, "\n".join(unknown)


def test_every_refusal_is_on_the_page() -> None:
    known = messages()
    found = list(refusals())
    assert len(found) > 150
    missing = [f"{where}: {sentence}" for where, sentence in found if not any(m.search(sentence) for m in known)]
    assert not missing, "\n".join(missing)
