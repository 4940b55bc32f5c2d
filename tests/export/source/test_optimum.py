"""The last resort, optimum's exporter, into the same bundle. Needs optimum-onnx's environment.

No family is known that it takes right and that no cache can be given to: bloom and mpt are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed")

from pastkey.bundle import open_bundle
from pastkey.errors import ContractError, InputError
from pastkey.export import Report, export, pipeline
from pastkey.export.source.optimum import take_over
from pastkey.runtime import Engine, load

from ...conftest import Run
from ..families import CONTEXT, build

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # optimum's and transformers' own

PROMPT = [5, 17, 3, 60, 41]


class Made:
    """A model, the folder that transformers saved it to, and the fp32 bundle of that folder."""

    def __init__(self, family: str, parent: Path) -> None:
        self.model: Any = build(family)
        self.folder = parent / family
        self.model.save_pretrained(self.folder)
        self.report: Report = export(self.folder, parent / "bundle", precision="fp32", context_length=CONTEXT)


def refuse(*_: object) -> None:
    raise ContractError("it cannot be given a cache")


@pytest.fixture(scope="module", params=["bloom", "mpt"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "in_contract", refuse)
        yield Made(request.param, tmp_path_factory.mktemp(request.param))


def test_the_bundle_is_verified_and_says_who_made_its_graph(made: Made) -> None:
    manifest = made.report.manifest
    assert manifest.graph == "standard"
    assert "optimum" in manifest.graph_reason
    warning = "the graft cannot take it (it cannot be given a cache), so that optimum's exporter makes the graph"
    assert warning in made.report.warnings
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


def test_padding_is_refused_since_its_positions_may_count_it(made: Made) -> None:
    ids, mask = np.array([PROMPT, [*PROMPT[:3], 0, 0]]), np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with pytest.raises(InputError, match="this bundle takes no padding"):
        Engine(open_bundle(made.report.path), graph="all_logits").forward(ids, mask)


def test_it_is_verified_against_what_it_was_exported_from(made: Made, pastkey_command: Run) -> None:
    done = pastkey_command("verify", made.report.path, made.folder)
    assert done.returncode == 0, done.stderr


def test_optimum_is_not_asked_about_a_module_that_is_none_of_transformers() -> None:
    refused = ContractError("it cannot be given a cache")
    with pytest.raises(ContractError) as caught:
        take_over(nn.Linear(2, 2), refused, print)
    assert caught.value is refused
