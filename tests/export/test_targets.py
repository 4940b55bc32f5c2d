"""The results of an export for each target and format, in float16 and beyond 2 GiB, and where it is proved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import pastkey
from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import ContractError, NumericsError, ParityError, ProviderError
from pastkey.export import bundle_writer, export, ort_format
from pastkey.export.graph.write import embedding_rows
from pastkey.export.resources import parameters
from pastkey.files.memory import available_memory
from pastkey.precisions import PRECISIONS
from pastkey.providers import PROVIDERS
from pastkey.runtime import Engine, load
from pastkey.runtime.providers import placement as providers

from ..shared import divided
from .decoders import Plain, gpt2, llama
from .graft.own.biases import DECODERS as BIASES
from .plain_loop import open_graph


@pytest.mark.parametrize("target", divided(["cuda", "openvino", "webgpu"], quick=["cuda"], ci=["webgpu"]))
def test_a_bundle_for_what_is_not_here_is_proved_on_the_processor_and_says_so(target, tmp_path, monkeypatch):
    monkeypatch.setattr(providers, "available", lambda: [providers.CPU])
    report = export(Plain(), tmp_path / "bundle", target=target, context_length=8)
    assert report.verification.ok
    assert report.manifest.target == target
    assert f"{target} is not on this machine: the bundle is proved there when it is loaded first" in report.warnings
    with pytest.raises(ProviderError, match=f"the bundle was made for {target}; .* is not on this machine; here: cpu"):
        load(tmp_path / "bundle")
    assert load(tmp_path / "bundle", "cpu").generate([1, 2], max_new_tokens=2).ids


def test_a_bundle_is_proved_where_it_is_to_run_with_what_was_given_for_that(tmp_path, monkeypatch):
    proved: list[dict[str, Any]] = []

    class Recorded(Engine):
        def __init__(self, bundle: Bundle, **placement: Any) -> None:
            proved.append(placement | {"target": bundle.manifest.target, "options": bundle.manifest.provider_options})
            super().__init__(bundle, providers="cpu")

    monkeypatch.setattr(bundle_writer, "Engine", Recorded)
    monkeypatch.setattr(providers, "available", lambda: [PROVIDERS["openvino"].name, providers.CPU])
    report = export(
        Plain(), tmp_path / "bundle", precision="fp32", target="openvino", context_length=8, allow_fallback=True,
        provider_options={"device_type": "GPU", "cache_dir": "blobs"},
        session_options=[("session.use_env_allocators", "1")],
    )  # fmt: skip
    assert proved[-1] == {
        "target": "openvino", "options": {"device_type": "GPU", "cache_dir": "blobs"}, "allow_fallback": True,
        "session_options": {"session.use_env_allocators": "1"},
    }  # fmt: skip
    assert report.manifest.provider_options == {"device_type": "GPU"}
    assert any("does not keep the provider options cache_dir" in sentence for sentence in report.warnings)
    assert open_bundle(tmp_path / "bundle").manifest.files.keys() >= {names.GOLDEN}


@pytest.mark.slow
def test_a_portable_bundle_has_onnx_standard_operators_only(tmp_path):
    export(gpt2(), tmp_path / "bundle", precision="fp32", target="portable", context_length=40)
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.manifest.target, bundle.manifest.graph) == ("portable", "standard")
    for path in (bundle.all_logits_graph, bundle.last_logits_graph):
        model = onnx.load(path, load_external_data=False)
        assert {opset.domain for opset in model.opset_import} | {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(path)


@pytest.mark.parametrize("precision", divided(list(PRECISIONS)))
def test_a_soft_capped_decoder_for_webgpu_has_its_cap_in_operators_that_are_right_there(precision, tmp_path):
    capped = BIASES["soft_cap"].make()
    report = export(capped, tmp_path / "bundle", precision=precision, target="webgpu", context_length=8)
    assert report.manifest.graph == "standard"
    assert report.manifest.graph_reason == "GroupQueryAttention does not support softcap, which webgpu ignores"
    assert "GroupQueryAttention" not in report.manifest.operators
    with pytest.raises(ContractError, match="the fused graph does not support softcap, which webgpu ignores"):
        export(capped, tmp_path / "other", target="webgpu", graph="fused", context_length=8)


class Beyond(Plain):
    """Its hidden state is beyond float16, and its logits are not."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(input_ids, position_ids) * 1e5 * 1e-5


