"""The files of the page, the index of what a browser downloads, and the command that writes them to a folder."""

import importlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.files.folder import sha256
from pastkey.runtime.engine.golden import Golden
from pastkey.web import site

module = importlib.import_module("pastkey.web.site")


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch):
    """A checkout after `make web-assets`."""
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "ort.wasm.min.mjs").write_text("export {}")
    monkeypatch.setattr(module, "LIBRARIES", folder)
    return folder


def files_of(bundle) -> Any:
    return site(bundle)


def index_of(bundle):
    return json.loads(files_of(bundle)["pastkey.json"])


def test_every_file_of_the_index_is_there_with_its_size_and_hash(talking, tmp_path):
    files, index, golden = files_of(talking), index_of(talking), Golden.of(open_bundle(talking))
    assert list(index["files"]) == ["onnx/model.onnx", "tokenizer.json", "golden.f32"]
    (tmp_path / "golden.f32").write_bytes(files["golden.f32"])
    for name, record in index["files"].items():
        file = tmp_path / name if name == "golden.f32" else files[name]
        assert (file.stat().st_size, sha256(file)) == (record["size"], record["sha256"])
    assert {"index.html", "pastkey.js", "sw.js", "lib/ort.wasm.min.mjs"} <= files.keys()
    found = np.frombuffer(files["golden.f32"], "<f4").reshape(golden.logits.shape)
    np.testing.assert_array_equal(found, golden.logits)
    assert index["golden"] == {"ids": golden.ids.tolist(), "ends": golden.ends.tolist(), "limit": golden.limit}


def test_the_index_names_the_weights_beside_the_graph(make_bundle, tiny, talking):
    index = index_of(make_bundle(tiny, data_file="model.onnx_data", golden=True))
    assert (index["graph_file"], index["weights"]) == ("onnx/model.onnx", ["onnx/model.onnx_data"])
    assert index["tokenizer"] is index["chat_template"] is None
    opened = open_bundle(talking)
    graph, tokenizer = opened.manifest.files["onnx/model.onnx"], opened.manifest.files["tokenizer.json"]
    names = ["onnx/model.onnx_data", "onnx/model.onnx_data_1", "onnx/pastkey.onnx_data"]
    files = {"onnx/model.onnx": graph, "tokenizer.json": tokenizer} | dict.fromkeys(names, graph)
    sharded = replace(opened, manifest=replace(opened.manifest, files=files))
    assert list(module._wanted(sharded)) == ["onnx/model.onnx", *names[:2], "tokenizer.json"]


def test_template_special_tokens_and_sampling_are_those_of_the_runtime(make_bundle, tiny, letters):
    """A bundle without a template continues texts."""
    config = {"chat_template": [{"name": "default", "template": "x"}], "bos_token": {"content": "<"}}
    authors = {"do_sample": True, "temperature": 0.7, "top_k": 40, "no_repeat_ngram_size": 3}
    plain = make_bundle(tiny, tokenizer=letters, golden=True)
    chat = make_bundle(tiny, tokenizer=letters, tokenizer_config=config, generation_config=authors, golden=True)
    for bundle, template, tokens, sampling in (
        (plain, None, {}, {}),
        (chat, "x", {"bos_token": "<"}, {"temperature": 0.7, "topK": 40}),
    ):
        index = index_of(bundle)
        assert (index["tokenizer"], index["chat_template"]) == ("tokenizer.json", template)
        assert (index["special_tokens"], index["sampling"]) == (tokens, sampling)


def test_what_no_browser_can_be_given_is_refused(talking, make_bundle, tiny, libraries, monkeypatch):
    damaged = make_bundle(tiny, golden=True)
    damaged.all_logits_graph.write_bytes(b"x" + damaged.all_logits_graph.read_bytes()[1:])
    with pytest.raises(IntegrityError, match="was altered"):
        site(damaged.path)
    (libraries / "ort.wasm.min.mjs").unlink()
    libraries.rmdir()
    with pytest.raises(MissingFileError, match="type  make web-assets"):
        site(talking)
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(InputError, match=r"a browser holds 2\.1 GB in one file"):
        site(talking)


# --- the command --------------------------------------------------------------------------------------------------
def test_the_folder_has_the_files_of_the_site(command, talking, tmp_path):
    out = tmp_path / "out"
    status, _, said = command("web", talking, "--out", out)
    assert (status, said) == (0, f"{out}: try it with  python -m http.server -d {out}  at http://localhost:8000\n")
    files = site(talking)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == files.keys()
    for name, content in files.items():
        assert (out / name).read_bytes() == (content if isinstance(content, bytes) else content.read_bytes())


def test_force_replaces_a_folder_of_its_own_and_no_other(command, talking, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("Dear")
    assert [command("web", talking, "--out", out, *more)[0] for more in ((), (), ("--force",))] == [0, 2, 0]
    status, _, said = command("web", talking, "--out", other, "--force")
    assert (status, "pastkey did not write it" in said) == (2, True)
    assert command("web", other, "--out", tmp_path / "new")[0] == 2  # no bundle
    assert not (tmp_path / "new").exists()


def test_a_bundle_of_slow_operators_says_what_to_export(command, talking, tmp_path, monkeypatch):
    opened = open_bundle(talking)
    assert not module.slow_on_cpu(opened)
    assert module.slow_on_cpu(replace(opened, manifest=replace(opened.manifest, operators={"MatMulNBits": 7})))
    monkeypatch.setattr(module, "slow_on_cpu", lambda bundle: True)
    said = command("web", talking, "--out", tmp_path / "out")[2]
    assert "pastkey export SOURCE --out BUNDLE --target portable" in said
