"""--quick: weights rounded to nearest, and a short proof within the limits of a long one."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.contract.bundle import FORMAT_VERSION, open_bundle
from pastkey.errors import ParityError
from pastkey.export import bundle_writer, export
from pastkey.export.measure.paths import SHORT_DECODE, SHORT_PREFILL
from pastkey.export.measure.verify import verify
from pastkey.export.quantize.int4 import rounded_to_nearest
from pastkey.export.quantize.rounding import int4_blocks
from pastkey.export.quantize.rounding.rewrite import quantize
from pastkey.precisions import PRECISIONS

from ..decoders import llama
from ..plain_loop import run_chunks

CONTEXT = 80


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", pytest.param("int4", marks=pytest.mark.matrix)])
def test_a_quick_bundle_is_proved_and_says_what_it_is(precision, tmp_path, capsys):
    module = llama(max_position_embeddings=CONTEXT)
    report = export(module, tmp_path / "bundle", precision, context_length=CONTEXT, quick=True)
    bundle = open_bundle(report.path, verify=True)
    manifest = bundle.manifest
    assert manifest.quick
    assert json.loads((report.path / names.MANIFEST).read_text())["format_version"] == FORMAT_VERSION
    assert (report.path / names.GOLDEN).is_file()
    parity = manifest.parity["fp32"]
    assert parity["ok"]
    assert parity["reference"] == "source"
    assert parity["tokens"] == SHORT_PREFILL + SHORT_DECODE
    assert {check["limit"] for name, check in parity["checks"].items() if name != "greedy"} == {1e-5}
    assert manifest.parity[precision]["kl_divergence"] <= PRECISIONS[precision].max_kl
    assert manifest.quality["tokens"] == SHORT_PREFILL + SHORT_DECODE
    capsys.readouterr()
    assert main(["inspect", str(report.path)]) == 0
    assert "exported with --quick: " in capsys.readouterr().out
    assert verify(bundle, module).ok  # the whole proof, of a text that the export did not see


def test_a_quick_int8_graph_is_the_float32_graph_rounded_as_it_is(exported, tmp_path):
    report = export(llama(), tmp_path / "bundle", context_length=40, quick=True)
    fp32 = exported("llama").bundle.all_logits_graph
    model = ir.load(fp32)
    quantize(model)
    ir.save(model, tmp_path / "expected.onnx", external_data="expected.data")
    ids = np.random.default_rng(0).integers(0, 60, 30).tolist()
    graph = report.path / PRECISIONS["int8"].graph
    np.testing.assert_array_equal(run_chunks(graph, [ids]), run_chunks(tmp_path / "expected.onnx", [ids]))


def test_rounding_to_nearest_is_gptq_of_inputs_that_are_all_alike(exported):
    model = ir.load(exported("llama").bundle.all_logits_graph)
    for name, found in rounded_to_nearest(model).items():
        stored = model.graph.initializers[name].const_value
        assert stored is not None
        matrix = stored.numpy().T
        alike = np.eye(matrix.shape[1], dtype=np.float32)
        expected = int4_blocks.Gptq(alike).round(matrix, found.block_size).blocks
        np.testing.assert_array_equal(found.data, expected.data)
        np.testing.assert_array_equal(found.scale_codes, expected.scale_codes)


def test_a_graph_that_decodes_wrongly_fails_the_short_proof(tmp_path, monkeypatch):
    def spoilt(model: ir.Model, *arguments: object) -> int:
        weight = next(v for name, v in model.graph.initializers.items() if name.endswith("o_proj.weight"))
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.001)
        return write(model, *arguments)  # type: ignore[arg-type]

    write = bundle_writer.write_graphs
    monkeypatch.setattr(bundle_writer, "write_graphs", spoilt)
    with pytest.raises(ParityError, match="prefill"):
        export(llama(), tmp_path / "bundle", "fp32", context_length=40, quick=True)
    assert not list(tmp_path.iterdir())
