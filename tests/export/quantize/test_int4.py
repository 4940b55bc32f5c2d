"""int4: MatMuls in 4 bits, a few in 8, embeddings and head in 8; better than round to nearest, and verified."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.export import export
from pastkey.export.measure.metrics import Ids, kl_divergence
from pastkey.export.measure.verify import KL_FLOOR, verify
from pastkey.export.quantize import int4
from pastkey.export.quantize.int4 import by_error, in_int8, rounded
from pastkey.export.quantize.ranking.sensitivity import sensitivity
from pastkey.export.quantize.ranking.switches import SWITCHES, add_switches, quantization_mask
from pastkey.export.quantize.rounding.blocks import Blocks
from pastkey.export.quantize.rounding.int4_blocks import Gptq, Rounded
from pastkey.export.quantize.rounding.matrices import matmul_weight
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.precisions import PRECISIONS

from ...shared import divided
from ..decoders import llama
from ..plain_loop import open_graph, run_chunks

WINDOWS = [np.random.default_rng(seed).integers(0, 60, 40) for seed in range(8)]
IDS = WINDOWS[0].tolist()


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


def divergence_of_int4(graph: Path, out: Path) -> float:
    """KL divergence in nats of the float32 graph from its MatMuls in 4 bits, which are written to `out`."""
    model = ir.load(graph)
    quantize(model, rounded=in_4_bits(graph, WINDOWS[1:]))
    ir.save(model, out, external_data=f"{out.name}_data")
    return kl_divergence(run_chunks(graph, [IDS]), run_chunks(out, [IDS]))


def test_it_is_nearer_to_float32_than_the_nearest_numbers_are(exported, tmp_path, monkeypatch):
    """Both from one float32 graph. Without the Hessian each weight is rounded by itself."""
    graph = exported("llama").bundle.all_logits_graph
    by_hessian = divergence_of_int4(graph, tmp_path / "hessian")
    monkeypatch.setattr(int4, "Gptq", lambda hessian: Gptq(np.zeros_like(hessian)))
    by_itself = divergence_of_int4(graph, tmp_path / "nearest")
    assert 0 < by_hessian < 0.8 * by_itself


def test_a_switch_opens_the_very_4_bit_matrix(exported, tmp_path):
    bundle = exported("llama").bundle
    weight = "model.layers.1.mlp.down_proj.weight"
    matrices = in_4_bits(bundle.all_logits_graph, WINDOWS[:2])
    alone = ir.load(bundle.all_logits_graph)
    quantize(alone, set(alone.graph.initializers) - {weight}, rounded=matrices)
    ir.save(alone, tmp_path / "alone", external_data="alone_data")
    switched = ir.load(bundle.all_logits_graph)
    every = add_switches(switched, matrices)
    ir.save(switched, tmp_path / "switched", external_data="switched_data")
    session = open_graph(tmp_path / "switched")
    feeds = {names.INPUT_IDS: WINDOWS[0][None], names.ATTENTION_MASK: np.ones((1, 40), np.int64)}
    feeds |= {names.POSITION_IDS: np.arange(40)[None], SWITCHES: quantization_mask(every, {weight})}
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    expected = run_chunks(tmp_path / "alone", [IDS])
    found = session.run([names.LOGITS], feeds)[0][0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - run_chunks(bundle.all_logits_graph, [IDS])).max() > 1e-3 * np.abs(expected).max()


def test_matrices_that_a_killed_export_rounded_are_taken(exported, tmp_path, monkeypatch):
    graph, finished = exported("llama").bundle.all_logits_graph, tmp_path / "finished"

    def again() -> dict[str, Rounded]:
        return rounded(ir.load(graph), graph.parent, WINDOWS[:2], finished=finished)

    expected = again()
    monkeypatch.setattr(int4, "Gptq", lambda hessian: pytest.fail("rounded again"))
    monkeypatch.setattr(int4, "captured", lambda *_: pytest.fail("run again"))
    for name, found in again().items():
        assert found.error == expected[name].error
        for field in ("data", "scales", "zeros", "columns", "block_size", "bits"):
            assert np.array_equal(getattr(found.blocks, field), getattr(expected[name].blocks, field))
    monkeypatch.undo()
    damaged = sorted(finished.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    hessians = list[np.ndarray]()

    def counted(hessian: np.ndarray) -> Gptq:
        hessians.append(hessian)
        return Gptq(hessian)

    monkeypatch.setattr(int4, "Gptq", counted)
    assert [found.error for found in again().values()] == [found.error for found in expected.values()]
    assert len(hessians) == 1


# --- which are in 8 bits ------------------------------------------------------------------------------------------
def test_what_costs_most_per_weight_is_ranked_first(exported):
    bundle = exported("llama").bundle
    folder = bundle.all_logits_graph.parent
    matrices = in_4_bits(bundle.all_logits_graph, WINDOWS[:2])
    found = sensitivity(ir.load(bundle.all_logits_graph), folder, WINDOWS[:1], rounded=matrices)
    rows = {row.weight: row for row in found.rows}
    assert set(found.ranking) == set(matrices)
    worth = [rows[name].kl_divergence / rows[name].share for name in found.ranking]
    assert worth == sorted(worth, reverse=True)
    assert list(found.ranking) != [row.weight for row in found.rows if row.weight in matrices]


def test_without_a_table_what_loses_most_of_its_products_per_weight_is_first():
    def of(error: float, rows: int) -> Rounded:
        codes, scales = np.ones((rows, 1), np.uint8), np.ones((rows, 1), np.float32)
        return Rounded(Blocks(lambda: codes, codes, scales, 32, 32), error)

    found = {"large": of(0.3, 100), "small": of(0.1, 10), "exact": of(0.0, 1)}
    assert by_error(found) == ("small", "large", "exact")


def test_one_weight_in_24_is_in_8_bits_at_most():
    assert in_int8([10, 20, 54, 1916]) == 2
    assert in_int8([1937]) == 0
    assert in_int8([]) == 0


@pytest.mark.slow
def test_a_budget_moves_what_costs_most_to_8_bits_until_it_is_met(exported, tmp_path):
    quality = exported("llama", "int4").bundle.manifest.quality
    table = tmp_path / "table.json"
    budget = quality["kl_divergence"] / 4
    report = export(llama(), tmp_path / "bundle", "int4", context_length=40, max_kl=budget, sensitivity=table)
    found = open_bundle(tmp_path / "bundle").manifest.quality
    assert found["kl_divergence"] <= budget
    assert len(found["int8_weights"]) > len(quality["int8_weights"])
    assert report.sensitivity is not None
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


def test_other_programs_are_told_of_q4(exported):
    bundle = exported("llama", "int4").bundle
    config = json.loads((bundle.path / names.CONFIG).read_text())
    assert config["transformers.js_config"]["dtype"] == "q4"
    genai = json.loads((bundle.path / names.GENAI_CONFIG).read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
