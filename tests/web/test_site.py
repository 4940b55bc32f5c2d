"""The files of the page, and the index of what a browser downloads."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.files.folder import sha256
from pastkey.runtime.engine.golden import Golden
from pastkey.web import site

from ..runtime import conftest as decoder

tiny, letters, make_bundle, talking = decoder.tiny, decoder.letters, decoder.make_bundle, decoder.talking
Make = Callable[..., Bundle]
module = importlib.import_module("pastkey.web.site")


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch):
    """A checkout after `make web-assets`."""
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "ort.wasm.min.mjs").write_text("export {}")
    monkeypatch.setattr(module, "LIBRARIES", folder)
    return folder


def index_of(bundle: Path | Bundle) -> dict[str, Any]:
    content = site(bundle)["pastkey.json"]
    assert isinstance(content, bytes)
    found: dict[str, Any] = json.loads(content)
    return found


def test_every_file_of_the_index_is_there_with_its_size_and_hash(talking, tmp_path):
    files = site(talking)
    index = index_of(talking)
    assert list(index["files"]) == ["onnx/model.onnx", "tokenizer.json", "golden.f32"]
    for name, record in index["files"].items():
        content = files[name]
        if isinstance(content, bytes):
            (tmp_path / "content").write_bytes(content)
            content = tmp_path / "content"
        assert (content.stat().st_size, sha256(content)) == (record["size"], record["sha256"])
    assert {"index.html", "pastkey.js", "sw.js", "lib/ort.wasm.min.mjs"} <= files.keys()


def test_the_index_names_the_weights_beside_the_graph(make_bundle, tiny):
    index = index_of(make_bundle(tiny, data_file="model.onnx_data", golden=True))
    assert (index["graph_file"], index["weights"]) == ("onnx/model.onnx", ["onnx/model.onnx_data"])
    assert index["tokenizer"] is index["chat_template"] is None


def test_the_index_names_every_file_of_sharded_weights(talking):
    opened = open_bundle(talking)
    graph, tokenizer = opened.manifest.files["onnx/model.onnx"], opened.manifest.files["tokenizer.json"]
    names = ["onnx/model.onnx_data", "onnx/model.onnx_data_1", "onnx/pastkey.onnx_data"]
    files = {"onnx/model.onnx": graph, "tokenizer.json": tokenizer} | dict.fromkeys(names, graph)
    sharded = replace(opened, manifest=replace(opened.manifest, files=files))
    assert list(module._wanted(sharded)) == ["onnx/model.onnx", *names[:2], "tokenizer.json"]


def test_a_bundle_with_matmulnbits_is_slow_on_the_cpu(talking):
    opened = open_bundle(talking)
    assert not module.slow_on_cpu(opened)
    blocks = replace(opened, manifest=replace(opened.manifest, operators={"MatMulNBits": 7}))
    assert module.slow_on_cpu(blocks)


def test_the_golden_logits_are_those_of_the_bundle(talking):
    golden, index = Golden.of(open_bundle(talking)), index_of(talking)["golden"]
    content = site(talking)["golden.f32"]
    assert isinstance(content, bytes)
    assert np.array_equal(np.frombuffer(content, "<f4").reshape(golden.logits.shape), golden.logits)
    assert (index["ids"], index["ends"], index["limit"]) == (golden.ids.tolist(), golden.ends.tolist(), golden.limit)


def test_template_special_tokens_and_sampling_are_those_of_the_runtime(make_bundle, tiny, letters):
    config = {"chat_template": [{"name": "default", "template": "x"}], "bos_token": {"content": "<"}}
    authors = {"do_sample": True, "temperature": 0.7, "top_k": 40, "no_repeat_ngram_size": 3}
    index = index_of(
        make_bundle(tiny, tokenizer=letters, tokenizer_config=config, generation_config=authors, golden=True)
    )
    assert (index["chat_template"], index["special_tokens"]) == ("x", {"bos_token": "<"})
    assert index["sampling"] == {"temperature": 0.7, "topK": 40}


def test_a_bundle_without_a_template_continues_texts(make_bundle, tiny, letters):
    index = index_of(make_bundle(tiny, tokenizer=letters, golden=True))
    assert (index["tokenizer"], index["chat_template"]) == ("tokenizer.json", None)


def test_a_checkout_without_the_libraries_names_the_target(talking, libraries):
    (libraries / "ort.wasm.min.mjs").unlink()
    libraries.rmdir()
    with pytest.raises(MissingFileError, match="type  make web-assets"):
        site(talking)


def test_a_file_that_no_browser_holds_is_refused(talking, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(InputError, match=r"a browser holds 2\.1 GB in one file"):
        site(talking)


def test_a_damaged_bundle_is_refused(make_bundle, tiny):
    bundle = make_bundle(tiny, golden=True)
    bundle.all_logits_graph.write_bytes(b"x" + bundle.all_logits_graph.read_bytes()[1:])
    with pytest.raises(IntegrityError, match="was altered"):
        site(bundle.path)
