"""From a module to a bundle: odd decoders give right ones, wrong decoders give none."""

from __future__ import annotations

import dataclasses
import errno
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import (
    InputError,
    ParityError,
)
from pastkey.export import bundle_writer, export, grafting
from pastkey.export.bundle_writer import MIN_ONNXRUNTIME
from pastkey.runtime import Engine

from ..shared import divided
from .cases import CASES, MORE_CASES
from .decoders import NanoGpt, Plain, TableRope, llama
from .plain_loop import run_batch, run_chunks

FUSED = [name for name, case in CASES.items() if case.graph == "fused"]
SIZES, CONTEXTS = (8, 10, 16, 80), (2, 8, 11, 40)


def assert_plain_loop_equals_torch(exported: Any, context: int) -> None:
    """Ids fed one by one, all at once and in chunks, to each graph of the bundle."""
    ids = np.random.default_rng(1).integers(0, exported.bundle.manifest.vocab_size, context).tolist()
    expected = exported.torch_logits(ids)
    tolerance = 1e-5 * max(float(np.abs(expected).max()), 1e-6)
    half = max(1, context // 2)
    for chunks in ([[i] for i in ids], [ids], [ids[:half], ids[half : half + 1], ids[half + 1 :]]):
        chunks = [chunk for chunk in chunks if chunk]
        found = run_chunks(exported.bundle.all_logits_graph, chunks)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        last = run_chunks(exported.bundle.last_logits_graph, chunks)
        ends = np.cumsum([len(chunk) for chunk in chunks]) - 1
        np.testing.assert_allclose(last, expected[ends], rtol=0, atol=tolerance)


# --- right ones ---------------------------------------------------------------------------------------------------
# Those that other tests have exported, too.
QUICK = ("head_size_10_context_11", "three_axes", "one_block_twice", "multi_query_repeated_by_hand", "llama", "gpt2")


@pytest.mark.parametrize("name", divided(CASES, quick=QUICK, ci=CASES))
def test_the_exported_file_in_plain_onnxruntime_equals_torch(name, exported):
    made = exported(name)
    case = CASES[name]
    assert made.bundle.manifest.graph == case.graph
    assert made.report.verification.ok
    assert made.report.verification.reference == "source"
    assert_plain_loop_equals_torch(made, case.context)


@pytest.mark.parametrize("name", divided(MORE_CASES, ci=[*MORE_CASES][::3]))
def test_further_decoders_in_plain_onnxruntime_equal_torch(name, exported):
    made = exported(name)
    assert_plain_loop_equals_torch(made, MORE_CASES[name].context)


@pytest.mark.parametrize("name", divided(FUSED, ci=FUSED[::4]))
def test_the_standard_graph_of_what_fused_takes_equals_torch(name, exported):
    made = exported(name, graph="standard")
    assert made.bundle.manifest.graph == "standard"
    assert_plain_loop_equals_torch(made, CASES[name].context)


@pytest.mark.parametrize("name", divided(CASES | MORE_CASES, ci=[*CASES, *MORE_CASES][1::5]))
def test_int8_of_every_decoder_verifies(name, exported):
    made = exported(name, "int8")
    case = (CASES | MORE_CASES)[name]
    assert made.report.verification.ok
    ids = np.random.default_rng(1).integers(0, made.bundle.manifest.vocab_size, case.context).tolist()
    expected, found = made.torch_logits(ids), run_chunks(made.bundle.all_logits_graph, [ids])
    assert np.abs(found - expected).max() <= 0.1 * max(float(np.abs(expected).max()), 1e-6)


@pytest.mark.parametrize(
    ("size", "context"), divided(product(SIZES, CONTEXTS), ci=[*zip(SIZES, CONTEXTS, strict=True)])
)
def test_every_context_and_head_size(size, context, tmp_path):
    module = Plain(size=size, heads=1, vocab=33, context=context)
    report = export(module, tmp_path / "bundle", context_length=context)
    assert report.verification.ok
    assert report.verification.tokens == context
    assert report.manifest.graph == ("standard" if size == 10 else "fused")


@pytest.mark.parametrize(
    ("name", "side"), [("llama", "right"), ("head_size_10_context_11", "left"), ("one_block_twice", "left")]
)
def test_padded_rows_in_plain_onnxruntime_equal_each_row_alone(name, side, exported):
    """The standard graph takes padding at either end, the fused one at the right."""
    made = exported(name)
    lengths, steps = (6, 3, 1), 3
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, made.bundle.manifest.vocab_size, length + steps) for length in lengths]
    ids, mask = np.zeros((3, 6), np.int64), np.zeros((3, 6), np.int64)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        place = slice(length) if side == "right" else slice(6 - length, None)
        ids[row, place], mask[row, place] = text[:length], 1
    new = np.stack([text[-steps:] for text in texts])
    prompt, further = run_batch(made.bundle.all_logits_graph, ids, mask, new)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        expected = made.torch_logits(text.tolist())
        found = np.concatenate([prompt[row][mask[row] == 1], further[row]])
        assert len(found) == length + steps
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_block_applied_twice_is_stored_once(exported):
    made = exported("one_block_twice")
    parameters = {name: p for name, p in made.module.named_parameters() if not name.startswith(("position", "head"))}
    needed = sum(p.numel() for p in parameters.values()) * 4 + (made.module.cos.numel() * 2) * 4
    assert len(made.bundle.manifest.layers) == 2
    assert needed <= made.report.weight_bytes <= needed + 1024  # and a few constants
    stored = sum(file.stat().st_size for file in (made.bundle.path / "onnx").glob("*_data"))
    assert stored <= needed + 1024


