"""Each fault that is planted into a bundle is found by `verify`: the runs that it spares would show no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.export import export
from pastkey.export.graft.probe.observe import observe
from tools.planted_faults import FAULTS, found_by

from ..decoders import llama

CONTEXT = 200
# int8's own rounding is larger than these: `verify` asks whether it is the same model.
WITHIN_INT8 = {
    "half of one matrix times 1.001",
    "half of one matrix times 1.01",
    "one row of one matrix is zero",
    "the scale of one block doubled",
    "the zero point of one block off by one",
    "epsilon of one norm 100 times too large",
    "the scale of one attention 1 % off",
    "the last cached value is stale at single tokens 64, 128, ...",
}


def made(module: nn.Module, folder: Path, precision: str = "fp32") -> Bundle:
    export(module, folder / "bundle", precision, context_length=CONTEXT)
    return open_bundle(folder / "bundle", verify=False)


def unfound(bundle: Bundle, module: nn.Module, folder: Path) -> set[str]:
    found = {fault: found_by(bundle, fault, module, (), folder) for fault in FAULTS}
    assert sum(names is not None for names in found.values()) >= 17
    return {fault for fault, names in found.items() if names == []}


@pytest.mark.slow
def test_every_fault_of_a_float32_bundle_is_found(tmp_path):
    module = llama(max_position_embeddings=CONTEXT)
    assert unfound(made(module, tmp_path), module, tmp_path) == set()


@pytest.mark.slow
def test_faults_of_an_int8_bundle_are_found_if_they_exceed_its_rounding(tmp_path):
    module = llama(max_position_embeddings=CONTEXT)
    assert unfound(made(module, tmp_path, "int8"), module, tmp_path) <= WITHIN_INT8


@pytest.mark.slow
@pytest.mark.matrix
def test_a_window_that_is_one_token_too_wide_is_found(tmp_path):
    transformers: Any = pytest.importorskip("transformers")
    from pastkey.export.graft.huggingface import HuggingFaceDecoder

    config = transformers.Gemma3TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=CONTEXT, sliding_window=32, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    bundle = made(model, tmp_path)
    decoder = HuggingFaceDecoder(model)
    layers = observe(decoder, CONTEXT).layers
    assert found_by(bundle, "one window one token too wide", decoder, layers, tmp_path)


def test_a_last_logits_graph_that_differs_from_the_other_is_found_in_int8(exported, tmp_path):
    bundle = exported("llama", "int8").bundle
    found = found_by(bundle, "the last-logits graph exchanges two rows of the head", None, (), tmp_path)
    assert found is not None
    assert {"prefill", "decode", "chunks_of_7", "chunks_of_64"} <= set(found)
