"""A bundle is proved where it runs: whole, one token at a time, or not at all. The device here is one of the test's."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import FallbackWarning, InputError, IntegrityError, ProviderError
from pastkey.providers import PROVIDERS, Provider
from pastkey.runtime import Engine, load
from pastkey.runtime.commands.inspection import inspect, print_inspection
from pastkey.runtime.engine.golden import TOKENS, Golden, require_golden
from pastkey.runtime.providers.native import NativeKernels

from ..conftest import require_close
from ..tiny_decoder import relisted

LIMIT = 1e-3


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stored(fused_bundle):
    return Golden.computed(Engine(fused_bundle, threads=1), 3, LIMIT)


class Elsewhere(Engine):
    """An engine on a device that is off by `off` of a logit where it runs `least` tokens or more."""

    off, least = 0.0, 2

    def __init__(self, bundle: Bundle, **placement: Any) -> None:
        super().__init__(bundle, threads=1)
        self.graph.providers = ["DeviceExecutionProvider"]
        self.runs: list[int] = []

    def run(self, ids: Any, mask: Any = None, *, keep: int = 1, hidden: bool = False) -> npt.NDArray[np.float32]:
        logits = super().run(ids, mask, keep=keep, hidden=hidden)
        if not (self.graph.one_by_one and ids.shape[1] > 1):
            self.runs.append(ids.shape[1])
            if ids.shape[1] >= self.least:
                logits[..., 3] += self.off * np.abs(logits).max()
        return logits


def on(bundle: Bundle, *, off: float = 0.0, least: int = 2) -> Elsewhere:
    engine = Elsewhere(bundle)
    engine.off, engine.least = off, least
    return engine


def refuses_padding(engine: Engine) -> None:
    with pytest.raises(InputError, match="rows of different lengths cannot be run together"):
        engine.forward([[1, 2], [3, 4]], [[1, 1], [1, 0]])


def proved(engine: Engine, bundle: Bundle) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        require_golden(engine, bundle)
    return [str(warning.message) for warning in told if warning.category is FallbackWarning]


def test_golden_logits_are_of_the_end_and_of_beginnings(stored, make_bundle, tiny):
    assert len(stored.ids) == TOKENS
    assert stored.ends.tolist() == [TOKENS // 8, TOKENS // 2, TOKENS]
    assert stored.ids.max() < 37
    assert stored.logits.shape == (3, 37)
    short = make_bundle(type(tiny).random([(8, 8)], 6), "fused")
    golden = Golden.computed(Engine(short, threads=1), 0, LIMIT)  # two rows at least, and no more than the context
    assert (len(golden.ids), golden.ends.tolist()) == (6, [1, 6])


def test_a_device_that_is_right_is_remembered(fused_bundle, home):
    engine, again = on(fused_bundle, off=LIMIT / 2), on(fused_bundle, off=1.0)
    assert proved(engine, fused_bundle) == []
    assert (engine.graph.one_by_one, engine.length) == (False, 0)
    assert max(engine.runs) == TOKENS
    assert 1 in engine.runs  # decoded, too
    assert proved(again, fused_bundle) == []  # nobody looks at its logits
    assert again.runs == []
    assert len(list((home / "pastkey").iterdir())) == 1


def test_without_a_cache_folder_it_is_proved_at_each_load(fused_bundle, home):
    home.mkdir()
    (home / "pastkey").write_text("in the way")
    for _ in range(2):
        engine = on(fused_bundle)
        assert proved(engine, fused_bundle) == []
        assert engine.runs


ANOTHER: list[tuple[Any, dict[str, str], str]] = [  # options, settings, drivers
    (None, {}, "another.json"),
    (("webgpu", {"deviceId": "1"}), {}, ""),
    (None, {"ep.webgpuexecutionprovider.x": "1"}, ""),
]


@pytest.mark.parametrize(("options", "settings", "driver"), ANOTHER)
def test_other_drivers_options_and_settings_are_another_device(options, settings, driver, fused_bundle, monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", "")
    proved(on(fused_bundle), fused_bundle)
    monkeypatch.setenv("VK_DRIVER_FILES", driver)
    for remembered in (False, True):
        engine = on(fused_bundle)
        engine.graph.asked = (options, settings) if options or settings else engine.graph.asked
        proved(engine, fused_bundle)
        assert bool(engine.runs) is not remembered


def test_a_device_with_wrong_prefill_runs_single_tokens(fused_bundle):
    expected = Engine(fused_bundle, threads=1).prefill([5, 6, 7, 8])
    for _ in range(2):  # the second time from memory
        engine = on(fused_bundle, off=0.1)
        (told,) = proved(engine, fused_bundle)
        assert "prefill wrong on this device, or too inexactly to tell, and single tokens right" in told
        assert (engine.graph.one_by_one, engine.graph.supports_drafts) == (True, False)
        engine.runs.clear()
        require_close(engine.prefill([5, 6, 7, 8]), expected, 1e-5)
        assert engine.runs == [1, 1, 1, 1]


def test_every_logit_is_there_one_token_at_a_time(fused_bundle):
    engine = Engine(fused_bundle, graph="all_logits", threads=1)
    expected = engine.forward([[5, 6, 7]])
    engine.reset()
    engine.graph.one_by_one = True
    require_close(engine.forward([[5, 6, 7]]), expected, 1e-5)
    engine.reset()
    refuses_padding(engine)


def test_a_provider_that_misses_keys_may_be_off_by_less(fused_bundle, stored, tmp_path, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "device", Provider("DeviceExecutionProvider", misses_keys=True))
    for limit, one_by_one in ((LIMIT, False), (0.05, True)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache of {limit}"))
        bundle = copied(fused_bundle, tmp_path / str(limit), dataclasses.replace(stored, limit=limit))
        engine = on(fused_bundle)
        assert bool(proved(engine, bundle)) is engine.graph.one_by_one is one_by_one
        assert not engine.graph.takes_padding
    everything = Engine(fused_bundle, graph="all_logits", threads=1)
    everything.graph.providers = ["DeviceExecutionProvider"]
    refuses_padding(everything)


@pytest.mark.parametrize(
    ("off", "precision", "words"),
    [(0.1, "fp32", "'device' computes other logits"), (np.nan, "fp32", "off by"), (np.inf, "fp16", "--precision fp32")],
)
def test_a_device_that_computes_something_else_is_refused(fused_bundle, off, precision, words):
    engine = on(fused_bundle, off=off, least=1)
    engine.graph.manifest = dataclasses.replace(engine.manifest, precision=precision)
    with pytest.raises(ProviderError, match=words):
        proved(engine, fused_bundle)
    assert not engine.graph.one_by_one


@pytest.fixture
def wrong_native(make_bundle, tiny, fused_bundle, stored, tmp_path, monkeypatch):
    """A bundle whose native graph is that of another decoder."""
    other = make_bundle(dataclasses.replace(tiny, weights={n: w[::-1] for n, w in tiny.weights.items()}), "fused")
    folder = tmp_path / "native"
    shutil.copytree(fused_bundle.path, folder)
    shutil.copyfile(other.last_logits_graph, folder / names.NATIVE_GRAPH)
    stored.save(folder / names.GOLDEN)
    relisted(folder, names.NATIVE_GRAPH, native=1)

    def kernels_for(bundle: Bundle, provider: str, asked: bool | None) -> NativeKernels | None:
        return None if asked is False else NativeKernels("0.1.0", 1, "avx2")

    monkeypatch.setattr("pastkey.runtime.engine.decoder_graph.kernels_for", kernels_for)
    return folder


def require_fallback(bundle: Path, words: str) -> None:
    """Told, and with the text of onnxruntime's kernels."""
    expected = load(bundle, threads=1, native=False).generate([1, 2], max_new_tokens=8).ids
    with pytest.warns(FallbackWarning, match=f"onnxruntime's kernels run the bundle: {words}"):
        lm = load(bundle, threads=1)
    assert lm.kernels.startswith("onnxruntime")
    assert lm.generate([1, 2], max_new_tokens=8).ids == expected


