"""A bundle on the native kernels: the same model, whatever runs beside it, and however its cache is held."""

from __future__ import annotations

import dataclasses
import re
import shutil
from typing import cast

import numpy as np
import pytest

import pastkey
from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ProviderError
from pastkey.export import export
from pastkey.export.bundle_writer import BundleWriter, ExportedDecoder
from pastkey.export.progress import SILENT, Recorder
from pastkey.export.settings import ExportConfig
from pastkey.runtime import Engine
from pastkey.runtime.commands.inspection import inspect
from pastkey.runtime.engine import golden
from pastkey.runtime.providers.native import native_kernels
from tools import native_faults

from ..export.decoders import gpt2, llama
from .running import LEVELS

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1088,
}
KINDS = {"llama": llama, "gpt2": gpt2}
IDS = np.random.default_rng(0).integers(0, 61, 80)


@pytest.fixture(scope="module", params=["llama-long", "gpt2-int4"])
def bundle(request, tmp_path_factory):
    kind, _, form = request.param.partition("-")
    folder, length = tmp_path_factory.mktemp(request.param) / "bundle", 1088 if form == "long" else 128
    precision = "int4" if form == "int4" else "int8"
    export(KINDS[kind](**SIZES), folder, precision, context_length=length, cache=False)
    made = open_bundle(folder)
    assert made.manifest.native == names.NATIVE_OPERATORS
    return made


@pytest.fixture
def lm(bundle):
    with pastkey.load(bundle.path, native=True) as loaded:
        assert loaded.kernels.startswith("native ")
        yield loaded


def test_a_token_has_the_same_logits_alone_and_among_others(lm):
    """Drafts and batches do not change a text: up to eight rows take the path of one."""
    prompts = [IDS[start : start + 20].tolist() for start in range(0, 50, 10)]
    alone = [lm.generate(prompt, max_new_tokens=24, prompt_lookup=False).ids for prompt in prompts]
    assert [found.ids for found in lm.generate(prompts, max_new_tokens=24)] == alone
    assert [lm.generate(prompt, max_new_tokens=24).ids for prompt in prompts] == alone


def test_a_prefix_is_reused(lm):
    prompt = IDS[:40].tolist()
    expected = lm.generate(prompt, max_new_tokens=8, prompt_lookup=False).ids
    for _ in range(2):
        assert lm.generate(prompt, max_new_tokens=8, prompt_lookup=False, reuse_prefix=True).ids == expected


def test_a_text_goes_on_behind_the_context(bundle, tmp_path):
    if bundle.manifest.shift.refused:
        pytest.skip("positions are learned")
    with pastkey.load(bundle.path, native=True) as lm, pastkey.load(bundle.path, native=False) as ordinary:
        length = bundle.manifest.context_length - 4
        prompt = np.random.default_rng(1).integers(0, 61, length).tolist()
        texts = [model.generate(prompt, max_new_tokens=8, context_overflow="shift").ids for model in (lm, ordinary)]
        assert len(texts[0]) == 8
        assert texts[0][:4] == texts[1][:4]


def test_a_session_is_read_by_the_other_kernels(bundle, tmp_path):
    file = tmp_path / "session.npz"
    with pastkey.load(bundle.path, native=True) as lm, pastkey.load(bundle.path, native=False) as ordinary:
        for writer, reader in ((lm, ordinary), (ordinary, lm)):
            session = writer.session()
            session.append(IDS[:30].tolist())
            session.save(file)
            expected = session.generate(max_new_tokens=4).ids
            read = reader.load_session(file)
            assert read.ids == IDS[:30].tolist()
            assert read.generate(max_new_tokens=4).ids == expected


def test_other_logits_are_refused(bundle, monkeypatch):
    computed = golden.Golden.of(bundle)
    wrong = dataclasses.replace(computed, logits=computed.logits + 1)
    monkeypatch.setattr(golden.Golden, "of", lambda bundle: wrong)
    monkeypatch.setattr("pastkey.files.folder.user_cache_file", lambda name: None)
    with pytest.raises(ProviderError, match=r"compute other logits on this CPU: off by .* load the bundle with "):
        pastkey.load(bundle.path, native=True)


def test_an_export_leaves_out_a_native_graph_with_other_logits(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PASTKEY_NATIVE", raising=False)
    shutil.copytree(bundle.path, tmp_path / "bundle")
    progress = Recorder(SILENT)
    with monkeypatch.context() as wrong:
        wrong.setattr(golden, "differences", lambda engine, stored: iter([0.3]))
        writer = BundleWriter(cast("ExportedDecoder", None), ExportConfig(), progress)
        writer.proved_on_target(dataclasses.replace(bundle, path=tmp_path / "bundle"))
    made = open_bundle(tmp_path / "bundle")
    why = made.manifest.native_left_out
    assert re.fullmatch(r"the native kernels \(native .*\) compute other logits .*: off by 3.0e-01 of the .*", why)
    assert progress.warnings == [f"without the native graph, so onnxruntime's kernels run the bundle: {why}"]
    assert made.manifest.native is None
    assert names.NATIVE_GRAPH not in made.manifest.files
    assert inspect(made.path).native_left_out == why
    with pastkey.load(made.path) as lm:
        assert lm.kernels.startswith("onnxruntime")
    with pytest.raises(ProviderError, match=r"has no native graph, since its export found that .* off by 3.0e-01"):
        pastkey.load(made.path, native=True)


@pytest.mark.parametrize("fault", ["the first block is left out", "a tile of 16 results is transposed"])
def test_golden_logits_find_a_faulty_kernel(bundle, fault, tmp_path):
    stored = golden.Golden.of(bundle)
    assert max(golden.differences(Engine(bundle, native=True), stored)) < stored.limit
    made = native_faults.planted(bundle, native_faults.FAULTS[fault], tmp_path / "planted")
    assert made is not None
    assert max(golden.differences(Engine(made, native=True), stored)) > stored.limit


def test_the_installed_library_says_its_level_and_version():
    native_kernels.cache_clear()
    found = native_kernels()
    assert found is not None
    assert not found.refused
    assert found.operators == names.NATIVE_OPERATORS
    assert found.level in LEVELS
    assert str(found) == f"native {found.version}, {found.level}"
