"""int4: MatMuls in 4 bits, a few in 8, embeddings and head in 8; better than round to nearest. And --quick."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ParityError
from pastkey.export import bundle_writer, export
from pastkey.export.graph.blocks import Blocks, Numbers
from pastkey.export.measure.metrics import Ids, kl_divergence
from pastkey.export.measure.paths import SHORT_DECODE, SHORT_PREFILL
from pastkey.export.measure.verify import KL_FLOOR, verify
from pastkey.export.quantize import int4
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.int4 import by_error, in_int8, rounded, rounded_to_nearest
from pastkey.export.quantize.ranking.sensitivity import sensitivity
from pastkey.export.quantize.ranking.switches import SWITCHES, add_switches, quantization_mask
from pastkey.export.quantize.rounding import int4_blocks
from pastkey.export.quantize.rounding.int4_blocks import Gptq, Rounded
from pastkey.export.quantize.rounding.matrices import matmul_weight
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.precisions import PRECISIONS

from ...oracles.dequantized import dequantize
from ...shared import divided
from ..decoders import llama

WINDOWS = [np.random.default_rng(seed).integers(0, 60, 40) for seed in range(8)]


def bits_of(model: ir.Model) -> Counter[int]:
    return Counter(node.attributes["bits"].as_int() for node in model.graph if node.op_type == "MatMulNBits")


@pytest.mark.parametrize(
    "name", divided(["llama", "gpt2", "nano_gpt", "one_block_twice"], quick=["llama"], ci=["gpt2"])
)
def test_products_are_4_bit_and_what_is_gathered_or_makes_the_logits_is_8_bit(name, exported):
    made = exported(name, "int4")
    model = ir.load(made.bundle.all_logits_graph)
    assert made.bundle.all_logits_graph.name == "model_q4.onnx"
    found = bits_of(model)
    assert found[8] == 1 + len(made.bundle.manifest.quality["int8_weights"]), "the head, and the first of the ranking"
    assert found[4] >= 4
    assert not any(matmul_weight(node) for node in model.graph)
    assert made.report.weight_bytes < exported(name, "int8").report.weight_bytes
    assert made.report.verification.ok


def in_4_bits(graph: Path, windows: list[Ids]) -> dict[str, Blocks]:
    """The matrices of a float32 graph that are rounded to 4 bits."""
    return {name: found.blocks for name, found in rounded(ir.load(graph), graph.parent, windows).items()}


def test_it_is_nearer_to_float32_than_the_nearest_numbers_are(exported, computed, monkeypatch):
    """Both from one float32 graph. Without the Hessian each weight is rounded by itself."""
    graph = exported("llama").bundle.all_logits_graph

    def divergence() -> float:
        model = ir.load(graph)
        quantize(model, blocks=in_4_bits(graph, WINDOWS[1:]))
        return kl_divergence(computed(ir.load(graph), WINDOWS[0]), computed(model, WINDOWS[0]))

    by_hessian = divergence()
    monkeypatch.setattr(int4, "Gptq", lambda hessian: Gptq(np.zeros_like(hessian)))
    assert 0 < by_hessian < 0.8 * divergence()


def test_a_switch_opens_the_very_4_bit_matrix(exported, computed):
    graph, weight = exported("llama").bundle.all_logits_graph, "model.layers.1.mlp.down_proj.weight"
    matrices = in_4_bits(graph, WINDOWS[:2])
    exact, alone, switched = (ir.load(graph) for _ in range(3))
    quantize(alone, set(alone.graph.initializers) - {weight}, blocks=matrices)
    every = add_switches(switched, matrices)
    with probing(switched, graph.parent, [names.LOGITS]) as probe:
        found = probe(WINDOWS[0], {SWITCHES: quantization_mask(every, {weight})})[names.LOGITS]
    expected = computed(alone, WINDOWS[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - computed(exact, WINDOWS[0])).max() > 1e-3 * np.abs(expected).max()


def test_matrices_that_a_killed_export_rounded_are_taken(exported, tmp_path, monkeypatch):
    graph, finished = exported("llama").bundle.all_logits_graph, tmp_path / "finished"

    def again() -> dict[str, Rounded]:
        return rounded(ir.load(graph), graph.parent, WINDOWS[:2], finished=finished)

    expected = again()
    monkeypatch.setattr(int4, "Gptq", lambda hessian: pytest.fail("rounded again"))
    monkeypatch.setattr(int4, "captured", lambda *_: pytest.fail("run again"))
    for name, found in again().items():
        assert found.error == expected[name].error
        np.testing.assert_array_equal(dequantize(found.blocks), dequantize(expected[name].blocks))
    monkeypatch.undo()
    damaged = sorted(finished.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    hessians = list[np.ndarray]()

    def counted(hessian):
        hessians.append(hessian)
        return Gptq(hessian)

    monkeypatch.setattr(int4, "Gptq", counted)
    assert [found.error for found in again().values()] == [found.error for found in expected.values()]
    assert len(hessians) == 1


# --- which are in 8 bits ------------------------------------------------------------------------------------------
def test_what_costs_most_per_weight_is_ranked_first(exported):
    graph = exported("llama").bundle.all_logits_graph
    matrices = in_4_bits(graph, WINDOWS[:2])
    found = sensitivity(ir.load(graph), graph.parent, WINDOWS[:1], rounded=matrices)
    rows = {row.weight: row for row in found.rows}
    assert set(found.ranking) == set(matrices)
    worth = [rows[name].kl_divergence / rows[name].share for name in found.ranking]
    assert worth == sorted(worth, reverse=True)
    assert list(found.ranking) != [row.weight for row in found.rows if row.weight in matrices]


def test_without_a_table_what_loses_most_of_its_products_per_weight_is_first_and_one_weight_in_24_at_most():
    def of(error: float, rows: int) -> Rounded:
        scales = Numbers(np.ones((rows, 1), np.float32))
        return Rounded(Blocks(lambda: np.ones((rows, 1, 32), np.uint8), scales, 32, 32), error)

    found = {"large": of(0.3, 100), "small": of(0.1, 10), "exact": of(0.0, 1)}
    assert by_error(found) == ("small", "large", "exact")
    assert in_int8([10, 20, 54, 1916]) == 2
    assert in_int8([1937]) == 0
    assert in_int8([]) == 0


@pytest.mark.slow
def test_a_budget_moves_what_costs_most_to_8_bits_until_it_is_met(exported, tmp_path):
    quality = exported("llama", "int4").bundle.manifest.quality
    table = tmp_path / "table.json"
    budget = quality["kl_divergence"] / 4
    report = export(llama(), tmp_path / "bundle", "int4", context_length=40, max_kl=budget, sensitivity=table)
    found = report.manifest.quality
    assert found["kl_divergence"] <= budget
    assert len(found["int8_weights"]) > len(quality["int8_weights"])
    assert tuple(found["int8_weights"]) == report.sensitivity.worst(len(found["int8_weights"]))
    assert len(json.loads(table.read_text())["matrices"]) == 15


# --- what is recorded and verified --------------------------------------------------------------------------------
def test_int4_has_bounds_of_its_own(exported):
    made = exported("llama", "int4")
    manifest = made.bundle.manifest
    assert set(manifest.parity) == {"fp32", "int4"}
    assert 0 < manifest.quality["kl_divergence"] < 1
    checks = {check.name: check for check in verify(made.bundle, made.module).checks}
    recorded = manifest.parity["int4"]["kl_divergence"]
    assert checks["decode"].limit == pytest.approx(max(PRECISIONS["int4"].decode_kl * recorded, 2 * KL_FLOOR))
    assert checks["float32"].ok


# --- --quick: weights rounded to nearest, and a short proof within the limits of a long one ---------------------------
CONTEXT = 80


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", pytest.param("int4", marks=pytest.mark.matrix)])
def test_a_quick_bundle_is_proved_and_says_what_it_is(precision, tmp_path, command):
    module = llama(max_position_embeddings=CONTEXT)
    report = export(module, tmp_path / "bundle", precision, context_length=CONTEXT, quick=True)
    bundle = open_bundle(report.path, verify=True)
    manifest = bundle.manifest
    assert manifest.quick
    assert (report.path / names.GOLDEN).is_file()
    parity = manifest.parity["fp32"]
    assert (parity["ok"], parity["reference"], parity["tokens"]) == (True, "source", SHORT_PREFILL + SHORT_DECODE)
    assert {check["limit"] for name, check in parity["checks"].items() if name != "greedy"} == {1e-5}
    assert manifest.parity[precision]["kl_divergence"] <= PRECISIONS[precision].max_kl
    assert manifest.quality["tokens"] == SHORT_PREFILL + SHORT_DECODE
    assert "exported with --quick: " in command("inspect", report.path)[1]
    assert verify(bundle, module).ok  # the whole proof, of a text that the export did not see


def test_a_quick_int8_graph_is_the_float32_graph_rounded_as_it_is(exported, computed, tmp_path):
    report = export(llama(), tmp_path / "bundle", context_length=40, quick=True)
    model = ir.load(exported("llama").bundle.all_logits_graph)
    quantize(model)
    ids = np.random.default_rng(0).integers(0, 60, 30)
    found = computed(ir.load(report.path / PRECISIONS["int8"].graph), ids)
    np.testing.assert_array_equal(found, computed(model, ids))


def test_rounding_to_nearest_is_gptq_of_inputs_that_are_all_alike(exported):
    model = ir.load(exported("llama").bundle.all_logits_graph)
    for name, found in rounded_to_nearest(model).items():
        matrix = model.graph.initializers[name].const_value.numpy().T
        alike = np.eye(matrix.shape[1], dtype=np.float32)
        expected = int4_blocks.Gptq(alike).round(matrix, found.block_size).blocks
        np.testing.assert_array_equal(found.data, expected.data)
        np.testing.assert_array_equal(found.scales.codes, expected.scales.codes)


def test_a_graph_that_decodes_wrongly_fails_the_short_proof(tmp_path, monkeypatch):
    def spoilt(model, *arguments):
        weight = next(v for name, v in model.graph.initializers.items() if name.endswith("o_proj.weight"))
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.001)
        return write(model, *arguments)

    write = bundle_writer.write_graphs
    monkeypatch.setattr(bundle_writer, "write_graphs", spoilt)
    with pytest.raises(ParityError, match="prefill"):
        export(llama(), tmp_path / "bundle", "fp32", context_length=40, quick=True)
    assert not list(tmp_path.iterdir())
