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
from pastkey.errors import InputError, ProviderError
from pastkey.export import export
from pastkey.export.bundle_writer import BundleWriter, Decoder
from pastkey.export.progress import SILENT, Recorder
from pastkey.export.settings import ExportConfig
from pastkey.export.upgrade import upgrade
from pastkey.runtime import Engine
from pastkey.runtime.commands.inspection import inspect
from pastkey.runtime.engine import golden
from pastkey.runtime.engine.caches.int8_kv import INT8_KV_FROM
from tools import native_faults

from ..export.decoders import gpt2, llama

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": INT8_KV_FROM + 64,
}
KINDS = {"llama": llama, "gpt2": gpt2}
IDS = np.random.default_rng(0).integers(0, 61, 80)


@pytest.fixture(scope="module", params=["llama-long", "llama", "gpt2", "gpt2-int4"])
def bundle(request, tmp_path_factory):
    kind, _, form = request.param.partition("-")
    folder, length = tmp_path_factory.mktemp(request.param) / "bundle", INT8_KV_FROM + 64 if form == "long" else 128
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


def test_every_path_computes_nearly_what_onnxruntimes_kernels_compute(bundle):
    ordinary, native = Engine(bundle, native=False, int8_kv_from=None), Engine(bundle, native=True)
    assert ordinary.graph.kernels.startswith("onnxruntime")
    assert native.graph.cache_form.dtype is np.float16
    for chunks in ([80], [40, 40], [78, 1, 1], [1] * 80, [3, 70, 7]):
        found = []
        for engine in (ordinary, native):
            engine.reset()
            start = 0
            for size in chunks:
                logits = engine.prefill(IDS[start : start + size])
                start += size
            found.append(logits)
        off = np.abs(found[0] - found[1]).max() / np.abs(found[0]).max()
        assert 0 < off < 3e-2


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
    if bundle.manifest.shift is None or bundle.manifest.shift.refused:
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
        for writer, reader in ((lm, ordinary), (ordinary, lm), (lm, lm)):
            session = writer.session()
            session.append(IDS[:30].tolist())
            session.save(file)
            expected = session.generate(max_new_tokens=4).ids
            read = reader.load_session(file)
            assert read.ids == IDS[:30].tolist()
            assert read.generate(max_new_tokens=4).ids == expected


def test_an_upgrade_adds_what_an_export_writes(bundle, tmp_path):
    older = dataclasses.replace(bundle.manifest, native=None)
    copy = upgrade(bundle.path, tmp_path / "copy")
    assert {name: r.sha256 for name, r in copy.manifest.files.items()} == {
        name: r.sha256 for name, r in bundle.manifest.files.items()
    }
    assert dataclasses.replace(copy.manifest, native=None) == older
    with pytest.raises(InputError, match="is what is to be upgraded, and would be replaced"):
        upgrade(bundle.path, bundle.path)


@pytest.mark.parametrize("options", [{"generate": True}, {"format": "ort"}], ids=["generate", "ort"])
def test_further_graphs_are_those_of_onnxruntimes_kernels(options, tmp_path):
    """They are made of the last-logits graph: the native one computes other texts where two logits nearly tie."""
    export(llama(**SIZES), tmp_path / "bundle", context_length=128, quick=True, cache=False, **options)
    assert open_bundle(tmp_path / "bundle").manifest.native == names.NATIVE_OPERATORS


def test_golden_logits_are_never_the_native_kernels_own(bundle):
    """A bundle without any computes them at its first load."""
    files = {name: record for name, record in bundle.manifest.files.items() if name != names.GOLDEN}
    older = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))
    computed, stored = golden.Golden.of(older), golden.Golden.of(bundle)
    assert np.array_equal(computed.logits[-1], stored.logits[-1])


def test_an_untrusted_bundle_may_run_on_them(bundle, lm):
    expected = lm.generate([1, 2, 3], max_new_tokens=6).ids
    with pastkey.load(bundle.path, trust=False, native=True) as untrusted:
        assert untrusted.generate([1, 2, 3], max_new_tokens=6).ids == expected


def test_other_logits_are_refused(bundle, monkeypatch):
    computed = golden.Golden.of(bundle)
    wrong = dataclasses.replace(computed, logits=computed.logits + 1)
    monkeypatch.setattr(golden.Golden, "of", lambda bundle: wrong)
    monkeypatch.setattr(golden, "user_cache_file", lambda name: None)
    with pytest.raises(ProviderError, match=r"compute other logits on this CPU: off by .* load the bundle with "):
        pastkey.load(bundle.path, native=True)


def test_an_export_leaves_out_a_native_graph_with_other_logits(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PASTKEY_NATIVE", raising=False)
    shutil.copytree(bundle.path, tmp_path / "bundle")
    progress = Recorder(SILENT)
    with monkeypatch.context() as wrong:
        wrong.setattr(golden, "differences", lambda engine, stored: iter([0.3]))
        writer = BundleWriter(cast("Decoder", None), ExportConfig(), progress)
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
    upgraded = upgrade(made.path, tmp_path / "upgraded")
    assert (upgraded.manifest.native, upgraded.manifest.native_left_out) == (names.NATIVE_OPERATORS, "")


@pytest.mark.parametrize("fault", ["the first block is left out", "a tile of 16 results is transposed"])
def test_golden_logits_find_a_faulty_kernel(bundle, fault, tmp_path):
    stored = golden.Golden.of(bundle)
    assert max(golden.differences(Engine(bundle, native=True), stored)) < stored.limit
    made = native_faults.planted(bundle, native_faults.FAULTS[fault], tmp_path / "planted")
    assert made is not None
    assert max(golden.differences(Engine(made, native=True), stored)) > stored.limit


def test_float32_has_no_kernel(tmp_path):
    export(llama(**SIZES), tmp_path / "fp32", precision="fp32", context_length=64, cache=False)
    with pytest.raises(InputError, match="kernels are for int8 and int4 weights"):
        upgrade(tmp_path / "fp32", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert names.NATIVE_GRAPH not in open_bundle(tmp_path / "fp32").manifest.files
