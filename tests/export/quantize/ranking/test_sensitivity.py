"""What each matrix costs in int8: one graph with switches, against graphs that were quantized in the plain way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import QualityError
from pastkey.export.measure.metrics import kl_divergence, top1_agreement
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.int4 import rounded
from pastkey.export.quantize.ranking.sensitivity import sensitivity
from pastkey.export.quantize.ranking.switches import SWITCHES, add_switches, quantization_mask
from pastkey.export.quantize.rounding.blocks import quantize_blocks

from ....oracles.dequantized import dequantize_blocks
from ....shared import divided
from ...mixtures import DECODERS, logits_of
from ...small_graphs import model_of, run_model


def windows_of(bundle: Bundle) -> list[npt.NDArray[np.int64]]:
    """Two of unlike length (T,)."""
    rng = np.random.default_rng(0)
    length = bundle.manifest.context_length
    return [rng.integers(0, bundle.manifest.vocab_size, size) for size in (length, length - 3)]


@pytest.mark.parametrize("name", divided(DECODERS, quick=["nano_gpt"], ci=["softcap_bias_and_scale"]))
def test_the_table_says_what_each_matrix_costs(name, exported):
    bundle = exported(name).bundle
    windows = windows_of(bundle)
    found = sensitivity(ir.load(bundle.all_logits_graph), bundle.all_logits_graph.parent, windows)
    exact = np.concatenate([logits_of(bundle, ids) for ids in windows])
    every = {row.weight for row in found.rows}
    for row in (found.rows[0], found.rows[-1]):
        alone = np.concatenate([logits_of(bundle, ids, {row.weight}) for ids in windows])
        assert row.kl_divergence == pytest.approx(kl_divergence(exact, alone), rel=1e-2, abs=1e-10)
        assert row.top1_agreement == pytest.approx(top1_agreement(exact, alone))
    whole = np.concatenate([logits_of(bundle, ids, every) for ids in windows])
    assert found.kl_divergence == pytest.approx(kl_divergence(exact, whole), rel=1e-3)
    costs = [row.kl_divergence for row in found.rows]
    assert costs == sorted(costs, reverse=True)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    stored = {weight: array.shape for weight, array in exported(name).weights().items()}
    assert {row.weight: row.shape for row in found.rows} == {weight: stored[weight] for weight in every}
    assert every == {weight for weight, shape in stored.items() if len(shape) == 2 and weight not in ("cos", "sin")}
    assert not list(bundle.all_logits_graph.parent.glob("probe*"))


def test_a_budget_keeps_the_fewest_of_the_worst_products(exported):
    bundle = exported("llama").bundle
    windows, folder = windows_of(bundle), bundle.all_logits_graph.parent
    plain = sensitivity(ir.load(bundle.all_logits_graph), folder, windows)
    budget = plain.kl_divergence / 3
    kept = sensitivity(ir.load(bundle.all_logits_graph), folder, windows, budget).keep
    assert kept == plain.worst(len(kept))
    exact = np.concatenate([logits_of(bundle, ids) for ids in windows])

    def left(count: int) -> float:
        int8 = {row.weight for row in plain.rows} - set(plain.worst(count))
        return kl_divergence(exact, np.concatenate([logits_of(bundle, ids, int8) for ids in windows]))

    assert left(len(kept)) <= budget < left(len(kept) - 1)
    assert sensitivity(ir.load(bundle.all_logits_graph), folder, windows, plain.kl_divergence * 1.01).keep == ()


def test_a_budget_below_what_the_embeddings_cost_keeps_them_too(exported):
    bundle = exported("nano_gpt").bundle
    windows, folder = windows_of(bundle), bundle.all_logits_graph.parent
    plain = sensitivity(ir.load(bundle.all_logits_graph), folder, windows)
    gathered = {row.weight: row.kl_divergence for row in plain.rows if not row.matmul}
    found = sensitivity(ir.load(bundle.all_logits_graph), folder, windows, min(gathered.values()) / 2)
    assert set(gathered) <= set(found.keep)
    assert len(found.keep) < len(found.ranking) == len(plain.rows)
    with pytest.raises(QualityError, match=r"with 5 of 6 matrices in fp32, over --max-kl 1e-12 by \d"):
        sensitivity(ir.load(bundle.all_logits_graph), folder, windows, 1e-12)


def test_int4_cannot_get_below_what_int8_embeddings_cost(exported):
    bundle = exported("nano_gpt").bundle
    windows, folder = windows_of(bundle), bundle.all_logits_graph.parent
    found = rounded(ir.load(bundle.all_logits_graph), folder, windows)
    int4 = {name: matrix.blocks for name, matrix in found.items()}
    with pytest.raises(QualityError, match=r"of \d+ matrices in int8, over --max-kl 1e-12 by \d"):
        sensitivity(ir.load(bundle.all_logits_graph), folder, windows, 1e-12, precision="int4", rounded=int4)


# --- a graph with switches is, at every quantization mask, the graph that is quantized so -----------------------------
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
