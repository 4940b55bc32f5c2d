"""A bundle on the native kernels: the same model, with every parallel run and every form of its cache."""

from __future__ import annotations

import dataclasses
import re
import shutil
from typing import cast

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import ProviderError
from pastkey.export import export
from pastkey.export.bundle_writer import BundleWriter, ExportedDecoder
from pastkey.export.progress import SILENT, Recorder
from pastkey.export.settings import ExportConfig
from pastkey.runtime import Engine, load
from pastkey.runtime.commands.inspection import inspect
from pastkey.runtime.engine import golden
from pastkey.runtime.providers.native import native_kernels
from tools import native_faults

from ..export.decoders import gpt2, llama
from .running import LEVELS

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1088,
}  # fmt: skip
FORMS = {"llama-int8": (llama, "int8", 1088), "gpt2-int4": (gpt2, "int4", 128)}  # and the length of their context
IDS = np.random.default_rng(0).integers(0, 61, 80)


@pytest.fixture(scope="module", params=FORMS)
def bundle(request, tmp_path_factory):
    folder, (kind, precision, length) = tmp_path_factory.mktemp(request.param) / "bundle", FORMS[request.param]
    export(kind(**SIZES), folder, precision, context_length=length, cache=False)
    made = open_bundle(folder)
    assert made.manifest.native == names.NATIVE_OPERATORS
    return made


def test_a_text_is_the_same_alone_among_others_with_drafts_and_from_a_cached_prefix(bundle):
    """Up to eight rows use the path of one."""
    prompts = [IDS[start : start + 20].tolist() for start in range(0, 50, 10)]
    with load(bundle.path, native=True) as lm:
        assert lm.kernels.startswith("native ")
        alone = [lm.generate(prompt, max_new_tokens=24, prompt_lookup=False).ids for prompt in prompts]
        assert [found.ids for found in lm.generate(prompts, max_new_tokens=24)] == alone
        assert [lm.generate(prompt, max_new_tokens=24).ids for prompt in prompts] == alone
        for _ in range(2):
            cached = lm.generate(prompts[0], max_new_tokens=24, prompt_lookup=False, reuse_prefix=True)
            assert cached.ids == alone[0]


def test_a_session_is_read_by_the_other_kernels(bundle, tmp_path):
    file = tmp_path / "session.npz"
    with load(bundle.path, native=True) as lm, load(bundle.path, native=False) as ordinary:
        for writer, reader in ((lm, ordinary), (ordinary, lm)):
            session = writer.session()
            session.append(IDS[:30].tolist())
            session.save(file)
            expected = session.generate(max_new_tokens=4).ids
            assert reader.load_session(file).generate(max_new_tokens=4).ids == expected


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
    with load(made.path) as lm:
        assert lm.kernels.startswith("onnxruntime")
    with pytest.raises(ProviderError, match=r"has no native graph, since its export found that .* off by 3.0e-01"):
        load(made.path, native=True)


@pytest.mark.parametrize("fault", ["the first block is left out", "a tile of 16 results is transposed"])
def test_golden_logits_find_a_faulty_kernel(bundle, fault, tmp_path):
    stored = golden.Golden.of(bundle)
    assert max(golden.differences(Engine(bundle, native=True), stored)) < stored.limit
    made = native_faults.planted(bundle, native_faults.FAULTS[fault], tmp_path / "planted")
    assert max(golden.differences(Engine(made, native=True), stored)) > stored.limit


def test_the_installed_library_says_its_level_and_version():
    native_kernels.cache_clear()
    found = native_kernels()
    assert not found.refused
    assert found.operators == names.NATIVE_OPERATORS
    assert found.level in LEVELS
    assert str(found) == f"native {found.version}, {found.level}"
