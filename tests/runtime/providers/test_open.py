"""What stands between a bundle's files and a session that runs: versions, providers, links, and the manifest's word."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, KVGeometry, Manifest, open_bundle
from pastkey.errors import InputError, IntegrityError, MissingExtraError, ProviderError, StartError
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.providers import open as opening
from pastkey.runtime.providers import ort
from pastkey.runtime.providers import placement as ep
from pastkey.runtime.providers.open import default_threads
from pastkey.values import parse_version

MakeBundle = Callable[..., Bundle]


def with_manifest(bundle: Bundle, **fields: Any) -> Bundle:
    return replace(bundle, manifest=replace(bundle.manifest, **fields))


OTHER: dict[str, tuple[Callable[[Manifest], dict[str, Any]], type[Exception], str]] = {
    "another head size": (
        lambda m: {"layers": (m.layers[0], KVGeometry(2, 16, 24))},
        IntegrityError,
        r"'past_key_values.1.value' is \(B, 2, P1, 16\).*\(batch_size, 2, past_sequence_length, 24\) in the manifest",
    ),
    "another vocabulary": (
        lambda m: {"vocab_size": 38},
        IntegrityError,
        r"'logits' is \(B, N, 37\) .*\(batch_size, sequence_length, 38\)",
    ),
    "fewer layers": (lambda m: {"layers": m.layers[:1]}, IntegrityError, r"has the tensor '(present|past_key_values)"),
    "more layers": (lambda m: {"layers": m.layers * 2}, IntegrityError, r"has no tensor '(present|past_key_values)"),
    "a newer onnxruntime": (
        lambda m: {"min_onnxruntime": "99.1.0"},
        MissingExtraError,
        r"needs onnxruntime 99\.1\.0.*pip install --upgrade onnxruntime",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_manifest_of_another_graph_is_refused(bundle, name):
    change, error, words = OTHER[name]
    with pytest.raises(error, match=words):
        Engine(with_manifest(bundle, **change(bundle.manifest)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no graph at all", r"onnxruntime .* cannot load .*pastkey\.onnx"),
        (None, r"pastkey\.onnx has no tensor 'logits_start'"),
    ],
)
def test_another_graph_file_is_refused(bundle, tmp_path, content, words):
    copy = tmp_path / "b"
    shutil.copytree(bundle.path, copy)
    (copy / names.LAST_LOGITS_GRAPH).write_bytes(content or bundle.all_logits_graph.read_bytes())
    with pytest.raises(IntegrityError, match=words):
        Engine(replace(bundle, path=copy))


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_path_that_is_no_text_is_told(bundle, tmp_path):
    copy = tmp_path / os.fsdecode(b"b\xff")
    shutil.copytree(bundle.path, copy)
    with pytest.raises(InputError, match="is not UTF-8, and onnxruntime takes no other path: rename the folder"):
        Engine(open_bundle(copy))


def test_too_little_memory_for_a_graph(bundle, monkeypatch):
    def create(*_: object) -> None:
        raise ort.OrtError[0](
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"
        )

    monkeypatch.setattr(opening, "_create", create)
    with pytest.raises(MemoryError, match=r"too little memory to load .*pastkey\.onnx: .*bad_alloc"):
        Engine(bundle)


FAILED_STARTS: list[tuple[str, Exception, type[Exception], str]] = [  # the bundle's target, what onnxruntime raises
    (
        "webgpu",
        ort.OrtError[0]("Failed to finalize the graph. Code: 1002\nat line 7"),
        ProviderError,
        r"Code: 1002; export the model again if an older pastkey wrote this bundle, or take the provider 'cpu'$",
    ),
    (
        "cpu",
        ort.OrtError[0]("Failed to finalize the graph. Code: 1002\nat line 7"),
        ProviderError,
        "Code: 1002; export the model again with --target webgpu, or take the provider 'cpu'$",
    ),
    (
        "cpu",
        RuntimeError("No supported adapters"),
        StartError,
        "could not start the execution provider 'webgpu'.*; ask for one .*: cpu",
    ),
]


@pytest.mark.parametrize(("target", "raised", "error", "words"), FAILED_STARTS)
def test_a_provider_that_fails_to_start_is_refused_with_a_remedy(
    standard_bundle, monkeypatch, target, raised, error, words
):
    def fails(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(ep, "available", lambda: ["WebGpuExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(opening, "OrtSession", fails)
    with pytest.raises(error, match=words):
        Engine(with_manifest(standard_bundle, target=target), providers="webgpu")


def test_threads(bundle):
    session = Engine(bundle, threads=2)
    assert session.graph.threads == session.onnx.get_session_options().intra_op_num_threads == 2
    assert Engine(bundle).graph.threads == default_threads()
    for threads in (0, -1, 100_000):
        with pytest.raises(InputError, match=f"threads is {threads}; it must be 1 to "):
            Engine(bundle, threads=threads)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_download_cache_of_links_is_loaded(tiny, make_bundle, tmp_path, monkeypatch, in_memory):
    """Weights beside the graph, each file a link to a blob under another name, as such caches lay them out.

    onnxruntime 1.24.1 is handed the weights in memory, as the others can be.
    """
    if in_memory:
        monkeypatch.setattr(opening, "REFUSE_LINKS", {parse_version(ort.onnxruntime.__version__)})
    source = make_bundle(tiny, "fused", data_file=names.weights_file("model.onnx"))
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    (snapshot / "onnx").mkdir(parents=True)
    for number, path in enumerate(path for path in source.path.rglob("*") if path.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(source.path)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    session = Engine(open_bundle(snapshot, verify=True), graph="all_logits", threads=1)
    ids = [3, 1, 4, 1, 5]
    np.testing.assert_allclose(session.forward([ids])[0], tiny(ids), atol=1e-4)


def test_a_graph_that_the_manifest_does_not_list_is_refused(tiny, make_bundle):
    bundle = make_bundle(tiny)
    (bundle.path / "onnx" / "further.onnx").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"further\.onnx is not listed in pastkey\.json"):
        open_bundle(bundle.path)


def test_operators_are_counted_by_provider(fused_bundle, tmp_path):
    """By onnxruntime's own record, which it keeps on request."""
    recorded = Engine(fused_bundle, threads=1, profile_prefix=tmp_path / "profile").onnx
    recorded.end_profiling()
    assert opening.operators_of(recorded)[ep.CPU]["GroupQueryAttention"] == 2
    assert opening.operators_of(Engine(fused_bundle, threads=1).onnx) == {}