def test_wrong_native_kernels_fall_back(wrong_native, monkeypatch, capsys):
    told = r"the native kernels \(native 0.1.0, avx2\) compute other logits"
    require_fallback(wrong_native, told)
    monkeypatch.setattr(Golden, "of", lambda bundle: pytest.fail("computed again"))
    require_fallback(wrong_native, told)  # from memory
    with pytest.raises(ProviderError, match=r"off by .* \(limit 1.0e-03\): load the bundle with native=False"):
        load(wrong_native, threads=1, native=True)
    with pytest.warns(FallbackWarning):
        found = inspect(wrong_native, threads=1)
    assert (found.kernels.split()[0], found.golden_logits, found.refusal) == ("onnxruntime", "wrong", None)
    print_inspection(found)
    assert "without the native kernels: the native kernels (native 0.1.0, avx2) compute" in capsys.readouterr().out
    asked = inspect(wrong_native, threads=1, native=True)
    assert (asked.kernels, asked.native_left_out) == ("native 0.1.0, avx2", "")
    assert asked.refusal == f"{found.native_left_out}: load the bundle with native=False"


def test_a_native_graph_that_cannot_be_opened_falls_back(wrong_native):
    graph = wrong_native / names.NATIVE_GRAPH
    graph.write_bytes(graph.read_bytes().replace(b"MatMul", b"NotMul"))
    relisted(wrong_native)
    require_fallback(wrong_native, ".*pastkey_native.onnx")
    with pytest.raises(IntegrityError, match=r"pastkey_native.onnx"):
        load(wrong_native, threads=1, native=True)


