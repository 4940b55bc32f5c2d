"""examples/generate, of which tests/programs runs what it can: what each names is what the graphs have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pastkey.contract import names

from .shared import ROOT

EXAMPLES = ROOT / "examples"
SOURCES = sorted(file.name for file in (EXAMPLES / "generate").iterdir() if file.suffix != ".json")
INPUTS = {names.INPUT_IDS, *names.GENERATE_INTEGERS, *names.GENERATE_NUMBERS}
STATE = {names.HELD_CACHE, names.HELD_IDS, names.NEW_CACHE, names.NEW_IDS}


def source(name: str) -> str:
    return (EXAMPLES / "generate" / name).read_text(encoding="utf-8")


def code(name: str) -> str:
    """Without comments."""
    return re.sub(r"^\s*//[^\n]*|/\*.*?\*/", "", source(name), flags=re.DOTALL | re.MULTILINE)


def test_there_is_one_in_each_language():
    assert {Path(name).suffix for name in SOURCES} == {".c", ".cs", ".java", ".kt", ".mjs", ".swift"}


@pytest.mark.parametrize("name", SOURCES)
def test_it_feeds_what_the_graph_has(name):
    given = r"^    (\w+):" if name.endswith(".mjs") else r'"(\w*_\w+|temperature|seed)"'
    fed = set(re.findall(given, code(name), re.MULTILINE))
    assert fed == INPUTS
    assert re.search(rf'"{names.GENERATED_IDS}"|{{ {names.GENERATED_IDS}\b', code(name))
    if name == "generate.mjs":  # which streams, too
        assert all(re.search(rf"\b{state}\b", code(name)) for state in STATE)
