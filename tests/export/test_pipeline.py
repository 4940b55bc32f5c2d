"""From a module to a bundle: odd decoders give right ones, wrong decoders give none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ParityError
from pastkey.export import export, grafting
from pastkey.export.bundle_writer import MIN_ONNXRUNTIME
from pastkey.export.measure.metrics import kl_divergence
from pastkey.export.measure.paths import compared_text
from pastkey.runtime import Engine

from ..loopback_hub import read_files
from ..shared import divided
from .cases import CASES
from .decoders import NanoGpt, Plain, TableRope, llama
from .plain_loop import run_chunks

# name, precision, graph. tests/conformance has all paths through the graphs; these are about odd decoders.
ODD = ("head_size_10_context_11", "three_axes", "one_block_twice", "multi_query_repeated_by_hand")
EXPORTS = [(name, "fp32", "auto") for name in CASES]
EXPORTS += [(name, "fp32", "standard") for name, case in CASES.items() if case.graph == "fused"]
EXPORTS += [(name, "int8", "auto") for name in CASES]
NOT_IN_CI = ("both_positions", "compiled", "data_parallel", "encoder_layers", "multi_head_attention")
IN_CI = [(name, "fp32", "auto") for name in CASES if name not in NOT_IN_CI]
IN_CI += [("nano_gpt", "int8", "auto"), ("vocabulary_of_one", "int8", "auto")]


@pytest.mark.parametrize(
    ("name", "precision", "graph"), divided(EXPORTS, quick=[(name, "fp32", "auto") for name in ODD], ci=IN_CI)
)
def test_a_decoder_of_any_shape_is_exported_as_it_computes(name, precision, graph, exported):
    made, case = exported(name, precision, graph), CASES[name]
    assert made.bundle.manifest.graph == (case.graph if graph == "auto" else graph)
    assert made.report.verification.ok
    ids = np.random.default_rng(1).integers(0, made.bundle.manifest.vocab_size, case.context).tolist()
    expected = made.torch_logits(ids)
    found = run_chunks(made.bundle.all_logits_graph, [ids[: case.context // 2], ids[case.context // 2 :]])
    tolerance = 1e-5 if precision == "fp32" else 0.1
    assert np.abs(found - expected).max() <= tolerance * max(float(np.abs(expected).max()), 1e-6)


def test_a_block_applied_twice_is_stored_once(exported):
    made = exported("one_block_twice")
    parameters = {name: p for name, p in made.module.named_parameters() if not name.startswith(("position", "head"))}
    needed = sum(p.numel() for p in parameters.values()) * 4 + (made.module.cos.numel() * 2) * 4
    assert len(made.bundle.manifest.layers) == 2
    assert needed <= made.report.weight_bytes <= needed + 1024  # and a few constants
    stored = sum(file.stat().st_size for file in (made.bundle.path / "onnx").glob("*_data"))
    assert stored <= needed + 1024


# --- the report and the manifest ----------------------------------------------------------------------------------
def test_the_manifest_records_what_was_measured_of_the_two_models(exported):
    made = exported("llama", "int8")
    manifest = made.bundle.manifest
    checks = {"prefill", "decode", "chunks_of_7", "chunks_of_64", "batch", "greedy"}
    parities = manifest.parity
    assert {precision: set(parity["checks"]) for precision, parity in parities.items()} == {
        "fp32": checks, "int8": checks | {"float32"},
    }  # fmt: skip
    assert {(parity["ok"], parity["tokens"]) for parity in parities.values()} == {(True, 40)}
    assert [parities[name]["reference"] for name in ("fp32", "int8")] == ["source", "own uncached run"]
    for check in parities["fp32"]["checks"].values():
        if check["measure"] == "max_relative_difference":
            assert 0 <= check["value"] <= check["limit"] == 1e-5
    assert 0 < manifest.quality["kl_divergence"] < 0.05
    assert 0.5 < manifest.quality["top1_agreement"] <= 1
    assert manifest.quality["text"] == "own"
    verified = made.report.verification.quality
    assert {key: parities["int8"][key] for key in verified} == verified
    ids = compared_text(Engine(made.bundle), 40).tolist()
    assert len(ids) == 40
    assert len(set(ids)) > 10
    found = kl_divergence(made.torch_logits(ids), run_chunks(made.bundle.all_logits_graph, [ids]))
    assert found == pytest.approx(parities["int8"]["kl_divergence"], rel=0.01)


def test_the_manifest_says_what_the_graph_is(exported):
    made = exported("head_size_10_context_11")
    manifest, graph = made.bundle.manifest, made.graph()
    assert manifest.source == "Plain"
    assert manifest.graph_reason == "GroupQueryAttention does not support a head size of 10, not a multiple of 8"
    assert manifest.proved == manifest.context_length
    assert (manifest.vocab_size, manifest.context_length) == (37, 11)
    assert manifest.opset == next(o.version for o in graph.opset_import if o.domain == "")
    assert manifest.ir_version == graph.ir_version
    assert manifest.min_onnxruntime == MIN_ONNXRUNTIME
    operators = [node.op_type for node in graph.graph.node]
    assert dict(manifest.operators) == {name: operators.count(name) for name in set(operators)}


def test_the_folder_holds_the_files_of_the_manifest_and_nothing_else(exported):
    bundle = exported("llama", "int8").bundle
    found = read_files(bundle.path).keys()
    assert found == {*bundle.manifest.files, names.MANIFEST}
    assert found == {
        "pastkey.json", "config.json", "generation_config.json", "genai_config.json", "golden_logits.npz",
        "onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data", "onnx/pastkey.onnx", "onnx/pastkey_native.onnx",
    }  # fmt: skip
    assert list(bundle.path.parent.iterdir()) == [bundle.path]


def test_force_replaces_a_bundle_whatever_its_name_and_leaves_the_module_as_it_was(tmp_path):
    out = tmp_path / "größer & 50 %"
    out.mkdir()
    (out / names.MANIFEST).write_text("{}")
    (out / "old.txt").write_text("")
    module = NanoGpt(layers=1).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export(module, out, context_length=32, force=True)
    assert open_bundle(out, verify=True).manifest.context_length == 32
    assert not (out / "old.txt").exists()
    assert [*tmp_path.iterdir()] == [out]
    assert all(child.training for child in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
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


class Repeating(TableRope):
    """Repeats one token: over equal tokens attention gives the same, whatever its weights."""

    def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            position_ids = position_ids * 0
        return super().turn(heads, position_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.token.weight)


class FirstRow(Plain):
    """Its rows have the positions of the first."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().embed(input_ids, position_ids[:1])


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (BakedPositions(layers=2), ("in the check 'decode'", "position_ids")),
        (BakedLayer(layers=2), ("in the check 'prefill'", "position_ids")),
        (Repeating(), ("in the check 'prefill'",)),
        (FirstRow(), ("in the check 'batch'",)),
    ],
    ids=["positions", "second layer", "repeating", "positions of another row"],
)
def test_a_wrong_graph_is_found_and_no_folder_is_left(module, words, tmp_path):
    with pytest.raises(ParityError) as caught:
        export(module, tmp_path / "bundle", precision="fp32", context_length=20)
    assert all(word in str(caught.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_onnxruntime_cannot_run_is_told_and_removed(tmp_path, monkeypatch):
    def spoil(model: ir.Model, context_length: int) -> None:
        for node in model.graph:
            if node.op_type == "GroupQueryAttention":
                node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 1)

    monkeypatch.setattr(grafting, "fuse", spoil)
    with pytest.raises(ParityError, match=r"onnxruntime cannot run the fp32 export of Decoder .*try --graph standard"):
        export(llama(), tmp_path / "bundle", precision="fp32", context_length=40)
    assert list(tmp_path.iterdir()) == []
