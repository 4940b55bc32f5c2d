"""Hugging Face decoders, family by family: what the graft gives equals transformers' own uncached eager run.

`verify` compares prefill, decode token by token, chunks, a batch of rows of different lengths and a greedy
continuation; windows are smaller than the prompt. The figures are listed at the end of the test run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.errors import ContractError
from pastkey.export import export
from pastkey.export.verify import MAX_RELATIVE_DIFFERENCE

from .families import CONTEXT, FAMILIES, FROM_TRANSFORMERS_5, REFUSED, WINDOW, build

QUICK = ("gpt2", "llama", "gemma2", "gpt_oss")  # one of each kind: absolute positions, rotary, windows, experts
REFUSED_WHILE_TRACING = ("deepseek_v2",)  # the others in a second, at the first look

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


def skip_unless_known(family: str) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if family in FROM_TRANSFORMERS_5 and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"transformers {transformers.__version__}: {FROM_TRANSFORMERS_5[family]}")


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_family_computes_what_transformers_computes(
    family: str, tmp_path: Path, record_family: Callable[[str, float], None]
) -> None:
    skip_unless_known(family)
    report = export(build(family), tmp_path / "bundle", precision="fp32", context_length=CONTEXT)
    parity = report.manifest.parity["fp32"]
    assert parity["ok"]
    assert parity["reference"] == "source"
    assert parity["tokens"] == CONTEXT > 2 * WINDOW
    figures = [c["value"] for c in parity["checks"].values() if c["measure"] == "max_relative_difference"]
    assert len(figures) == 5
    assert max(figures) <= MAX_RELATIVE_DIFFERENCE
    assert parity["checks"]["greedy"]["value"] is None
    record_family(family, max(figures))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3_moe", "phi3"])
def test_the_standard_graph_takes_windows_softcap_sinks_and_experts_too(family: str, tmp_path: Path) -> None:
    report = export(build(family), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, graph="standard")
    assert report.manifest.graph == "standard"
    assert report.manifest.parity["fp32"]["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mixtral"])
def test_a_family_in_int8_is_still_the_same_model(family: str, tmp_path: Path) -> None:
    report = export(build(family), tmp_path / "bundle", context_length=CONTEXT)
    assert report.manifest.parity["int8"]["ok"]
    assert report.manifest.quality["kl_divergence"] < 0.02


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in REFUSED_WHILE_TRACING else f for f in REFUSED]
)
def test_what_cannot_be_grafted_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    skip_unless_known(family)
    with pytest.raises(ContractError) as caught:
        export(build(family), tmp_path / "bundle", precision="fp32", context_length=CONTEXT)
    assert REFUSED[family][1] in str(caught.value)
    assert list(tmp_path.iterdir()) == []
