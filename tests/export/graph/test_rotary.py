"""Rotary positions whose frequencies are scaled: fixed ones go along, moving ones as far as they stand still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.errors import InputError
from pastkey.export import export

from ...shared import divided

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

HALF = 8  # pairs of a head
ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 48},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "longrope": {
        "short_factor": [1.1] * HALF,
        "long_factor": [2.0] * HALF,
        "original_max_position_embeddings": 48,
    },
}


def llama(kind: str) -> nn.Module:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the configuration is written as transformers 5 has it")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2 * HALF,
        max_position_embeddings=96,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0} | ROTARY[kind],
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("kind", divided(ROTARY, quick=["longrope"], ci=ROTARY))
def test_scaled_frequencies_are_transformers_own(kind: str, tmp_path: Path) -> None:
    context = 48 if kind == "longrope" else 96
    report = export(llama(kind), tmp_path / "bundle", precision="fp32", context_length=context)
    assert report.manifest.parity["fp32"]["ok"]
    assert report.manifest.parity["fp32"]["tokens"] == context


def test_frequencies_that_change_within_the_context_are_refused_with_the_context_to_take(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--context 48 or less"):
        export(llama("longrope"), tmp_path / "bundle", precision="fp32")
    assert list(tmp_path.iterdir()) == []
