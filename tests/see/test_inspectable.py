"""Every form of decoder: its weights of attention and the stream after each layer are found, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.errors import ContractError
from pastkey.export.graph.edit import replace_uses
from pastkey.see.inspectable import inspectable
from pastkey.see.inspection import inspect

from ..shared import divided

FORMS = (
    "plain", "llama", "gpt2", "own:relative_keys", "own:soft_cap", "own:differential", "own:one_layer_three_times",
    "own:short_conv", "own:smeared_embedding", "own:latent", "own:two_latents", "hf:gpt2", "hf:gemma2", "hf:qwen3",
    "hf:olmo2", "hf:cohere", "hf:phi3", "hf:deepseek_v3", "hf:gpt_oss",
)  # fmt: skip
CI = ("own:differential", "hf:gemma2")  # weights below zero; norms behind, windows and soft caps


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", divided(FORMS, quick=("plain", "llama"), ci=CI))
def test_every_form_of_decoder_is_seen_whole(bundle_of, name):
    bundle = bundle_of(name)
    ids = [(5 + 7 * place) % bundle.manifest.vocab_size for place in range(24)]
    seen = inspect(bundle, ids, 1, shown=24)
    assert len(seen.attention) == seen.layers == len(bundle.manifest.layers)
    for weights in seen.attention.values():
        assert weights.shape == (seen.heads, 24, 24)
        assert not np.triu(weights, 1).any()
        assert np.abs(weights[:, 0, 0] - weights[:, 0].sum(-1)).max() < 1e-6
    assert all(lens is not None for lens in seen.lens)
    assert seen.lens_error is not None
    assert seen.lens_error < 1e-5
    assert seen.entering is not None


@pytest.mark.parametrize(
    "options",
    [
        {"graph": "standard"},
        pytest.param({"precision": "int8"}, marks=pytest.mark.matrix),
        pytest.param({"precision": "fp16"}, marks=pytest.mark.matrix),
    ],
)
@pytest.mark.slow
def test_both_graphs_and_precisions_show_the_same(bundle_of, options):
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    one, other = (inspect(bundle_of("llama", **which), ids, 1, shown=99) for which in (dict[str, Any](), options))
    limit = 1e-5 if "graph" in options else 0.05
    for number in range(2):
        assert np.abs(one.attention[number] - other.attention[number]).max() < limit
    for left, right in zip(one.lens_next, other.lens_next, strict=True):
        assert np.abs(left - right).max() < limit


def test_a_graph_without_a_product_of_weights_and_values_is_refused(bundle_of):
    bundle = bundle_of("llama", graph="standard")
    model = ir.load(bundle.all_logits_graph)
    present = next(value for value in model.graph.outputs if value.name == "present.1.value")
    (other,) = (value for value in model.graph.outputs if value.name == "present.0.value")
    replace_uses(present, other)
    with pytest.raises(ContractError, match="no attention weights were found in attention call 1"):
        inspectable(model, 2, 9)
