"""Decoding with an int8 cache after a long text: the same model, in less memory, and back again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.runtime.engine.caches import int8_kv
from pastkey.runtime.engine.engine import Engine
from pastkey.runtime.providers import ort
from pastkey.values import parse_version

IDS = np.random.default_rng(0).integers(0, 37, 80)

pytestmark = pytest.mark.skipif(
    parse_version(ort.onnxruntime.__version__) < parse_version(int8_kv.MIN_ONNXRUNTIME),
    reason="this onnxruntime has no int8 cache",
)


@pytest.fixture(scope="module")
def bundle(tiny, make_bundle):
    return make_bundle(tiny, "fused", int8_kv=True)


@pytest.fixture
def engine(bundle):
    """Every token that is decoded goes through the int8 cache."""
    return Engine(bundle, threads=1, int8_kv_from=1)


@pytest.fixture
def exact(bundle):
    return Engine(bundle, threads=1, int8_kv_from=None)


def decoded(engine: Engine, first: int = 20) -> np.ndarray:
    engine.reset()
    engine.prefill(IDS[:first])
    return np.stack([engine.decode(int(token)) for token in IDS[first:]])


def lengths(engine: Engine) -> tuple[int, int, int]:
    int8 = engine.cache.int8
    return engine.length, engine.cache.float32.length, 0 if int8 is None else int8.length


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within what an int8 cache costs, and not equal: another cache it was."""
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < difference < 0.05


def test_decoding_goes_through_the_int8_cache_from_a_length_on(bundle, exact):
    found, expected = decoded(Engine(bundle, threads=1, int8_kv_from=30)), decoded(exact)
    np.testing.assert_array_equal(found[:10], expected[:10])  # tokens 20 to 29
    assert_close(found[10:], expected[10:])


def test_a_row_is_rounded_once_to_the_nearest_step_of_its_channel(engine, exact):
    for either in (engine, exact):
        either.prefill(IDS[:20])
    engine.decode(int(IDS[20]))
    assert lengths(engine) == (21, 20, 21)
    assert engine.cache.int8 is not None
    for stored, rows in zip(engine.cache.int8.arrays, exact.cache.float32.arrays, strict=True):
        assert stored.dtype == np.int8
        expected = np.clip(np.rint(rows[:, :, :20] / np.float32(8 / 127)), -128, 127)
        np.testing.assert_array_equal(stored[:, :, :20], expected)


def test_what_was_decoded_in_int8_is_there_for_the_next_prefill(engine, exact):
    """Several tokens at once go through the float32 cache, which gets the rows that only the other one had."""
    engine.prefill(IDS[:20])
    for token in IDS[20:40].tolist():
        engine.decode(token)
    assert lengths(engine) == (40, 20, 40)
    found = engine.prefill(IDS[40:])
    assert lengths(engine) == (80, 80, 40)
    assert_close(found, exact.prefill(IDS))
    assert_close(engine.decode(3), exact.decode(3))
    assert lengths(engine) == (81, 80, 81)


def test_a_prefill_of_a_few_tokens_stays_with_the_int8_cache(engine):
    decoded(engine)
    engine.prefill([1, 2, 3])
    assert lengths(engine) == (83, 20, 83)


def test_keys_and_values_of_every_token_can_be_seen(engine, exact):
    decoded(engine)
    decoded(exact)
    for found, expected in zip(engine.cache.rows(80)[2:], exact.cache.rows(80)[2:], strict=True):
        assert found.shape == (1, 2, 80, 16)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=0.1)


def test_the_second_graph_is_found_from_another_folder(bundle, monkeypatch):
    monkeypatch.chdir(bundle.path.parent)
    engine = Engine(open_bundle(bundle.path.name), threads=1, int8_kv_from=1)
    monkeypatch.chdir(bundle.path)
    decoded(engine)
    assert lengths(engine) == (80, 20, 80)


@pytest.mark.parametrize("length", [-1, 81])
def test_an_impossible_length_is_refused_and_changes_nothing(engine, length):
    decoded(engine)
    with pytest.raises(InputError, match="holds 80 tokens and cannot be trimmed"):
        engine.trim(length)
    assert lengths(engine) == (80, 20, 80)


@pytest.mark.parametrize("length", [10, 30])
def test_trimming_forgets_in_both_caches(engine, tiny, length):
    decoded(engine)
    engine.trim(length)
    assert lengths(engine) == (length, min(length, 20), length)
    other = [*IDS[:length].tolist(), 7, 8, 9]
    for token in other[length:]:
        logits = engine.decode(token)
    assert_close(logits, tiny(other)[-1])


def test_after_a_reset_all_is_as_at_first(engine):
    before = decoded(engine)
    engine.reset()
    assert lengths(engine) == (0, 0, 0)
    np.testing.assert_array_equal(decoded(engine), before)


def test_keeping_a_prefix_keeps_it_in_int8(engine, tiny):
    decoded(engine)
    assert engine.keep_prefix([*IDS[:50].tolist(), 1, 2]) == 50
    assert lengths(engine) == (50, 20, 50)
    assert_close(engine.prefill([1, 2]), tiny([*IDS[:50].tolist(), 1, 2])[-1])


@pytest.mark.parametrize("step", ["reserve", "advance", "trim"])
@pytest.mark.parametrize("which", ["float32", "int8"])
def test_an_interrupt_in_either_cache_leaves_the_next_answer_right(engine, tiny, monkeypatch, which, step):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def change() -> None:
        engine.trim(15)
        engine.decode(1)
        engine.prefill(IDS[16:])

    decoded(engine)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(engine.cache, which), step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            change()
    ids: Sequence[int] = IDS[:30].tolist()
    assert engine.keep_prefix(ids) == 0
    np.testing.assert_allclose(engine.prefill(ids), tiny(ids)[-1], atol=1e-4)


def test_several_rows_keep_the_float32_cache(engine, exact):
    for either in (engine, exact):
        either.forward(IDS[:40].reshape(2, 20))
    np.testing.assert_array_equal(engine.forward(IDS[40:42, None]), exact.forward(IDS[40:42, None]))
    with pytest.raises(InputError, match="holds 2 rows and 1 were given"):
        engine.decode(3)
    assert engine.cache.int8 is None


def test_the_graph_of_all_logits_keeps_the_float32_cache(bundle):
    engine = Engine(bundle, graph="all_logits", threads=1, int8_kv_from=1)
    decoded(engine)
    assert engine.cache.int8 is None


def test_an_older_onnxruntime_decodes_without_it(bundle, exact, monkeypatch):
    monkeypatch.setattr(int8_kv, "MIN_ONNXRUNTIME", "999.0.0")
    np.testing.assert_array_equal(decoded(Engine(bundle, threads=1, int8_kv_from=1)), decoded(exact))
