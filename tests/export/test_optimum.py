"""What the graft cannot take, through optimum's exporter into the same bundle. Needs optimum-onnx's environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed")

from pastkey.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export import Report, export
from pastkey.runtime import Session, load

from ..conftest import Run
from .families import CONTEXT, build

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # optimum's and transformers' own

PROMPT = [5, 17, 3, 60, 41]


class Made:
    """A model, the folder that transformers saved it to, and the fp32 bundle of that folder."""

    def __init__(self, family: str, parent: Path) -> None:
        self.model: Any = build(family)
        self.folder = parent / family
        self.model.save_pretrained(self.folder)
        self.stages: list[str] = []
        self.report: Report = export(
            self.folder, parent / "bundle", precision="fp32", context_length=CONTEXT, progress=self.stages.append
        )


@pytest.fixture(scope="module", params=["bloom", "mpt"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def test_the_bundle_is_verified_and_says_who_made_its_graph(made: Made) -> None:
    manifest = made.report.manifest
    assert manifest.graph == "standard"
    assert "optimum" in manifest.graph_reason
    assert any("computes attention by hand" in stage and "optimum" in stage for stage in made.stages)
    assert manifest.parity["fp32"]["ok"]
    assert manifest.parity["fp32"]["reference"] == "source"
    assert open_bundle(made.report.path, verify=True).manifest == manifest


def test_greedy_ids_are_those_of_transformers(made: Made) -> None:
    new = 24
    expected = made.model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    ends = made.report.manifest.eos_token_ids
    until = next((i for i, token in enumerate(expected) if token in ends), new)
    assert load(made.report.path).generate(PROMPT, max_new_tokens=new).ids == expected[:until]


def test_int8_is_still_the_same_model(made: Made, tmp_path: Path) -> None:
    report = export(made.folder, tmp_path / "int8", context_length=CONTEXT)
    assert report.manifest.parity["int8"]["ok"]
    assert report.manifest.quality["kl_divergence"] < 0.02
    assert report.weight_bytes < 0.5 * report.fp32_weight_bytes


def test_padding_is_computed_right_or_refused(made: Made) -> None:
    ids = np.array([PROMPT, [*PROMPT[:3], 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    session = Session(open_bundle(made.report.path), graph="common")
    padding = made.folder.name == "bloom"  # its ALiBi counts real tokens, mpt's counts columns
    assert made.report.manifest.padding is padding
    if not padding:
        with pytest.raises(InputError, match="this bundle takes no padding") as caught:
            session.forward(ids, mask)
        assert "\n" not in str(caught.value)
        return
    padded = session.forward(ids, mask)[1, 2]
    session.reset()
    np.testing.assert_allclose(padded, session.forward(ids[1:, :3])[0, 2], rtol=0, atol=1e-4)


def test_the_command_says_who_exported_and_prints_no_pages(made: Made, tmp_path: Path, pastkey_command: Run) -> None:
    choices = ("--precision", "fp32", "--context", CONTEXT, "--out", "bundle", "--json")
    done = pastkey_command("export", made.folder, *choices, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optimum" in json.loads(done.stdout)["graph_reason"]
    assert "ask optimum's exporter" in done.stderr
    for remark in ("TracerWarning", "tied weights", "deprecated"):
        assert remark not in done.stderr
