"""A graph with switches is, at every quantization mask, the graph that is quantized so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.ranking.switches import SWITCHES, add_switches, quantization_mask
from pastkey.export.quantize.rounding.blocks import dequantize_blocks, quantize_blocks

from ....shared import divided
from ...mixtures import DECODERS, logits_of
from ...small_graphs import model_of, run_model

RNG = np.random.default_rng(0)


def test_nodes_that_share_a_weight_share_its_switch():
    """A tied embedding is gathered, and multiplied by transposed."""
    embedding = RNG.normal(size=(9, 32)).astype(np.float32)
    model = model_of(
        "g (int64[1,T] i, float[9,32] e) => (float[1,T,9] y)"
        " { x = Gather(e, i) t = Transpose <perm = [1, 0]> (e) y = MatMul(x, t) }",
        e=embedding,
    )
    matrices = add_switches(model)
    assert [(m.weight, m.shape, m.bytes, m.matmul) for m in matrices] == [("e", (9, 32), 9 * 32 * 4, True)]
    ids = np.array([[3, 0, 8]])
    for int8 in ((), ("e",)):
        read = dequantize_blocks(quantize_blocks(embedding, 32)) if int8 else embedding
        (found,) = run_model(model, i=ids, **{SWITCHES: quantization_mask(matrices, int8)})
        # Activations are int8 too where the weights are: 32 terms, each wrong by half a step.
        np.testing.assert_allclose(found, read[ids] @ read.T, atol=0.2 if int8 else 1e-5)


@pytest.mark.parametrize("name", divided(DECODERS, quick=["llama"], ci=["one_block_twice"]))
def test_every_mixture_is_the_graph_that_is_quantized_so(name, exported):
    bundle = exported(name).bundle
    ids = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, bundle.manifest.context_length)
    model = ir.load(bundle.all_logits_graph)
    matrices = add_switches(model)
    every = [matrix.weight for matrix in matrices]
    assert every
    with probing(model, bundle.all_logits_graph.parent, [names.LOGITS]) as probe:
        found = {
            chosen: probe(ids, {SWITCHES: quantization_mask(matrices, chosen)})[names.LOGITS]
            for chosen in ((), tuple(every), *((weight,) for weight in every))
        }
    exact = logits_of(bundle, ids)
    np.testing.assert_allclose(found[()], exact, rtol=0, atol=1e-6 * np.abs(exact).max())
    for chosen, logits in found.items():
        expected = logits_of(bundle, ids, set(chosen))
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(exact).max())
    for weight in every:  # a table of positions that int8 holds exactly changes nothing
        if "position" not in weight:
            assert np.abs(found[(weight,)] - exact).max() > 2e-5 * np.abs(exact).max(), weight
