"""pastkey.Generator in Ray Data and in Hugging Face's datasets, each in a separate environment."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environments import ROOT, environment

from ..runtime.bulk.rows import plain_rows, read_rows, write_rows
from ..shared import ran
from ..tiny_bundles import letters_bundle
from .environments import RAY, RAY_OLDEST

pytestmark = pytest.mark.matrix

ENVIRONMENTS = {"newest": RAY, "oldest": RAY_OLDEST}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return letters_bundle(tmp_path_factory.mktemp("tiny") / "b", [(8, 8), (16, 16)]).path


@pytest.fixture
def rows(tmp_path):
    """Some of them cannot be answered."""
    made = [{**row, "temperature": 1.0, "prompt": row["prompt"] if row["id"] % 10 else ""} for row in plain_rows(64)]
    (tmp_path / "rows.json").write_text(json.dumps(made))
    return made


def run(which: str, program: str, bundle: Path, folder: Path) -> None:
    given = os.environ | {
        "PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    python = environment(*ENVIRONMENTS[which])
    ran(python, Path(__file__).parent / program, bundle, folder, cwd=folder, env=given, timeout=600)


def expected(bundle: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of this process, all rows at once."""
    from pastkey import Generator

    made = Generator(bundle, threads=1, max_new_tokens=6)({name: [row[name] for row in rows] for name in rows[0]})
    return [{name: column[place] for name, column in made.items()} for place in range(len(rows))]


@pytest.mark.parametrize("which", ENVIRONMENTS)
def test_ray_answers_each_row_once_by_actors_and_without(which, bundle, rows, tmp_path):
    run(which, "ray_rows.py", bundle, tmp_path)
    for name in ("actors", "functions"):
        made = json.loads((tmp_path / f"{name}.json").read_text())
        assert sorted(made, key=lambda row: row["id"]) == expected(bundle, rows)
    assert sum(row["error"] != "" for row in made) == 7


@pytest.mark.parametrize("which", ENVIRONMENTS)
def test_the_program_of_the_page_runs(which, bundle, rows, tmp_path):
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```py\n(import ray\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "page.py").write_text(program.replace("/models/bundle", str(bundle)), encoding="utf-8")
    write_rows(tmp_path / "rows.jsonl", rows)
    run(which, str(tmp_path / "page.py"), bundle, tmp_path)
    made = [row for part in (tmp_path / "answers").iterdir() for row in read_rows(part)]
    assert sorted(row["id"] for row in made) == [row["id"] for row in rows]


@pytest.mark.parametrize("which", ENVIRONMENTS)
def test_datasets_map_answers_in_one_process_and_in_two(which, bundle, rows, tmp_path):
    run(which, "datasets_rows.py", bundle, tmp_path)
    for processes in (1, 2):
        assert json.loads((tmp_path / f"{processes}.json").read_text()) == expected(bundle, rows)
