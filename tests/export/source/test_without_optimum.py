"""A model that the graft cannot take, where optimum's exporter is not installed: refused, with what to type."""

from __future__ import annotations

import importlib.util
import shlex
import tomllib
from pathlib import Path

import pytest

from ...conftest import Run
from ...shared import ROOT

pytest.importorskip("transformers", reason="transformers is not installed")

from ..families import build

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="optimum is installed")
def test_a_folder_that_cannot_be_grafted_is_refused_with_what_to_type(tmp_path: Path, pastkey_command: Run) -> None:
    build("doge").save_pretrained(tmp_path / "doge")
    done = pastkey_command("export", "doge", "--out", "made/bundle", "--context", "96", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    *stages, sentence = done.stderr.splitlines()
    assert sentence.startswith("pastkey export: ")
    assert "DogeForCausalLM cannot be given a cache" in sentence
    install = sentence.split("type pip install ")[1].split(" and then this command again")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert shlex.split(install) == extras["optimum"]
    assert all(line.startswith("  ") for line in stages), done.stderr  # and no remarks of transformers
    assert [path.name for path in tmp_path.iterdir()] == ["doge"]
