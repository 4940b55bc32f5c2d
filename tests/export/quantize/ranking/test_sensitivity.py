"""The cost of each matrix in int8: one graph with switches, against graphs that were quantized in the plain way."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.errors import QualityError
from pastkey.export.measure.metrics import kl_divergence, top1_agreement
from pastkey.export.quantize.int4 import rounded
from pastkey.export.quantize.ranking.sensitivity import sensitivity

from ....shared import divided
from ...mixtures import DECODERS, logits_of


def windows_of(bundle):
    """Two of unlike length (T,)."""
    rng, length = np.random.default_rng(0), bundle.manifest.context_length
    return [rng.integers(0, bundle.manifest.vocab_size, size) for size in (length, length - 3)]


def table_of(bundle, *budget, **options):
    graph = bundle.all_logits_graph
    return sensitivity(ir.load(graph), graph.parent, windows_of(bundle), *budget, **options)


def mixed(bundle, *int8):
    """The logits of all windows."""
    return np.concatenate([logits_of(bundle, ids, *int8) for ids in windows_of(bundle)])


@pytest.mark.parametrize("name", divided(DECODERS, quick=["nano_gpt"], ci=["llama", "one_block_twice"]))
def test_the_table_says_what_each_matrix_costs(name, exported):
    bundle = exported(name).bundle
    found, exact = table_of(bundle), mixed(bundle)
    every = {row.weight for row in found.rows}
    for row in found.rows:
        alone = mixed(bundle, {row.weight})
        assert row.kl_divergence == pytest.approx(kl_divergence(exact, alone), rel=1e-2, abs=1e-10)
        assert row.top1_agreement == pytest.approx(top1_agreement(exact, alone))
    assert found.kl_divergence == pytest.approx(kl_divergence(exact, mixed(bundle, every)), rel=1e-3)
    costs = [row.kl_divergence for row in found.rows]
    assert costs == sorted(costs, reverse=True)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    weights = exported(name).weights()
    stored = {weight: array.shape for weight, array in weights.items() if not weight.startswith(("cos", "sin"))}
    assert {row.weight: row.shape for row in found.rows} == {weight: stored[weight] for weight in every}
    assert every == {weight for weight, shape in stored.items() if len(shape) == 2}
    assert not list(bundle.all_logits_graph.parent.glob("probe*"))


def test_a_budget_keeps_the_fewest_of_the_worst_products(exported):
    bundle = exported("llama").bundle
    plain = table_of(bundle)
    budget = plain.kl_divergence / 3
    kept = table_of(bundle, budget).keep
    assert kept == plain.worst(len(kept))

    def left(count: int) -> float:
        int8 = {row.weight for row in plain.rows} - set(plain.worst(count))
        return kl_divergence(mixed(bundle), mixed(bundle, int8))

    assert left(len(kept)) <= budget < left(len(kept) - 1)
    assert table_of(bundle, plain.kl_divergence * 1.01).keep == ()


def test_a_budget_below_what_the_embeddings_cost_keeps_them_too_and_int4_cannot(exported):
    bundle = exported("nano_gpt").bundle
    plain = table_of(bundle)
    gathered = {row.weight: row.kl_divergence for row in plain.rows if not row.matmul}
    found = table_of(bundle, min(gathered.values()) / 2)
    assert set(gathered) <= set(found.keep)
    assert len(found.keep) < len(found.ranking) == len(plain.rows)
    with pytest.raises(QualityError, match=r"with 5 of 6 matrices in fp32, over --max-kl 1e-12 by \d"):
        table_of(bundle, 1e-12)
    found = rounded(ir.load(bundle.all_logits_graph), bundle.all_logits_graph.parent, windows_of(bundle))
    int4 = {name: matrix.blocks for name, matrix in found.items()}
    with pytest.raises(QualityError, match=r"of \d+ matrices in int8, over --max-kl 1e-12 by \d"):
        table_of(bundle, 1e-12, precision="int4", rounded=int4)
