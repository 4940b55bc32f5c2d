"""A model that the graft cannot take, where optimum's exporter is not installed: refused, with what to type."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ..conftest import Run

pytest.importorskip("transformers", reason="transformers is not installed")

from .families import build

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="optimum is installed")
def test_a_folder_that_cannot_be_grafted_is_refused_with_what_to_type(tmp_path: Path, pastkey_command: Run) -> None:
    build("bloom").save_pretrained(tmp_path / "bloom")
    done = pastkey_command("export", "bloom", "--out", "made/bundle", "--context", "96", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    *stages, sentence = done.stderr.splitlines()
    assert sentence.startswith("pastkey export: ")
    assert "self_attention of BloomForCausalLM" in sentence
    assert "computes attention by hand" in sentence
    assert "pip install 'pastkey[cpu,export,optimum]'" in sentence
    assert all(line.startswith("  ") for line in stages), done.stderr  # and no remarks of transformers
    assert [path.name for path in tmp_path.iterdir()] == ["bloom"]
