"""The table of execution providers, against what reads it and the pages that list it."""

from __future__ import annotations

import ast

import pytest

from pastkey.export.settings import ExportOptions
from pastkey.precisions import PRECISIONS
from pastkey.providers import PROVIDERS, TARGETS

from ..shared import ROOT


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_export_and_runtime_name_a_provider_in_no_branch():
    """Except commands, which name one in an advice; the CPU proves every bundle."""
    named = {*PROVIDERS, *TARGETS, *(row.name for row in PROVIDERS.values())} - {"cpu", PROVIDERS["cpu"].name}
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} has {node.value!r}"
        for folder in ("export", "runtime")
        for file in (ROOT / folder).rglob("*.py")
        if file.parent.name != "commands"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in named
    ]
    assert not found


@pytest.mark.parametrize("name", PROVIDERS)
def test_the_columns_of_a_row_agree(name):
    row = PROVIDERS[name]
    assert row.hardware
    assert row.source
    assert row.allocates or row.device != "cpu"
    assert all(values == row.manifest_options[option] for option, values in row.values.items())
    assert not row.npu or (row.target and not row.loop and set(row.graphs) <= {"static"})
    assert row.npu or (row.reads_tables and not row.static_int8)
    assert f"--target {name}" in row.remedy or not row.remedy


def test_every_row_is_on_the_pages():
    for name in PROVIDERS.keys() - {"cpu"}:
        assert any(f"`{name}`" in line for line in page("devices.md").splitlines() if line.startswith("| `")), name
    for name in TARGETS.keys() - {"cpu"}:
        assert f"`export --target {name}" in page("devices.md")
    *first, last = TARGETS
    assert f"`target` is `{'`, `'.join(first)}` or `{last}`" in page("bundle-format.md")
    assert f'''"{'", "'.join(first)}" or "{last}".''' in str(ExportOptions.__doc__)


# --- ---------------------------------------------------------------------------------------------------------------
def test_no_two_precisions_have_one_file_or_one_name_in_transformers_js():
    rows = [row for row in PRECISIONS.values() if row.name != "source"]  # to other programs it is as int8
    for column in ("graph", "transformers_js", "bits"):
        assert len({getattr(row, column) for row in rows}) == len(rows), column


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_quantized_precision_has_bounds_and_a_finer_one(name):
    row = PRECISIONS[name]
    assert row.name == name
    assert row.quantized == (row.max_kl > 0) == (row.decode_kl > 0)
    assert row.calibrated == (row.quantized and name != "source")
    assert not row.quantized or PRECISIONS[row.finer].bits > row.bits
