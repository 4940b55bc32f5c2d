"""Decoding with an int8 cache after a long text: the same model, in less memory, and back again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pastkey.bundle import Bundle, open_bundle
from pastkey.errors import InputError
from pastkey.export import embedding, export, int8_cache
from pastkey.export.evaluate import kl_divergence
from pastkey.runtime import Session, session
from pastkey.runtime.int8_cache import LONG_CONTEXT

from .decoders import llama

IDS = np.random.default_rng(0).integers(0, 61, 80)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("long") / "bundle"
    export(llama(), folder, context_length=LONG_CONTEXT + 1)
    return open_bundle(folder)


def decoded(session: Session, first: int = 20) -> np.ndarray:
    session.reset()
    session.prefill(IDS[:first])
    return np.stack([session.decode(int(token)) for token in IDS[first:]])


def test_an_int8_cache_is_close_to_a_float32_one(bundle: Bundle) -> None:
    assert bundle.long_graph is not None
    assert 0 < bundle.manifest.quality["int8_cache_kl"] < 1e-3
    exact, rounded = (decoded(Session(bundle, int8_cache_from=first)) for first in (None, 30))
    np.testing.assert_array_equal(rounded[:10], exact[:10])  # tokens 20 to 29
    assert np.abs(rounded[10:] - exact[10:]).max() > 0
    assert kl_divergence(exact, rounded) < 1e-3


def test_a_table_that_is_read_from_the_file_stays_what_it_is(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows have four axes, as the cache has, and are uint8."""
    monkeypatch.setattr(embedding, "_LARGE", 1)
    report = export(llama(), tmp_path / "rows", context_length=LONG_CONTEXT + 1)
    made = open_bundle(tmp_path / "rows")
    assert made.long_graph is not None
    assert report.manifest.quality["int8_cache_kl"] == bundle.manifest.quality["int8_cache_kl"]
    np.testing.assert_array_equal(
        decoded(Session(made, int8_cache_from=30)), decoded(Session(bundle, int8_cache_from=30))
    )


def test_a_context_that_never_gets_long_has_no_such_graph(tmp_path: Path) -> None:
    report = export(llama(), tmp_path / "short", context_length=LONG_CONTEXT)
    made = open_bundle(tmp_path / "short")
    assert made.long_graph is None
    assert "int8_cache_kl" not in report.manifest.quality
    assert decoded(Session(made, int8_cache_from=1)).shape == (60, 61)


def test_an_int8_cache_that_costs_too_much_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_cache, "_ROOM", 0.05)  # cuts off nearly everything
    report = export(llama(), tmp_path / "cut", context_length=LONG_CONTEXT + 1)
    assert open_bundle(tmp_path / "cut").long_graph is None
    assert "int8_cache_kl" not in report.manifest.quality


def test_what_was_decoded_in_int8_is_there_for_the_next_prefill(bundle: Bundle) -> None:
    """Several tokens at once go through the float32 cache, which gets the rows that only the other one had."""
    one = Session(bundle, int8_cache_from=1)
    one.prefill(IDS[:20])
    for token in IDS[20:40].tolist():
        one.decode(token)
    assert (one.length, one.cache.length) == (40, 20)
    found = one.prefill(IDS[40:])
    assert (one.length, one.cache.length) == (80, 80)
    other = Session(bundle, int8_cache_from=None)
    expected = other.prefill(IDS)
    assert kl_divergence(expected[None], found[None]) < 1e-3
    for mine, theirs in zip(one.cache.layer(0), other.cache.layer(0), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.02 * np.abs(theirs).max())
    again = one.decode(3)
    assert kl_divergence(other.decode(3)[None], again[None]) < 1e-3


def test_a_prefill_of_a_few_tokens_stays_with_the_int8_cache(bundle: Bundle) -> None:
    one = Session(bundle, int8_cache_from=1)
    decoded(one)
    one.prefill([1, 2, 3])
    assert (one.length, one.cache.length) == (83, 20)


def test_the_second_graph_is_found_from_another_folder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.path.parent)
    one = Session(open_bundle(bundle.path.name), int8_cache_from=1)
    monkeypatch.chdir(bundle.path)
    assert decoded(one).shape == (60, 61)


@pytest.mark.parametrize("length", [-1, 81])
def test_an_impossible_length_is_refused_and_changes_nothing(bundle: Bundle, length: int) -> None:
    one = Session(bundle, int8_cache_from=1)
    decoded(one)
    with pytest.raises(InputError, match="holds 80 tokens and cannot be trimmed"):
        one.trim(length)
    assert one.length == 80


def test_several_rows_keep_the_float32_cache(bundle: Bundle) -> None:
    one, other = Session(bundle, int8_cache_from=1), Session(bundle, int8_cache_from=None)
    for either in (one, other):
        either.forward(IDS[:40].reshape(2, 20))
    np.testing.assert_array_equal(one.forward(IDS[40:42, None]), other.forward(IDS[40:42, None]))
    with pytest.raises(InputError, match="holds 2 rows and 1 were given"):
        one.decode(3)


@pytest.mark.parametrize("length", [10, 30])
def test_trimming_forgets_in_both_caches(bundle: Bundle, length: int) -> None:
    one = Session(bundle, int8_cache_from=1)
    before = decoded(one)
    one.trim(length)
    assert one.length == length
    after = np.stack([one.decode(int(token)) for token in IDS[length:]])
    np.testing.assert_allclose(after[-50:], before[-50:], atol=0.02 * np.abs(before).max())
    one.reset()
    assert one.length == 0
    np.testing.assert_array_equal(decoded(one), before)


def test_an_older_onnxruntime_decodes_without_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = decoded(Session(bundle, int8_cache_from=None))
    monkeypatch.setattr(session, "MIN_ONNXRUNTIME", "999.0.0")
    np.testing.assert_array_equal(decoded(Session(bundle, int8_cache_from=1)), exact)
