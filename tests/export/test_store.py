"""An export continues from the steps that an earlier one of the same source finished, whole or killed.

Tiny models, of which every matrix counts as large here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pastkey.contract.bundle import open_bundle
from pastkey.errors import InUseError
from pastkey.export import export, grafting, pipeline, store
from pastkey.export.graph.stored import StoredWeight, stored_weights
from pastkey.export.keys import Keys
from pastkey.export.source import stored_tensors
from pastkey.export.source.open import open_source
from pastkey.export.store import Store, unbound

from ..loopback_hub import read_files
from .commands import Heard
from .decoders import Plain

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of each version others


@pytest.fixture(autouse=True)
def every_matrix_is_large(monkeypatch):
    monkeypatch.setattr(stored_tensors, "LARGE", 1000)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache's folder of this test, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pastkey" / "exports"


def again(*_: object, **__: object) -> NoReturn:
    raise AssertionError("made again")


def store_of(out: Path = Path("out"), **keys: str | None) -> Store:
    return Store(out, Keys(**keys), Heard())


# --- exports ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_second_export_starts_at_quantization_and_writes_the_same_bundle(saved_llama, folder, tmp_path, monkeypatch):
    export(saved_llama, tmp_path / "expected", target="webgpu", cache=False, progress=(heard := Heard()))
    heard.require_planned()
    assert not folder.exists()
    export(saved_llama, tmp_path / "fp32", "fp32", progress=(heard := Heard()))
    (graph,) = read_files(folder).values()
    assert len(graph) < 100_000 < (saved_llama / "model.safetensors").stat().st_size
    kept = "kept the float32 graph with its proof for the next export of this source: "
    assert heard.said[-1].startswith(f"{kept}{-(-len(graph) // 1000)} KB in {folder}")
    monkeypatch.setattr(grafting, "trace", again)
    export(saved_llama, tmp_path / "int8", target="webgpu", progress=(heard := Heard()))
    heard.require_planned()
    assert read_files(tmp_path / "int8") == read_files(tmp_path / "expected")
    assert f"read the float32 graph with its proof of an earlier export from {folder}" in " ".join(heard.said)
    assert [stage for stage in heard.stages if "fp32" in stage] == ["write fp32 weights"]
    assert len(read_files(folder)) == 2
    # The text of the same precision, whatever follows.
    monkeypatch.setattr(pipeline, "calibration_text", again)
    export(saved_llama, tmp_path / "bounded", target="webgpu", max_kl=10, progress=(heard := Heard()))
    heard.require_planned()
    with pytest.raises(AssertionError, match="made again"):
        export(saved_llama, tmp_path / "int4", "int4", target="webgpu")
    with pytest.raises(AssertionError, match="made again"):
        export(saved_llama, tmp_path / "traced", cache=False)
    assert len(read_files(folder)) == 2


KILLED = """
import os, signal, sys
from pastkey.export import export
from pastkey.export.store import Store

keep_text = Store.keep_text

def keep_and_die(self, *content):
    keep_text(self, *content)
    os.kill(os.getpid(), signal.SIGKILL)

