"""Compiling a static bundle: what is written, what is refused. The real compilation is in tests/programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pastkey.contract.bundle import Bundle, Compiled, open_bundle
from pastkey.errors import InputError, ProviderError
from pastkey.precisions import PRECISIONS
from pastkey.runtime.commands.compile import compile_bundle
from pastkey.runtime.engine import decoder_graph
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.providers import placement

MakeBundle = Callable[..., Bundle]
UNKNOWN_FIELD = b"\xf8\x07\x01"  # number 127: makes another graph of one
QNN = {"backend_type": "htp", "htp_arch": "75", "soc_model": "57"}


@pytest.fixture
def static(make_bundle, tiny):
    return make_bundle(type(tiny).random([(8, 8)], 24), "static", chunk=4)


@pytest.fixture
def opened(monkeypatch):
    """What each session was opened with, on a device that writes its binaries as onnxruntime does."""
    calls: list[dict[str, Any]] = []

    def open_session(path: Path, manifest: Any, **given: Any) -> None:
        calls.append({"path": path.name, **given})
        target = Path(given["session_options"]["ep.context_file_path"])
        target.write_bytes(path.read_bytes() + UNKNOWN_FIELD)
        target.with_name(f"{target.stem}_qnn.bin").write_bytes(b"binary")

    monkeypatch.setattr("pastkey.runtime.providers.open.open_session", open_session)
    monkeypatch.setattr("pastkey.runtime.engine.engine.Engine", lambda bundle, **placement: bundle)
    monkeypatch.setattr("pastkey.runtime.engine.golden.require_golden", lambda engine, bundle: None)
    monkeypatch.setattr(placement, "available", lambda: ["QNNExecutionProvider", "CPUExecutionProvider"])
    return calls


def test_static_graphs_are_compiled_and_everything_else_stays(static, opened, tmp_path):
    made = compile_bundle(static.path, tmp_path / "out", "qnn", {"htp_arch": "73"}, {"ep.share_ep_contexts": "0"})
    assert [call["path"] for call in opened] == ["pastkey_decode.onnx", "pastkey_prefill.onnx"]
    for call in opened:
        assert call["providers"] == ("QNNExecutionProvider", QNN | {"htp_arch": "73"})
        assert call["session_options"]["ep.context_enable"] == "1"
        assert call["session_options"]["ep.share_ep_contexts"] == "0"
    assert made.manifest.compiled is not None
    assert (made.manifest.compiled.provider, made.manifest.compiled.options["htp_arch"]) == ("qnn", "73")
    assert open_bundle(tmp_path / "out", verify=True).manifest == made.manifest
    assert made.static_graphs[0].read_bytes() == static.static_graphs[0].read_bytes() + UNKNOWN_FIELD
    common = PRECISIONS["fp32"].graph
    assert (made.path / common).read_bytes() == (static.path / common).read_bytes()


def test_the_chip_that_the_bundle_was_made_for_is_compiled_for(make_bundle, tiny, opened, tmp_path):
    small, given = type(tiny).random([(8, 8)], 24), {"htp_arch": "73"}
    bundle = make_bundle(small, "static", chunk=4, target="qnn", provider_options=given)
    made = compile_bundle(bundle.path, tmp_path / "out")
    assert made.manifest.compiled is not None
    assert made.manifest.compiled.options == QNN | given


def test_a_bundle_of_another_target_is_proved_and_opened_on_the_provider_that_compiled_it(
    make_bundle, tiny, opened, tmp_path, monkeypatch
):
    asked: list[Any] = []
    open_on_cpu = decoder_graph.open_session

    def on_cpu(path: Path, manifest: Any, providers: Any, **given: Any) -> Any:
        asked.append(placement.for_bundle(manifest, providers).providers)
        manifest = dataclasses.replace(manifest, target="cpu", compiled=None)
        return open_on_cpu(path, manifest, providers=None, **given)

    monkeypatch.setattr(decoder_graph, "open_session", on_cpu)
    monkeypatch.setattr("pastkey.runtime.engine.engine.Engine", Engine)
    monkeypatch.setattr(placement, "available", lambda: ["OpenVINOExecutionProvider", "CPUExecutionProvider"])
    bundle = make_bundle(type(tiny).random([(8, 8)], 24), "static", chunk=4, target="qnn")
    made = compile_bundle(bundle.path, tmp_path / "out", "openvino", {"device_type": "GPU"})
    proof = len(asked)
    Engine(open_bundle(made.path), threads=1)
    assert proof
    assert asked == [(("OpenVINOExecutionProvider", {"device_type": "GPU"}),)] * proof * 2
    with pytest.raises(ProviderError, match=r"was compiled for openvino .* and 'qnn' was asked for"):
        Engine(open_bundle(made.path), providers="qnn")


def test_an_option_that_no_bundle_may_set_is_used_and_not_kept(static, opened, tmp_path, capsys):
    given = {"htp_arch": "73", "backend_path": "libQnnHtp.so"}
    made = compile_bundle(static.path, tmp_path / "out", "qnn", given)
    assert all(one["providers"][1]["backend_path"] == "libQnnHtp.so" for one in opened)
    assert made.manifest.compiled is not None
    assert made.manifest.compiled.options == QNN | {"htp_arch": "73"}
    assert "does not keep the provider options backend_path" in capsys.readouterr().err


def test_what_fails_is_told_and_leaves_nothing(static, opened, tmp_path, monkeypatch):
    def fails(*given: Any, **placement: Any) -> None:
        raise ProviderError("cannot load; compile it again") from RuntimeError("EP_FAIL")

    monkeypatch.setattr("pastkey.runtime.engine.engine.Engine", fails)
    with pytest.raises(ProviderError, match=r"'qnn' cannot load what it compiled \(EP_FAIL\): use the bundle as it is"):
        compile_bundle(static.path, tmp_path / "out", "qnn")
    monkeypatch.setattr("pastkey.runtime.providers.open.open_session", lambda path, manifest, **given: None)
    with pytest.raises(ProviderError, match="'qnn' writes no context binary"):
        compile_bundle(static.path, tmp_path / "out", "qnn")
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[Any, str]] = {
    "a fused graph": (
        lambda bundle, fused, out: compile_bundle(fused, out, "qnn"),
        "has a fused graph, whose sizes change: export the model with --target qnn",
    ),
    "for the CPU": (lambda bundle, fused, out: compile_bundle(bundle, out), "the CPU compiles nothing"),
    "into itself": (
        lambda bundle, fused, out: compile_bundle(bundle, bundle, "qnn", force=True),
        "is what is to be compiled, and would be replaced: choose another --out",
    ),
    "binaries in the graph": (
        lambda bundle, fused, out: compile_bundle(bundle, out, "qnn", None, {"ep.context_embed_mode": "1"}),
        "keeps its context binaries beside the graphs",
    ),
    "twice": (
        lambda bundle, fused, out: compile_bundle(compile_bundle(bundle, out, "qnn").path, out / "again", "qnn"),
        r"is compiled already, for qnn \(.*htp_arch=75.*\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused(static, fused_bundle, opened, tmp_path, case):
    compiled, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        compiled(static.path, fused_bundle.path, tmp_path / "out")


def test_a_context_binary_is_opened_where_it_was_compiled_for_or_refused(monkeypatch):
    monkeypatch.setattr(placement, "available", lambda: ["QNNExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="was compiled for npu9"):
        placement.for_compiled("qnn", Compiled("npu9", {}, "1.32.0"))
    compiled = Compiled("qnn", QNN, "1.32.0")
    right: list[Any] = [None, "qnn", "QNNExecutionProvider", ["qnn"], ("qnn", {"soc_model": 57})]
    for choice in right:
        name, options = cast("tuple[str, dict[str, str]]", placement.for_compiled(choice, compiled))
        assert (name, options["htp_arch"]) == ("qnn", "75")
    more = placement.for_compiled(("qnn", {"rpc_control_latency": "9"}), compiled)
    assert more == ("qnn", QNN | {"rpc_control_latency": "9"})
    wrong: list[Any] = ["cpu", ("qnn", {"htp_arch": "73"}), ["openvino"]]
    for choice, asked in zip(wrong, ("'cpu'", "htp_arch=73", "'openvino'"), strict=True):
        with pytest.raises(ProviderError, match=rf"was compiled for qnn .* 1\.32\.0, and {asked} was"):
            placement.for_compiled(choice, compiled)