def test_float16_that_overflows_is_refused_though_the_processor_does_not_see_it(tmp_path):
    with pytest.raises(NumericsError, match=r"the value \w+ reaches [\d.e+]+, and float16 ends at 65,504: export with"):
        export(Beyond(), tmp_path / "bundle", precision="fp16", context_length=8)
    assert not list(tmp_path.iterdir())


CONTEXT = 40


def test_the_ort_file_is_one_and_lists_its_operators(tmp_path, monkeypatch):
    """tests/conformance runs it."""
    monkeypatch.setattr(embedding_rows, "_LARGE", 1)  # so that the int8 graph is handed the embedding's rows
    export(llama(), tmp_path / "bundle", context_length=CONTEXT, format="ort")
    bundle = open_bundle(tmp_path / "bundle", verify=True)
    assert {names.ORT_GRAPH, names.ORT_OPERATORS} <= set(bundle.manifest.files)
    assert not [*bundle.path.glob(".*"), *bundle.path.glob("onnx/ort_source*")]
    listed = (bundle.path / names.ORT_OPERATORS).read_text(encoding="utf-8")
    assert "com.microsoft;1;GroupQueryAttention,MatMulNBits," in listed
    assert str(tmp_path) not in listed
    alone = open_graph(Path(shutil.copy(bundle.path / names.ORT_GRAPH, tmp_path / "alone.ort")))
    assert names.EMBEDDING_ROWS not in [value.name for value in alone.get_inputs()]


LOGITS = ort_format._logits
BROKEN: dict[str, tuple[str, object, str]] = {
    "it computes something else": (
        "_logits", lambda one, ids: (1.001 if isinstance(one, ort_format.OrtBundle) else 1) * LOGITS(one, ids),
        r"in the ORT format of pastkey\.onnx logits differ by .*e-0.* of the largest logit \(limit 1e-05\)",
    ),
    "the conversion fails": (
        "_TOOL", "onnxruntime.tools.no_such_tool", r"cannot write the graph in its ORT format \(.*no_such_tool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", divided(BROKEN, quick=["the conversion fails"], ci=["it computes something else"]))
def test_an_ort_file_that_is_not_right_is_refused_and_leaves_nothing(broken, tmp_path, monkeypatch):
    name, value, sentence = BROKEN[broken]
    monkeypatch.setattr(ort_format, name, value)
    with pytest.raises(ParityError, match=sentence):
        export(Plain(), tmp_path / "bundle", precision="fp32", context_length=CONTEXT, format="ort")
    assert not list(tmp_path.iterdir())


@pytest.mark.matrix
def test_a_model_over_2_gib_is_exported_and_runs(tmp_path):
    if (free := available_memory()) is not None and free < 13e9:
        pytest.skip(f"{free / 1e9:.0f} GB of memory are available, 13 are needed")
    module = Plain(vocab=290_000, width=1024, heads=8, size=16, context=32)
    assert 4 * parameters(module) > 2.2 * 2**30
    report = export(module, tmp_path / "bundle", precision="fp32", context_length=32)
    assert report.manifest.parity["fp32"]["ok"]
    graph, data = tmp_path / "bundle" / "onnx" / "model.onnx", tmp_path / "bundle" / "onnx" / "model.onnx_data"
    assert graph.stat().st_size < 1 << 20
    assert data.stat().st_size > 2.2 * 2**30
    ids = [7, 289_999, 12_345]
    with torch.no_grad():
        expected = module(torch.tensor([ids]), torch.arange(3)[None])[0, -1].argmax()
    assert pastkey.load(tmp_path / "bundle").generate(ids, max_new_tokens=1).ids == [int(expected)]