# --- the report and the manifest ----------------------------------------------------------------------------------
def test_the_manifest_records_what_was_measured(exported):
    made = exported("llama", "int8")
    manifest = made.bundle.manifest
    checks = {"prefill", "decode", "chunks_of_7", "chunks_of_64", "batch", "greedy"}
    assert set(manifest.parity) == {"fp32", "int8"}
    for precision, parity in manifest.parity.items():
        assert parity["ok"] is True
        assert parity["tokens"] == 40
        assert set(parity["checks"]) == checks | ({"float32"} if precision == "int8" else set())
    assert manifest.parity["fp32"]["reference"] == "source"
    assert manifest.parity["int8"]["reference"] == "own uncached run"
    for check in manifest.parity["fp32"]["checks"].values():
        if check["measure"] == "max_relative_difference":
            assert 0 <= check["value"] <= check["limit"] == 1e-5
    assert 0 < manifest.quality["kl_divergence"] < 0.05
    assert 0.5 < manifest.quality["top1_agreement"] <= 1
    assert manifest.quality["text"] == "own"
    verified = made.report.verification.quality
    assert {key: manifest.parity["int8"][key] for key in verified} == verified


def test_the_quality_figures_are_those_of_the_two_models(exported):
    from pastkey.export.measure.metrics import kl_divergence
    from pastkey.export.measure.paths import compared_text

    made = exported("llama", "int8")
    ids = compared_text(Engine(made.bundle), 40).tolist()
    assert len(ids) == 40
    assert len(set(ids)) > 10
    found = kl_divergence(made.torch_logits(ids), run_chunks(made.bundle.all_logits_graph, [ids]))
    assert found == pytest.approx(made.bundle.manifest.parity["int8"]["kl_divergence"], rel=0.01)


def test_the_manifest_says_what_the_graph_is(exported):
    made = exported("head_size_10_context_11")
    manifest, graph = made.bundle.manifest, made.graph()
    assert manifest.source == "Plain"
    assert manifest.graph_reason == "GroupQueryAttention cannot take a head size of 10, not a multiple of 8"
    assert manifest.proved == manifest.context_length
    assert (manifest.vocab_size, manifest.context_length) == (37, 11)
    assert manifest.opset == next(o.version for o in graph.opset_import if o.domain == "")
    assert manifest.ir_version == graph.ir_version
    assert manifest.min_onnxruntime == MIN_ONNXRUNTIME
    operators = [node.op_type for node in graph.graph.node]
    assert dict(manifest.operators) == {name: operators.count(name) for name in set(operators)}


def test_the_folder_holds_the_files_of_the_manifest_and_nothing_else(exported):
    bundle = exported("llama", "int8").bundle
    found = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert found == {*bundle.manifest.files, names.MANIFEST}
    assert found == {
        "pastkey.json", "config.json", "generation_config.json", "genai_config.json", "golden_logits.npz",
        "onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data", "onnx/pastkey.onnx", "onnx/pastkey_native.onnx",
    }  # fmt: skip
    assert list(bundle.path.parent.iterdir()) == [bundle.path]


@dataclasses.dataclass
class Replaced:
    """One export of a module in training mode, over an old bundle in a folder with an unusual name."""

    module: NanoGpt
    before: dict[str, Tensor]
    out: Path


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    out = tmp_path_factory.mktemp("a") / "größer & 50 %"
    out.mkdir()
    (out / names.MANIFEST).write_text("{}")
    (out / "old.txt").write_text("")
    module = NanoGpt(layers=1).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export(module, out, context_length=32, force=True)
    return Replaced(module, before, out)


