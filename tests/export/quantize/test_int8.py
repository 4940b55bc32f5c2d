"""int8 within a budget: the matrices that cost most stay in float32, or the export is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError, NumericsError
from pastkey.export import export
from pastkey.export.measure.metrics import kl_divergence
from pastkey.export.quantize.exact import exact_engine
from pastkey.export.quantize.rounding.blocks import choose_block_size, quantize_blocks
from pastkey.export.quantize.rounding.matrices import embedding_weight, matmul_weight
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine

from ...oracles.dequantized import dequantize
from ...shared import divided
from ..conftest import Exported
from ..decoders import Plain, Tied, gpt2
from ..plain_loop import run_chunks

SENSITIVE = "model.layers.1.mlp.down_proj.weight"


def sensitive() -> nn.Module:
    """A GPT-2 of which one matrix gives all channels the same, far more than it gives each: the next norm takes that
    away, and leaves what int8 has of the rest."""
    module = gpt2()
    with torch.no_grad():
        weight = module.get_parameter(SENSITIVE)
        same = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
        weight += 20 * weight.std() * same  # type: ignore[misc]
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The cost of int8 in nats, without a budget."""
    report = export(sensitive(), tmp_path_factory.mktemp("whole") / "bundle", context_length=40)
    assert "float32_weights" not in report.manifest.quality
    return float(report.manifest.quality["kl_divergence"])


def weights_of(bundle: Path) -> dict[str, str]:
    """The all-logits graph's initializers, and the origin of each."""
    stored = ir.load(bundle / PRECISIONS["int8"].graph).graph.initializers
    return {name: value.dtype.name for name, value in stored.items()}


def test_the_sensitive_matrix_stays_in_float32_and_the_budget_is_met(whole, tmp_path):
    out, table = tmp_path / "bundle", tmp_path / "table.json"
    report = export(sensitive(), out, context_length=40, max_kl=whole / 2, sensitivity=table)
    quality = open_bundle(out, verify=True).manifest.quality
    assert quality["kl_divergence"] <= whole / 2
    assert list(quality["float32_weights"]) == [SENSITIVE]
    stored = weights_of(out)
    assert stored[SENSITIVE] == "FLOAT"
    assert stored["model.layers.0.mlp.down_proj.weight.blocks"] == "UINT8"
    assert f"{SENSITIVE}.blocks" not in stored
    assert report.verification.ok
    content = json.loads(table.read_text())
    assert content["matrices"][0]["weight"] == SENSITIVE
    assert content["kl_divergence"] == pytest.approx(whole, rel=1e-3)
    assert set(tmp_path.iterdir()) == {out, table}
    files = {path.name for path in out.rglob("*") if path.is_file()}
    assert not [name for name in files if name.startswith(("calibrated", "probe"))]


# --- the graph ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kept", "operators"),
    [
        ("self_attn.q_proj", {"MatMul": 1, "MatMulNBits": 4, "Split": 2}),  # q separate, k and v joined
        ("mlp.up_proj", {"MatMul": 1, "MatMulNBits": 4, "Split": 0}),  # gate separate
        ("mlp.down_proj", {"MatMul": 1, "MatMulNBits": 3, "Split": 1}),
    ],
)
def test_products_are_joined_with_others_of_their_kind(kept, operators, exported, computed):
    """Of one layer; the other's q, k and v are joined, its gate and up as well."""
    made = exported("llama")
    weight = f"model.layers.0.{kept}.weight"
    model, plain = ir.load(made.bundle.all_logits_graph), ir.load(made.bundle.all_logits_graph)
    quantize(model, {weight})
    quantize(plain)
    found, usual = (
        Counter(node.op_type for node in graph.graph if not str(node.name).startswith("scales_of"))
        for graph in (model, plain)
    )
    layer = {"MatMul": 0, "MatMulNBits": 4, "Split": 1}
    assert {name: found[name] - usual[name] + layer[name] for name in operators} == operators
    np.testing.assert_array_equal(model.graph.initializers[weight].const_value.numpy(), made.weights()[weight])
    expected = made.torch_logits([*range(20)])
    np.testing.assert_allclose(computed(model, range(20)), expected, rtol=0, atol=0.05 * np.abs(expected).max())


