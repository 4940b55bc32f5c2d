"""Decoders as people write them, unedited: with a cache they compute what their author's own call computes."""

import numpy as np
import pytest
import torch

from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.export.compare import logits_difference
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.trace import choose_graph

from ...shared import divided
from ..plain_loop import run_chunks
from .own.registry import DECODERS
from .plain import steps

# One of each kind that a graph must have an operator for: a mask, rows of earlier tokens next to keys and values, a
# bias, a latent, experts, torch's own layers.
IN_CI = ("filled_in_place", "short_conv", "relative_buckets", "latent_filled", "experts_hit", "transformer_encoder")
QUICK = (
    "tril_buffer", "context_300", "positions_of_the_batch", "alibi_to_sdpa", "log_probabilities", "sdpa_grouped",
    "shifted_keys", "latent_absorbed", "gru_layers", "moving_average", "summed_attention",
)  # fmt: skip


def reference(own, module, ids):
    """Logits (B, T, V) as the author computes them, also where a call gives those of the last position only."""
    with torch.no_grad():
        logits = own.call(module, ids)
        if logits.dim() == 2:
            logits = torch.stack([own.call(module, ids[:, : i + 1]) for i in range(ids.shape[1])], 1)
    return logits


@pytest.mark.parametrize("name", divided(DECODERS, quick=QUICK, ci=[*QUICK, *[*DECODERS][::2]]))
def test_steps_with_a_cache_give_the_authors_logits(name):
    own = DECODERS[name]
    taken = in_contract(own.make(), own.context, None, lambda _: None)
    observation = taken.observation
    assert taken.call
    assert (len(observation.layers), {kept.rows for kept in observation.rows}) == (own.layers, {own.rows} - {0})
    assert own.graph in (choose_graph("auto", "cpu", observation).graph, "either")
    assert own.geometry in (*observation.geometry[:1], None)

    module = own.make().float()  # which no export has seen
    ids = torch.randint(own.vocab, (2, min(own.context, 23)), generator=torch.Generator().manual_seed(1))
    expected = reference(own, module, ids)
    assert logits_difference(expected, steps(taken.module, ids, 5, 6, 7, 10)) < 1e-4
    ids[0, -2] = (ids[0, -2] + 1) % own.vocab
    assert logits_difference(expected[0, -1], reference(own, module, ids)[0, -1]) > 1e-2  # it reads earlier tokens


@pytest.mark.parametrize(("name", "precision"), [
    *(pytest.param(name, "fp32", marks=pytest.mark.slow if name in IN_CI else pytest.mark.matrix) for name in DECODERS),
    *(pytest.param(name, "int8", marks=pytest.mark.matrix) for name in [*DECODERS][::3]),
])  # fmt: skip
def test_the_exported_graph_computes_what_the_author_computes(name, precision, tmp_path):
    """Plain onnxruntime over the file; nothing of the runtime is used. `verify` has compared a greedy text."""
    own = DECODERS[name]
    manifest = export(own.make(), tmp_path / "bundle", precision=precision, context_length=own.context).manifest
    assert manifest.parity[precision]["ok"]
    assert manifest.parity["fp32"]["reference"] == "source"
    assert own.graph in (manifest.graph, "either")
    if manifest.graph == "fused":
        assert manifest.operators.get("GroupQueryAttention", 0) == own.layers
        assert "Softmax" not in manifest.operators or "expert" in name

    module = own.make().float()
    ids = torch.randint(own.vocab, (min(46, own.context),), generator=torch.Generator().manual_seed(3)).tolist()
    expected = reference(own, module, torch.tensor([ids]))[0].numpy()
    graph = open_bundle(tmp_path / "bundle", verify=False).all_logits_graph
    found = run_chunks(graph, [ids[:6], ids[6:7], ids[7:8], ids[8:12], ids[12:]])
    assert np.abs(found - expected).max() < (1e-4 if precision == "fp32" else 0.15) * np.abs(expected).max()