Store.keep_text = keep_and_die
export(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL, and no locks of folders")
def test_an_export_goes_on_from_the_text_after_which_another_was_killed(checkpoint, trained, tmp_path, monkeypatch):
    place = tmp_path / "place"
    out, expected = place / "bundle", open_bundle(trained)
    subprocess.run([sys.executable, "-c", KILLED, checkpoint, out], check=False)
    assert not out.exists()
    monkeypatch.setattr(pipeline, "calibration_text", again)
    with pytest.raises(AssertionError, match="made again"):
        export(checkpoint, place / "other", cache=False)
    report = export(checkpoint, out)
    assert report.manifest.files == expected.manifest.files
    assert report.manifest.quality == expected.manifest.quality
    assert open_bundle(out, verify=True).manifest.parity == expected.manifest.parity
    assert [path.name for path in place.iterdir()] == ["bundle"]


# --- graphs -------------------------------------------------------------------------------------------------------
def graph_of(module: Any) -> ir.Model:
    """A graph whose initializers are the parameters of the module, and the transposes of its matrices."""
    weights = stored_weights(module)
    values = []
    for name, parameter in module.named_parameters():
        held = None if weights is None else weights.weight(parameter)
        tensor = ir.Tensor(parameter.detach().numpy()) if held is None else held
        forms = {name: tensor}
        if isinstance(tensor, StoredWeight):
            forms[f"{name}_transposed"] = tensor.transposed()
        for own, form in forms.items():
            form.name = own
            values.append(ir.Value(name=own, shape=form.shape, type=ir.TensorType(form.dtype), const_value=form))
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_graph_is_bound_to_the_weights_of_the_source_that_is_open(kind, saved_llama, tmp_path, monkeypatch):
    source = saved_llama
    if kind == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
        pytest.importorskip("accelerate", reason="accelerate is not installed")
        from .source.test_gguf import write_gguf

        source = write_gguf(tmp_path / "tiny.gguf", quantized=True)
    module = open_source(source).module
    model = graph_of(module)
    initializers = model.graph.initializers
    store_of(graph="a").keep_graph(unbound(model, module), {"of": kind})
    found = store_of(graph="a").graph(open_source(source).module)
    assert found is not None
    assert found[1] == {"of": kind}
    assert list(found[0].graph.initializers) == list(initializers)
    stored = 0
    for name, value in found[0].graph.initializers.items():
        stored += isinstance(value.const_value, StoredWeight)
        assert np.array_equal(value.const_value.numpy(), initializers[name].const_value.numpy())
    assert stored == 2 * sum(parameter.dim() == 2 for parameter in module.parameters())
    # As where the disk has no room for dequantized weights.
    monkeypatch.setattr(stored_tensors, "LARGE", 1 << 40)
    assert store_of(graph="a").graph(open_source(source).module) is None


def test_large_weights_in_memory_are_not_kept(saved_llama, monkeypatch):
    assert unbound(graph_of(Plain()), Plain()) is None
    module = open_source(saved_llama).module
    assert unbound(graph_of(module), module) is not None
    norms = sum(parameter.nbytes for parameter in module.parameters() if parameter.dim() == 1)
    monkeypatch.setattr(store, "_MOST_IN_MEMORY", norms - 1)
    assert unbound(graph_of(module), module) is None


# --- entries --------------------------------------------------------------------------------------------------
def test_matrices_outlive_a_failure_and_no_other_key(tmp_path):
    steps = tmp_path / ".out.steps"
    mine = Store(tmp_path / "out", Keys(matrices="m"), heard := Heard())
    for name in ("m", "of other options"):
        (steps / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="failed"), mine.opened():
        raise ValueError("failed")
    assert heard.said == [f"kept finished steps in {steps}: the same command continues from there"]
    assert [path.name for path in steps.iterdir()] == ["m"]


EXPORTING = """
import sys, time
from pathlib import Path
from pastkey.export.keys import Keys
from pastkey.export.progress import Progress
from pastkey.export.store import Store

with Store(Path(sys.argv[1]), Keys(), Progress()).opened():
    print("exporting", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of folders")
def test_a_second_export_to_one_folder_is_refused_until_the_first_has_ended(tmp_path):
    out, steps = tmp_path / "out", tmp_path / ".out.steps"
    second = store_of(out, matrices="m")
    with subprocess.Popen([sys.executable, "-c", EXPORTING, out], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "exporting\n"
        (steps / "of the first").mkdir()
        with pytest.raises(InUseError, match=r"out\.steps is being written by another"), second.opened():
            pass
        assert (steps / "of the first").is_dir()
        first.kill()
    with second.opened():
        assert list(steps.iterdir()) == []
    assert not steps.exists()


TEXT = {"source": "own"}


@pytest.mark.parametrize("spoilt", [lambda entry: entry[:-1], lambda entry: b"x" + entry[1:], lambda entry: b""])
def test_a_damaged_entry_is_made_again(spoilt, folder):
    store = store_of(text="a")
    store.keep_text(TEXT)
    assert store.text() == TEXT
    assert store_of(text="b").text() is None
    (folder / "a").write_bytes(spoilt((folder / "a").read_bytes()))
    assert store.text() is None
    store.keep_text(TEXT)
    assert store.text() == TEXT


def test_the_least_recently_used_entries_are_removed(folder, monkeypatch):
    for age, key in enumerate("abc"):
        store_of(text=key).keep_text(TEXT)
        os.utime(folder / key, (100 - age, 100 - age))
    (folder / ".d.0123abcd.partial").write_bytes(b"x")  # a killed export's
    os.utime(folder / ".d.0123abcd.partial", (0, 0))
    size = (folder / "a").stat().st_size
    monkeypatch.setattr(store, "MOST_BYTES", 3 * size)
    assert store_of(text="c").text() == TEXT  # now the most recently used one
    store_of(text="e").keep_text(TEXT)
    assert set(read_files(folder)) == {"a", "c", "e"}
    store_of(text="f").keep_text({"source": "x" * 4 * size})
    assert set(read_files(folder)) == {"a", "c", "e"}
    assert store_of(text="f").text() is None


@pytest.mark.parametrize("place", ["no home", "a file", "no key"])
def test_a_cache_that_cannot_be_is_silent(place, folder, monkeypatch):
    if place == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    elif place == "a file":
        folder.parent.mkdir(parents=True)
        folder.touch()
    cache = Store(Path("out"), Keys(text=None if place == "no key" else "a"), heard := Heard())
    cache.keep_text(TEXT)
    assert cache.text() is None
    assert not heard.said