def test_force_replaces_a_bundle_whatever_its_name(replaced):
    assert open_bundle(replaced.out, verify=True).manifest.context_length == 32
    assert not (replaced.out / "old.txt").exists()
    assert list(replaced.out.parent.iterdir()) == [replaced.out]


def test_the_module_is_left_as_it_was(replaced):
    assert all(child.training for child in replaced.module.modules())
    state = replaced.module.state_dict()
    assert all(torch.equal(tensor, replaced.before[name]) for name, tensor in state.items())
    assert torch.is_grad_enabled()


# --- wrong ones ---------------------------------------------------------------------------------------------------
class BakedPositions(Plain):
    """Behaves while traced as it never does when run."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            position_ids = position_ids * 0 + torch.arange(input_ids.shape[1])
        return super().embed(input_ids, position_ids)


class BakedLayer(Plain):
    """Its second layer is another one while traced."""

    def apply_block(self, block: nn.ModuleDict, hidden: Tensor, position_ids: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and block is self.blocks[1]:
            hidden = hidden.flip(-1)
        return super().apply_block(block, hidden, position_ids)


@pytest.mark.parametrize(
    ("module", "check", "layer"),
    [
        (BakedPositions(layers=2), "'decode'", "first in layer 0 (, decoders.py:"),
        (BakedLayer(layers=2), "'prefill'", "first in layer 1 (, decoders.py:"),
    ],
    ids=["positions", "second_layer"],
)
def test_a_wrong_graph_is_found_and_no_folder_is_left(module, check, layer, tmp_path):
    with pytest.raises(ParityError) as caught:
        export(module, tmp_path / "bundle", context_length=20)
    sentence = str(caught.value)
    assert f"in the check {check}" in sentence
    assert "position_ids" in sentence
    assert layer in sentence
    assert not list(tmp_path.iterdir())


def test_a_wrong_graph_is_found_in_a_model_that_only_repeats_itself(tmp_path):
    """Over equal tokens attention gives the same, whatever its weights: the text must not be all of one token."""

    class Repeating(TableRope):
        def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
            if torch.compiler.is_exporting():
                position_ids = position_ids * 0
            return super().turn(heads, position_ids)

        def logits(self, hidden: Tensor) -> Tensor:
            return F.linear(hidden, self.token.weight)

    module = Repeating()
    with torch.no_grad():
        greedy = run_greedily(module, [0], 12)
    assert set(greedy) == {0}
    with pytest.raises(ParityError, match="in the check 'prefill'"):
        export(module, tmp_path / "bundle", precision="fp32", context_length=20)


def run_greedily(module: nn.Module, ids: list[int], steps: int) -> list[int]:
    for _ in range(steps):
        positions = torch.arange(len(ids))[None]
        ids = [*ids, int(module(torch.tensor([ids]), positions)[0, -1].argmax())]
    return ids


def test_a_row_that_takes_another_rows_positions_is_found_by_the_batch(tmp_path):
    class FirstRow(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return super().embed(input_ids, position_ids[:1])

    with pytest.raises(ParityError, match="in the check 'batch'"):
        export(FirstRow(), tmp_path / "bundle", precision="fp32", context_length=20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"precision": "int5"}, "precision is 'int5'; it must be one of"),
        ({"graph": "fused", "target": "openvino"}, "use --graph standard, or auto"),
        ({"context_length": None}, "give it with context_length=N"),
    ],
)
def test_unknown_choices_are_refused_before_any_work(settings, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(grafting, "in_contract", None)
    with pytest.raises(InputError) as caught:
        export(Plain(), tmp_path / "bundle", **({"context_length": 8} | settings))
    assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_replacing_keeps_the_old_bundle(tmp_path, monkeypatch):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / names.MANIFEST).write_text("{}")

    def full(model: object, folder: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(bundle_writer, "write_graphs", full)
    with pytest.raises(OSError, match="No space left"):
        export(Plain(heads=1), out, precision="fp32", context_length=8, force=True)
    assert list(tmp_path.iterdir()) == [out]
    assert (out / names.MANIFEST).read_text() == "{}"


def test_a_graph_that_onnxruntime_cannot_run_is_told_and_removed(tmp_path, monkeypatch):
    def spoil(model: ir.Model, context_length: int) -> None:
        for node in model.graph:
            if node.op_type == "GroupQueryAttention":
                node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 1)

    monkeypatch.setattr(grafting, "fuse", spoil)
    with pytest.raises(ParityError, match=r"onnxruntime cannot run the fp32 export of Decoder .*try --graph standard"):
        export(llama(), tmp_path / "bundle", precision="fp32", context_length=40)
    assert list(tmp_path.iterdir()) == []