# --- the command --------------------------------------------------------------------------------------------------
def test_the_command_says_how_many_weights_stay_and_where_int8_costs_most(checkpoint, tmp_path, command):
    out, table = tmp_path / "bundle", tmp_path / "table.json"
    status, _, told = command("export", checkpoint, "--out", out, "--max-kl", "2e-5", "--sensitivity", table)
    assert status == 0
    kept = open_bundle(out).manifest.quality["float32_weights"]
    assert f"kept in float32 to meet --max-kl: {len(kept)} weights" in told
    rows = json.loads(table.read_text())["matrices"]
    assert f"most sensitive to int8: {rows[0]['weight']} (" in told
    assert f", {rows[2]['weight']} (" in told
    assert f"  {', '.join(kept)}\n" in command("inspect", out)[1]


# --- an engine with exact products is as far from the bundle as rounding its activations moves it --------------------
IDS = np.random.default_rng(0).integers(0, 61, 12)


def test_exact_products_are_apart_from_rounded_ones_and_leave_no_file(exported):
    made = exported("llama", "int8")
    files = sorted(made.bundle.path.rglob("*"))
    rounded = Engine(made.bundle, native=False).prefill(IDS)
    with exact_engine(made.bundle) as exact:
        steps = [exact.decode(int(token)) for token in IDS]
        exact.reset()
        found = exact.prefill(IDS)
    assert sorted(made.bundle.path.rglob("*")) == files
    largest = np.abs(rounded).max()
    assert 1e-4 < np.abs(found - rounded).max() / largest < 5e-2
    assert np.abs(found - steps[-1]).max() / largest < 1e-5  # which no rounding amplifies


# --- whole decoders with matrices of odd widths or odd numbers: exported and proved, or refused -----------------------
SIZES = [
    (kind, *sizes) for sizes in ((1, 16), (15, 16), (16, 16), (17, 32), (33, 16), (128, 32)) for kind in (Plain, Tied)
]


@pytest.mark.parametrize(
    ("kind", "width", "block"),  # less than a block, exactly one, and more
    divided(SIZES, quick=[(Tied, 33, 16)], ci=[(Plain, 1, 16), (Tied, 16, 16), (Plain, 17, 32), (Tied, 128, 32)]),
)
def test_widths_that_are_no_multiple_of_a_block_are_padded(kind, width, block, tmp_path):
    """K of q, k, v, of the embedding and of the head is `width`; that of o is heads times size, 10."""
    report = export(kind(width=width, heads=1, size=10), tmp_path / "bundle", context_length=40)
    made = Exported(kind(width=width, heads=1, size=10), report, open_bundle(tmp_path / "bundle", verify=True))
    graph = made.bundle.all_logits_graph
    matmuls = [node.attributes for node in ir.load(graph).graph if node.op_type == "MatMulNBits"]
    assert [matmul["K"].as_int() for matmul in matmuls] == [width, 10, width]
    assert [matmul["block_size"].as_int() for matmul in matmuls] == [block, 16, block]
    ids = np.random.default_rng(0).integers(0, 37, 40).tolist()
    expected = made.torch_logits(ids)
    np.testing.assert_allclose(run_chunks(graph, [ids]), expected, rtol=0, atol=0.03 * np.abs(expected).max())


# --- numbers ------------------------------------------------------------------------------------------------------
# The matrix, its elements that are set (all or one), and the number.
NUMBERS = {
    "a head of zeros": ("head", ..., 0.0),
    "a table of zeros": ("token", ..., 0.0),
    "values of zeros": ("blocks.0.v", ..., 0.0),
    "queries below the normal numbers": ("blocks.0.q", ..., 1e-40),
    "equal numbers": ("blocks.0.o", ..., 0.25),
    "one tiny number": ("blocks.0.v", (1, 2), 1e-45),
    "one large number": ("blocks.0.v", (1, 2), 1e4),
    "one huge number": ("blocks.0.o", (1, 2), 1e20),
}
QUICK = ["a head of zeros", "one huge number"]


