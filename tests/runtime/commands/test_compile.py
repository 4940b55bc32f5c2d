"""Compiling and signing a bundle: written files, and refusals. The real compilation is in tests/programs."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from pastkey.contract.bundle import Compiled, open_bundle
from pastkey.contract.names import SIGNATURE
from pastkey.errors import InputError, ProviderError
from pastkey.precisions import PRECISIONS
from pastkey.runtime.commands.compile import compile_bundle
from pastkey.runtime.engine import decoder_graph
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.model.signature import require_signature
from pastkey.runtime.providers import placement

UNKNOWN_FIELD = b"\xf8\x07\x01"  # number 127: makes another graph of one
QNN = {"backend_type": "htp", "htp_arch": "75", "soc_model": "57"}


@pytest.fixture
def static(make_bundle, tiny):
    """static(**FIELDS): a small static bundle."""
    return lambda **fields: make_bundle(type(tiny).random([(8, 8)], 24), "static", chunk=4, **fields)


@pytest.fixture
def opened(monkeypatch):
    """The arguments of each opened session, on a device that writes its binaries as onnxruntime does."""
    calls = []

    def open_session(path, manifest, **given):
        calls.append({"path": path.name, **given})
        target = Path(given["session_options"]["ep.context_file_path"])
        target.write_bytes(path.read_bytes() + UNKNOWN_FIELD)
        target.with_name(f"{target.stem}_qnn.bin").write_bytes(b"binary")

    monkeypatch.setattr("pastkey.runtime.providers.open.open_session", open_session)
    monkeypatch.setattr("pastkey.runtime.engine.engine.Engine", lambda bundle, **placement: bundle)
    monkeypatch.setattr("pastkey.runtime.engine.golden.require_golden", lambda engine, bundle: None)
    monkeypatch.setattr(placement, "available", lambda: ["QNNExecutionProvider", "CPUExecutionProvider"])
    return calls


def test_static_graphs_are_compiled_and_everything_else_stays(static, opened, tmp_path, capsys):
    """An option that no bundle may set is used and not kept."""
    bundle, given = static(), {"htp_arch": "73", "backend_path": "libQnnHtp.so"}
    made = compile_bundle(bundle.path, tmp_path / "out", "qnn", given, {"ep.share_ep_contexts": "0"})
    assert "does not keep the provider options backend_path" in capsys.readouterr().err
    assert [call["path"] for call in opened] == ["pastkey_decode.onnx", "pastkey_prefill.onnx"]
    for call in opened:
        assert call["providers"] == ("QNNExecutionProvider", QNN | given)
        assert call["session_options"]["ep.context_enable"] == "1"
        assert call["session_options"]["ep.share_ep_contexts"] == "0"
    assert (made.manifest.compiled.provider, made.manifest.compiled.options) == ("qnn", QNN | {"htp_arch": "73"})
    assert open_bundle(tmp_path / "out", verify=True).manifest == made.manifest
    assert made.static_graphs[0].read_bytes() == bundle.static_graphs[0].read_bytes() + UNKNOWN_FIELD
    common = PRECISIONS["fp32"].graph
    assert (made.path / common).read_bytes() == (bundle.path / common).read_bytes()


def test_the_chip_that_the_bundle_was_made_for_is_compiled_for(static, opened, tmp_path):
    given = {"htp_arch": "73"}
    made = compile_bundle(static(target="qnn", provider_options=given).path, tmp_path / "out")
    assert made.manifest.compiled.options == QNN | given


def test_a_bundle_of_another_target_is_opened_on_the_provider_that_compiled_it(static, opened, tmp_path, monkeypatch):
    asked, open_on_cpu = [], decoder_graph.open_session

    def on_cpu(path, manifest, providers, **given):
        asked.append(placement.for_bundle(manifest, providers).providers)
        manifest = dataclasses.replace(manifest, target="cpu", compiled=None)
        return open_on_cpu(path, manifest, providers=None, **given)

    monkeypatch.setattr(decoder_graph, "open_session", on_cpu)
    monkeypatch.setattr("pastkey.runtime.engine.engine.Engine", Engine)
    monkeypatch.setattr(placement, "available", lambda: ["OpenVINOExecutionProvider", "CPUExecutionProvider"])
    made = compile_bundle(static(target="qnn").path, tmp_path / "out", "openvino", {"device_type": "GPU"})
    proof = len(asked)
    Engine(open_bundle(made.path), threads=1)
    assert asked == [(("OpenVINOExecutionProvider", {"device_type": "GPU"}),)] * proof * 2 != []
    with pytest.raises(ProviderError, match=r"was compiled for openvino .* and 'qnn' was asked for"):
        Engine(open_bundle(made.path), providers="qnn")


def test_what_fails_is_told_and_leaves_nothing(static, opened, tmp_path, monkeypatch):
    def fails(*given, **placement):
        raise ProviderError("cannot load; compile it again") from RuntimeError("EP_FAIL")

    monkeypatch.setattr("pastkey.runtime.engine.engine.Engine", fails)
    with pytest.raises(ProviderError, match=r"'qnn' cannot load its compiled graph \(EP_FAIL\): use the bundle"):
        compile_bundle(static().path, tmp_path / "out", "qnn")
    monkeypatch.setattr("pastkey.runtime.providers.open.open_session", lambda path, manifest, **given: None)
    with pytest.raises(ProviderError, match="'qnn' writes no context binary"):
        compile_bundle(static().path, tmp_path / "out", "qnn")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_compiled_is_refused(static, fused_bundle, opened, tmp_path):
    bundle, out = static().path, tmp_path / "out"
    compiled = compile_bundle(bundle, tmp_path / "compiled", "qnn").path
    for arguments, words in (
        ((fused_bundle.path, out, "qnn"), "has a fused graph, whose sizes change: export the model with --target qnn"),
        ((bundle, out), "the CPU compiles nothing"),
        ((bundle, bundle, "qnn"), "is the bundle to compile, and would be replaced: choose another --out"),
        ((bundle, out, "qnn", None, {"ep.context_embed_mode": "1"}), "keeps its context binaries next to the graphs"),
        ((compiled, out, "qnn"), r"is compiled already, for qnn \(.*htp_arch=75.*\)"),
    ):
        with pytest.raises(InputError, match=words):
            compile_bundle(*arguments)


def test_a_context_binary_is_opened_where_it_was_compiled_for_or_refused(monkeypatch):
    monkeypatch.setattr(placement, "available", lambda: ["QNNExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="was compiled for npu9"):
        placement.for_compiled("qnn", Compiled("npu9", {}, "1.32.0"))
    compiled = Compiled("qnn", QNN, "1.32.0")
    for choice in (None, "qnn", "QNNExecutionProvider", ["qnn"], ("qnn", {"soc_model": 57})):
        found = placement.for_compiled(choice, compiled)
        assert (found[0], found[1]["htp_arch"]) == ("qnn", "75")
    more = placement.for_compiled(("qnn", {"rpc_control_latency": "9"}), compiled)
    assert more == ("qnn", QNN | {"rpc_control_latency": "9"})
    for wrong, asked in (("cpu", "'cpu'"), (("qnn", {"htp_arch": "73"}), "htp_arch=73"), (["openvino"], "'openvino'")):
        with pytest.raises(ProviderError, match=rf"was compiled for qnn .* 1\.32\.0, and {asked} was"):
            placement.for_compiled(wrong, compiled)


def test_a_key_is_made_and_signs(talking, tmp_path, command):
    pytest.importorskip("cryptography")
    folder, key = shutil.copytree(talking, tmp_path / "bundle"), tmp_path / "me.pem"
    status, out, err = command("sign", folder, "--new-key", key)
    assert (status, out) == (0, "")
    assert f"{key}: keep it private; {tmp_path / 'me.pub.pem'} is for those who verify" in err
    assert f"{folder / SIGNATURE}: signed" in err
    require_signature(folder, tmp_path / "me.pub.pem")
    assert command("sign", folder, "--key", key)[0] == 0
