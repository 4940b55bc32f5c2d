"""int8 within a budget: the matrices that cost most stay in float32, or the export is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from pastkey.contract.bundle import open_bundle
from pastkey.errors import ContractError, NumericsError, QualityError
from pastkey.export import export
from pastkey.export.quantize.exact import exact_engine
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.precisions import PRECISIONS
from pastkey.runtime import Engine

from ...shared import divided
from ..decoders import Plain, Tied, gpt2, llama
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
    """What int8 costs it in nats, without a budget."""
    report = export(sensitive(), tmp_path_factory.mktemp("whole") / "bundle", context_length=40)
    assert "float32_weights" not in report.manifest.quality
    return float(report.manifest.quality["kl_divergence"])


def weights_of(bundle: Path) -> dict[str, str]:
    """The all-logits graph's initializers, and what each is of."""
    model = onnx.load(bundle / PRECISIONS["int8"].graph)
    return {w.name: onnx.numpy_helper.to_array(w).dtype.name for w in model.graph.initializer}


def test_the_sensitive_matrix_stays_in_float32_and_the_budget_is_met(whole, tmp_path):
    out, table = tmp_path / "bundle", tmp_path / "table.json"
    report = export(sensitive(), out, context_length=40, max_kl=whole / 2, sensitivity=table)
    quality = open_bundle(out, verify=True).manifest.quality
    assert quality["kl_divergence"] <= whole / 2
    assert list(quality["float32_weights"]) == [SENSITIVE]
    stored = weights_of(out)
    assert stored[SENSITIVE] == "float32"
    assert stored["model.layers.0.mlp.down_proj.weight.blocks"] == "uint8"
    assert f"{SENSITIVE}.blocks" not in stored
    assert report.verification.ok
    content = json.loads(table.read_text())
    assert content["matrices"][0]["weight"] == SENSITIVE
    assert content["kl_divergence"] == pytest.approx(whole, rel=1e-3)
    assert set(tmp_path.iterdir()) == {out, table}
    files = {path.name for path in out.rglob("*") if path.is_file()}
    assert not [name for name in files if name.startswith(("calibrated", "probe"))]


@pytest.mark.slow
def test_a_budget_is_met_as_long_as_one_matrix_is_int8_and_a_tied_table_moves_as_a_whole(tmp_path):
    table = tmp_path / "table.json"
    export(llama(), tmp_path / "int8", context_length=40, sensitivity=table)
    rows = json.loads(table.read_text())["matrices"]
    cheapest = rows[-1]["kl_divergence"]
    report = export(llama(), tmp_path / "bundle", context_length=40, max_kl=2 * cheapest)
    assert report.manifest.quality["kl_divergence"] <= 2 * cheapest
    kept = report.manifest.quality["float32_weights"]
    assert "model.embed_tokens.weight" in kept
    assert rows[-1]["weight"] not in kept
    stored = weights_of(tmp_path / "bundle")
    assert [name for name in stored if name.startswith("model.embed_tokens")] == ["model.embed_tokens.weight"]
    found = f"with {len(rows) - 1} of {len(rows)} matrices in fp32, over --max-kl"
    with pytest.raises(QualityError, match=found):
        export(llama(), tmp_path / "refused", context_length=40, max_kl=cheapest / 2)
    assert not (tmp_path / "refused").exists()


# --- the graph ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kept", "operators"),
    [
        ("self_attn.q_proj", {"MatMul": 1, "MatMulNBits": 4, "Split": 2}),  # q alone, k and v joined
        ("mlp.up_proj", {"MatMul": 1, "MatMulNBits": 4, "Split": 0}),  # gate alone
        ("mlp.down_proj", {"MatMul": 1, "MatMulNBits": 3, "Split": 1}),
    ],
)
def test_products_are_joined_with_others_of_their_kind(kept, operators, exported, tmp_path):
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
    array = model.graph.initializers[weight].const_value
    assert array is not None
    np.testing.assert_array_equal(array.numpy(), made.weights()[weight])
    ids = list(range(20))
    graph = tmp_path / "model.onnx"
    ir.save(model, graph, external_data="model.data")
    expected = made.torch_logits(ids)
    np.testing.assert_allclose(run_chunks(graph, [ids]), expected, rtol=0, atol=0.05 * np.abs(expected).max())


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_how_many_weights_stay_and_where_int8_costs_most(checkpoint, tmp_path, capsys):
    from pastkey.__main__ import main

    out, table = tmp_path / "bundle", tmp_path / "table.json"
    arguments = ["export", str(checkpoint), "--out", str(out), "--max-kl", "2e-5", "--sensitivity", str(table)]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    kept = open_bundle(out).manifest.quality["float32_weights"]
    assert f"kept in float32 to meet --max-kl: {len(kept)} weights" in told
    rows = json.loads(table.read_text())["matrices"]
    assert f"most sensitive to int8: {rows[0]['weight']} (" in told
    assert f", {rows[2]['weight']} (" in told
    assert main(["inspect", str(out)]) == 0
    assert f"float32_weights: {', '.join(kept)}" in capsys.readouterr().out


# --- an engine with exact products is as far from the bundle as rounding its activations takes it ---------------------
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


# --- int8 of whole decoders with matrices of odd widths or odd numbers: exported and proved, or refused in a ----------
# --- widths -------------------------------------------------------------------------------------------------------
SIZES = [
    (kind, *sizes) for sizes in ((1, 16), (15, 16), (16, 16), (17, 32), (33, 16), (128, 32)) for kind in (Plain, Tied)
]


@pytest.mark.parametrize(
    ("kind", "width", "block"),  # less than a block, exactly one, and more
    divided(SIZES, quick=[(Tied, 33, 16)], ci=[(Plain, 1, 16), (Tied, 16, 16), (Plain, 17, 32), (Tied, 128, 32)]),
)
def test_widths_that_are_no_multiple_of_a_block_are_padded(kind, width, block, tmp_path):
    """K of q, k, v, of the embedding and of the head is `width`; that of o is heads times size, 10."""
    module = kind(width=width, heads=1, size=10)
    export(module, tmp_path / "bundle", context_length=40)
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    model = onnx.load(bundle.all_logits_graph)
    matmuls = [
        {attribute.name: attribute.i for attribute in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert [matmul["K"] for matmul in matmuls] == [width, 10, width]
    assert [matmul["block_size"] for matmul in matmuls] == [block, 16, block]
    ids = np.random.default_rng(0).integers(0, 37, 40).tolist()
    with torch.no_grad():
        expected = module(torch.tensor([ids]), torch.arange(40)[None])[0].numpy()
    found = run_chunks(bundle.all_logits_graph, [ids])
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.03 * np.abs(expected).max())


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
    "NaN": (
        "blocks.0.q",
        float("nan"),
        NumericsError,
        r"the weight blocks\.0\.q\.weight of Plain holds NaN or infinity",
    ),
    "infinity": ("token", -float("inf"), NumericsError, r"the weight token\.weight of Plain holds NaN or infinity"),
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
    module = Plain()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    report = export(module, tmp_path / "bundle", context_length=40, max_kl=0.1)
    assert report.verification.ok
    assert report.manifest.quality["kl_divergence"] == 0
