"""What stands between a bundle's files and a session that runs: versions, providers, links, and the manifest's word."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry, open_bundle
from pastkey.errors import InputError, IntegrityError, MissingExtraError, ProviderError, StartError
from pastkey.runtime import Engine
from pastkey.runtime.providers import open as opening
from pastkey.runtime.providers import ort
from pastkey.runtime.providers import placement as ep
from pastkey.runtime.providers.inference import OrtSession, RunFailedError
from pastkey.runtime.providers.open import default_threads
from pastkey.values import parse_version

from ..links import linked_to_blobs


def with_manifest(bundle, **fields):
    return replace(bundle, manifest=replace(bundle.manifest, **fields))


def head_size_of_the_last(manifest):
    return {"layers": (manifest.layers[0], KVGeometry(2, 16, 24))}


OTHER = {  # the manifest's fields, the error and its words
    "another head size": (
        head_size_of_the_last, IntegrityError,
        r"'past_key_values.1.value' is \(B, 2, P1, 16\).*\(batch_size, 2, past_sequence_length, 24\) in the manifest",
    ),
    "another vocabulary": (
        lambda m: {"vocab_size": 38}, IntegrityError, r"'logits' is \(B, N, 37\) .*\(batch_size, sequence_length, 38\)"
    ),
    "fewer layers": (lambda m: {"layers": m.layers[:1]}, IntegrityError, r"has the tensor '(present|past_key_values)"),
    "more layers": (lambda m: {"layers": m.layers * 2}, IntegrityError, r"has no tensor '(present|past_key_values)"),
    "a newer onnxruntime": (
        lambda m: {"min_onnxruntime": "99.1.0"}, MissingExtraError,
        r"needs onnxruntime 99\.1\.0.*pip install --upgrade onnxruntime",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_a_manifest_of_another_graph_is_refused(bundle, name):
    change, error, words = OTHER[name]
    with pytest.raises(error, match=words):
        Engine(with_manifest(bundle, **change(bundle.manifest)))


def test_another_graph_file_is_refused(bundle, tmp_path):
    copy = shutil.copytree(bundle.path, tmp_path / "b")
    for content, words in (
        (b"no graph at all", r"onnxruntime .* cannot load .*pastkey\.onnx"),
        (bundle.all_logits_graph.read_bytes(), r"pastkey\.onnx has no tensor 'logits_start'"),
    ):
        (copy / names.LAST_LOGITS_GRAPH).write_bytes(content)
        with pytest.raises(IntegrityError, match=words):
            Engine(replace(bundle, path=copy))
    (copy / "onnx" / "further.onnx").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"further\.onnx is not listed in pastkey\.json"):
        open_bundle(copy)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_path_that_is_no_text_is_told(fused_bundle, tmp_path):
    copy = shutil.copytree(fused_bundle.path, tmp_path / os.fsdecode(b"b\xff"))
    with pytest.raises(InputError, match="is not UTF-8, and onnxruntime takes no other path: rename the folder"):
        Engine(open_bundle(copy))


WEBGPU_FAILS = ort.OrtError[0]("Failed to finalize the graph. Code: 1002\nat line 7")
FAILED_STARTS = [  # the bundle's target, the provider, what onnxruntime raises, the error and its words
    ("webgpu", "webgpu", WEBGPU_FAILS, ProviderError,
     r"Code: 1002; export the model again if an older pastkey wrote this bundle, or take the provider 'cpu'$"),
    ("cpu", "webgpu", WEBGPU_FAILS, ProviderError,
     "Code: 1002; export the model again with --target webgpu, or take the provider 'cpu'$"),
    ("cpu", "webgpu", RuntimeError("No supported adapters"), StartError,
     "could not start the execution provider 'webgpu'.*; ask for one .*: cpu"),
    ("cpu", "cpu", ort.OrtError[0]("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : initialization: std::bad_alloc"),
     MemoryError, r"too little memory to load .*pastkey\.onnx: .*bad_alloc"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "provider", "raised", "error", "words"), FAILED_STARTS)
def test_a_session_that_cannot_be_made_is_refused_with_a_remedy(
    standard_bundle, monkeypatch, target, provider, raised, error, words
):
    def fails(*_, **__):
        raise raised

    monkeypatch.setattr(ep, "available", lambda: ["WebGpuExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(opening, "OrtSession", fails)
    with pytest.raises(error, match=words):
        Engine(with_manifest(standard_bundle, target=target), providers=provider)


def test_threads(bundle):
    session = Engine(bundle, threads=2)
    assert session.graph.threads == session.onnx.get_session_options().intra_op_num_threads == 2
    assert Engine(bundle).graph.threads == default_threads()
    for threads in (0, -1, 100_000):
        with pytest.raises(InputError, match=f"threads is {threads}; it must be 1 to "):
            Engine(bundle, threads=threads)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_download_cache_of_links_is_loaded(tiny, make_bundle, tmp_path, monkeypatch, in_memory):
    """Weights beside the graph. onnxruntime 1.24.1 is handed the weights in memory, as the others can be."""
    if in_memory:
        monkeypatch.setattr(opening, "REFUSE_LINKS", {parse_version(ort.onnxruntime.__version__)})
    source = make_bundle(tiny, "fused", data_file=names.weights_file("model.onnx"))
    bundle = open_bundle(linked_to_blobs(source.path, tmp_path), verify=True)
    ids = [3, 1, 4, 1, 5]
    found = Engine(bundle, graph="all_logits", threads=1).forward([ids])[0]
    np.testing.assert_allclose(found, tiny(ids), atol=1e-4)


def test_operators_are_counted_by_provider(fused_bundle, tmp_path):
    """By onnxruntime's own record, which it keeps on request."""
    recorded = Engine(fused_bundle, threads=1, profile_prefix=tmp_path / "profile").onnx
    recorded.end_profiling()
    assert opening.operators_of(recorded)[ep.CPU]["GroupQueryAttention"] == 2
    assert opening.operators_of(Engine(fused_bundle, threads=1).onnx) == {}


def test_a_run_that_fails_names_the_graph(standard_bundle):
    session = Engine(standard_bundle, graph="all_logits").onnx
    assert isinstance(session, OrtSession)
    wrong = {value.name: np.zeros(len(value.shape) * [1], np.int8) for value in session.get_inputs()}
    with pytest.raises(RunFailedError, match=r"cannot run .*model\.onnx") as caught:
        session.run(None, wrong)
    assert isinstance(caught.value, IntegrityError)
    assert isinstance(caught.value, ort.RunError)  # who asks for onnxruntime's own errors still gets them
    with pytest.raises(RunFailedError, match="cannot run"):
        session.run_with_iobinding(session.io_binding())
