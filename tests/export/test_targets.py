"""What an export makes for each target and in float16, and where it is proved."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from torch import Tensor

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import ContractError, NumericsError, ProviderError
from pastkey.export import bundle_writer, export
from pastkey.precisions import PRECISIONS
from pastkey.providers import PROVIDERS
from pastkey.runtime import Engine, load
from pastkey.runtime.providers import placement as providers

from ..shared import divided
from .decoders import Plain, gpt2
from .graft.own.biases import DECODERS as BIASES


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
    assert report.manifest.graph_reason == "GroupQueryAttention cannot take softcap, which webgpu ignores"
    assert "GroupQueryAttention" not in report.manifest.operators
    with pytest.raises(ContractError, match="the fused graph cannot take softcap, which webgpu ignores"):
        export(capped, tmp_path / "other", target="webgpu", graph="fused", context_length=8)


class Beyond(Plain):
    """Its hidden state is beyond float16, and its logits are not."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(input_ids, position_ids) * 1e5 * 1e-5


def test_float16_that_overflows_is_refused_though_the_processor_does_not_see_it(tmp_path):
    with pytest.raises(NumericsError, match=r"the value \w+ reaches [\d.e+]+, and float16 ends at 65,504: export with"):
        export(Beyond(), tmp_path / "bundle", precision="fp16", context_length=8)
    assert not list(tmp_path.iterdir())