def holding(place: str, where: Any, number: float) -> Plain:
    module = Plain()
    with torch.no_grad():
        module.get_submodule(place).weight[where] = number
    return module


@pytest.mark.parametrize("name", divided(NUMBERS, quick=QUICK, ci=[*NUMBERS][1:-1:2]))
def test_numbers_that_round_badly_are_exported(name, tmp_path, recwarn):
    report = export(holding(*NUMBERS[name]), tmp_path / "bundle", context_length=40)
    assert report.verification.ok
    assert np.isfinite(report.manifest.quality["kl_divergence"])
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


REFUSED = {
    "NaN": ("blocks.0.q", float("nan"), NumericsError, r"blocks\.0\.q\.weight of Plain holds NaN or infinity"),
    "infinity": ("token", -float("inf"), NumericsError, r"token\.weight of Plain holds NaN or infinity"),
    "overflow": ("blocks.0.o", 3e38, NumericsError, "overflow at this precision"),
    "overflow in the logits": ("head", 3e38, ContractError, "NaN or infinity in its logits"),
}


@pytest.mark.parametrize(("place", "number", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_numbers_that_are_none_or_overflow_are_refused_and_leave_nothing(place, number, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        export(holding(place, (1, 2), number), tmp_path / "bundle", context_length=40)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_decoder_of_zeros_is_exported(tmp_path):
    module = Plain().requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    report = export(module, tmp_path / "bundle", context_length=40, max_kl=0.1)
    assert report.verification.ok
    assert report.manifest.quality["kl_divergence"] == 0


# --- what is quantized, what the blocks hold, and what it costs in bytes ----------------------------------------------
def float_matrices(graph):
    """Initializers in float32 with two axes and more than a handful of elements, but for scales' factors and angles."""
    return [
        name
        for name, value in ir.load(graph).graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT
        and len(value.shape) >= 2
        and value.const_value.size > 16
        and not (name.startswith("scales_of_") and name.endswith(".row_scales"))
        and not name.startswith(("cos_cache", "sin_cache"))
    ]


def test_every_matrix_is_in_blocks_for_int8_activations_and_a_third_of_the_bytes(exported):
    bundle, report = exported("llama", "int8").bundle, exported("llama", "int8").report
    assert float_matrices(bundle.all_logits_graph) == float_matrices(bundle.last_logits_graph) == []
    assert float_matrices(exported("llama").bundle.all_logits_graph) != []
    assert not {"MatMul", "Gemm"} & set(bundle.manifest.operators)
    for node in ir.load(bundle.all_logits_graph).graph:
        if node.op_type == "MatMulNBits":
            bits, level, size = (node.attributes[name].as_int() for name in ("bits", "accuracy_level", "block_size"))
            assert (bits, level) == (8, 4)
            assert size in (16, 32, 64)
    assert report.fp32_weight_bytes == exported("llama").report.weight_bytes
    assert report.weight_bytes <= 0.33 * report.fp32_weight_bytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_int8_graph_is_the_dequantized_model_but_for_its_activations(name, exported, computed):
    graph = exported(name).bundle.all_logits_graph
    shipped, exact, twin = (ir.load(graph) for _ in range(3))
    quantize(shipped)
    quantize(exact)
    for node in exact.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)  # does not change activations
    rounded = dict[ir.Value, np.ndarray]()
    for node in twin.graph:
        read = matmul_weight(node)
        if (value := embedding_weight(node) if read is None else read.initializer) is not None:
            transposed = read is not None and read.transposed
            matrix = value.const_value.numpy().T if transposed else value.const_value.numpy()
            found = dequantize(quantize_blocks(matrix, choose_block_size(matrix.shape[1])))
            rounded[value] = np.ascontiguousarray(found.T) if transposed else found
    assert {value.name for value in rounded} == set(float_matrices(graph))
    for value, array in rounded.items():
        value.const_value = ir.Tensor(array, name=value.name)
    ids = np.random.default_rng(0).integers(0, 61, 40)
    expected = computed(twin, ids)
    np.testing.assert_allclose(computed(exact, ids), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    found = computed(shipped, ids)
    assert 0 < np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()
    assert kl_divergence(expected, found) < 0.02