@pytest.mark.parametrize(("offs", "taken"), [([0.04, 0.03, 0.02], 2), ([0.09, 0.05, 0.06, 0.08], 1)])
def test_golden_ids_are_not_decided_by_rounding(offs, taken, fused_bundle):
    """The limit follows from the rounding error of the sequence: exact products are `offs` from the golden logits."""
    engine = Engine(fused_bundle, threads=1)
    found = Golden.computed(engine, 3, 0.05, cast("Engine", Exact(engine, [*offs, 0.45, 0.045])))
    np.testing.assert_array_equal(found.ids, np.random.default_rng(taken).integers(0, 37, len(found.ids)))
    assert found.limit == pytest.approx(2 * max(offs[taken], 0.045))
    assert len(found.ends) == len(found.logits) == 2  # without the prefix that is 0.45 apart
    np.testing.assert_array_equal(found.logits[0], Engine(fused_bundle, threads=1).prefill(found.ids[: found.ends[0]]))


class Exact:
    """An engine whose logits are so much larger: at the end of each sequence, then after the chosen one's prefixes."""

    def __init__(self, engine: Engine, offs: list[float]) -> None:
        self._engine, self._offs = engine, offs
        self.reset = engine.reset

    def prefill(self, ids: Any, chunk_size: int) -> npt.NDArray[np.float32]:
        return self._engine.prefill(ids, chunk_size) * np.float32(1 + self._offs.pop(0))


BROKEN: dict[str, Any] = {
    "another vocabulary": lambda golden: {"logits": golden.logits[:, :5]},
    "another number of ends": lambda golden: {"ends": golden.ends[:1]},
    "another number of ids": lambda golden: {"ids": golden.ids[:9]},
    "ids out of range": lambda golden: {"ids": golden.ids + 37},
    "no arrays": None,
}


@pytest.mark.parametrize("spoilt", BROKEN)
def test_golden_logits_that_cannot_be_read_are_refused(fused_bundle, stored, tmp_path, spoilt):
    bundle = copied(fused_bundle, tmp_path, dataclasses.replace(stored, limit=0.5))
    assert Golden.of(bundle).limit == 0.5  # the bundle's own count
    if BROKEN[spoilt] is None:
        (tmp_path / names.GOLDEN).write_bytes(b"")
    else:
        dataclasses.replace(stored, **BROKEN[spoilt](stored)).save(tmp_path / names.GOLDEN)
    with pytest.raises(IntegrityError, match=r"golden_logits\.npz cannot be read .*: export the bundle again"):
        Golden.of(bundle)


def copied(bundle: Bundle, folder: Path, golden: Golden) -> Bundle:
    folder.mkdir(parents=True, exist_ok=True)
    golden.save(folder / names.GOLDEN)
    files = dict(bundle.manifest.files) | {names.GOLDEN: next(iter(bundle.manifest.files.values()))}
    return Bundle(folder, dataclasses.replace(bundle.manifest, files=files))


def test_text_is_made_of_an_engine_that_was_asked_and_the_processor_is_not_proved(fused_bundle, monkeypatch):
    asked: list[Engine] = []

    def noted(engine: Engine, bundle: Bundle) -> None:
        asked.append(engine)
        require_golden(engine, bundle)

    monkeypatch.setattr("pastkey.runtime.model.language_model.require_golden", noted)
    monkeypatch.setattr(Golden, "of", lambda bundle: pytest.fail("read"))
    lm = load(fused_bundle.path, threads=1)
    assert asked == [lm.parts.engine]
