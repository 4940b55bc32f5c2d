"""The table of transformers' causal language models has no empty row, and docs/export.md has it."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tools import families

from .families import FAMILIES, REFUSED

RESULTS = {families.VERIFIED, families.REFUSED, families.NO_DECODER}
pytestmark = pytest.mark.skipif(
    transformers.__version__ not in {row["transformers"] for row in families.rows().values()},
    reason="the table is of another release of transformers",
)


def test_each_type_has_a_result_and_its_cause():
    table = families.table()
    assert [row["type"] for row in table] == sorted(families.types())
    assert [row["type"] for row in table if row["result"] not in RESULTS or not row["detail"]] == []


def test_the_tests_run_what_the_table_says():
    results = {row["type"]: row["result"] for row in families.table()}
    assert {results[family.partition("+")[0]] for family in FAMILIES} == {families.VERIFIED}
    assert {results[family] for family in REFUSED} == {families.REFUSED}


def test_the_page_has_the_table():
    assert families.section() in families.DOCS.read_text(encoding="utf-8")
