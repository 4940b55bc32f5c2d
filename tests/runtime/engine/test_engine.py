"""Every way through the cache computes what one uncached pass computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, NumericsError
from pastkey.runtime.engine.engine import Engine

MakeBundle = Callable[..., Bundle]
TOLERANCE = 2e-6  # of the largest logit: float32 against the reference's float64


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 37, count)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture
def session(bundle):
    return Engine(bundle, graph="all_logits", threads=1)


@pytest.fixture
def last(bundle):
    return Engine(bundle, threads=1)


# --- one row ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunked_prefill_equals_one_pass(last, tiny, chunk_size):
    ids = random_ids(65)
    assert_close(last.prefill(ids, chunk_size), tiny(ids)[-1])
    assert last.length == 65


def test_logits_of_a_step_stay_what_they_were(last):
    first = last.decode(3)
    kept = first.copy()
    last.decode(4)
    np.testing.assert_array_equal(first, kept)


# --- several rows -------------------------------------------------------------------------------------------------
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), steps=st.integers(0, 6), seed=st.integers(0, 99))
def test_a_padded_batch_equals_each_row_alone(session, tiny, lengths, steps, seed):
    session.reset()
    longest = max(lengths)
    texts = [random_ids(length + steps, seed=seed + row) for row, length in enumerate(lengths)]
    ids, mask = np.zeros((2, len(lengths), longest), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = texts[row][:length], 1
    expected = [tiny(text) for text in texts]
    logits = session.forward(ids, mask)
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], expected[row][:length])
    for step in range(steps):
        column = [[text[length + step]] for text, length in zip(texts, lengths, strict=True)]
        logits = session.forward(column)
        for row, length in enumerate(lengths):
            assert_close(logits[row], expected[row][length + step : length + step + 1])


def test_a_padded_batch_survives_trim_and_growth(session, tiny):
    texts = [random_ids(300, seed=1), random_ids(300, seed=2)]
    ids, mask = np.array([texts[0][:8], texts[1][:8]]), np.ones((2, 8), np.int64)
    mask[1, 5:] = 0
    session.forward(ids, mask)
    for step in range(20):
        session.forward([[1 + step], [2 + step]])
    session.trim(8)
    for step in range(280):
        logits = session.forward([[texts[0][8 + step]], [texts[1][5 + step]]])
    assert_close(logits[0, 0], tiny(texts[0][:288])[-1])
    assert_close(logits[1, 0], tiny(texts[1][:285])[-1])


def test_the_standard_graph_takes_padding_at_the_left(standard_bundle, tiny):
    session = Engine(standard_bundle, threads=1)
    session.forward([[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]])
    logits = session.forward([[9, 1], [9, 2]])
    assert_close(logits[:, 0], np.stack([tiny([5, 9, 1])[-1], tiny([6, 7, 8, 9, 2])[-1]]))


def test_several_tokens_to_several_rows_are_refused_by_the_fused_graph_only(fused_bundle, standard_bundle, tiny):
    session = Engine(fused_bundle, threads=1)
    session.forward([[1, 2], [3, 4]])
    with pytest.raises(InputError, match="appends several tokens to one row only"):
        session.forward([[5, 6], [7, 8]])
    session.forward([[5], [7]])  # and the session is as usable as before
    assert_close(session.forward([[6], [8]])[1], tiny([3, 4, 7, 8])[-1:])
    with pytest.raises(InputError, match="call reset"):
        session.decode(1)
    session = Engine(standard_bundle, threads=1)
    session.forward([[1, 2], [3, 4]])
    assert_close(session.forward([[5, 6], [7, 8]])[1], tiny([3, 4, 7, 8])[-1:])


# --- what is refused ----------------------------------------------------------------------------------------------
MASKED: dict[str, tuple[Any, Any, Any, str]] = {  # graph, ids, mask
    "padding at the left": ("all_logits", [[1, 2, 3]], [[0, 1, 1]], "only at the right end"),
    "padding in the middle": ("all_logits", [[1, 2, 3]], [[1, 0, 1]], "only at the right end"),
    "padding at the end": ("last_logits", [[1, 2], [3, 0]], [[1, 1], [1, 0]], 'open graph="all_logits"'),
    "another shape": ("all_logits", [[1, 2]], [[1]], "ones and zeros of shape"),
    "other values": ("all_logits", [[1, 2]], [[1, 2]], "ones and zeros of shape"),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_that_the_fused_graph_cannot_take_is_refused(fused_bundle, name):
    graph, ids, mask, word = MASKED[name]
    with pytest.raises(InputError, match=word):
        Engine(fused_bundle, graph=graph, threads=1).forward(ids, mask)


@pytest.mark.parametrize("ids", [[37], [-1], [3, 10**9], [], [[1, 2]], [0.5], ["a"], 3])
def test_what_is_no_row_of_ids_is_refused(last, ids):
    whole = isinstance(ids, list) and ids and isinstance(ids[0], int)
    word = "this model's ids are 0 to 36" if whole else r"token ids are whole numbers of shape \(T,\)"
    with pytest.raises(InputError, match=word):
        last.prefill(ids)
    assert last.length == 0


def test_the_whole_context_is_usable_and_no_more(last):
    with pytest.raises(InputError, match="the prompt has 601 tokens; the context is 600"):
        last.prefill(random_ids(601))
    last.prefill(random_ids(599))
    last.decode(1)
    with pytest.raises(InputError, match="600 tokens are in the cache and 1 more were given"):
        last.decode(1)
    assert last.length == 600


def test_nan_in_the_logits_names_the_position(tiny, make_bundle):
    weights = dict(tiny.weights)
    weights["position"] = weights["position"].copy()
    weights["position"][5] = np.nan
    broken = make_bundle(replace(tiny, weights=weights), "standard")
    session = Engine(broken, graph="all_logits", threads=1)
    session.prefill(random_ids(5))
    with pytest.raises(NumericsError, match="position 5 of row 0"):
        session.decode(1)
    with pytest.raises(NumericsError, match="position 7 of row 0"):
        Engine(broken, threads=1).prefill(random_ids(8))


@pytest.mark.parametrize("graph", ["fused", "standard"])
def test_a_run_that_failed_leaves_the_cache_as_it_was(tiny, make_bundle, graph):
    weights = dict(tiny.weights)
    weights["position"] = weights["position"].copy()
    weights["position"][5:] = np.nan
    session = Engine(make_bundle(replace(tiny, weights=weights), graph), threads=1)
    ids = random_ids(5)
    session.prefill(ids)
    keys = session.cache.rows(5)[0].copy()
    for _ in range(2):
        with pytest.raises(NumericsError):
            session.decode(1)
    assert session.length == 5
    np.testing.assert_array_equal(session.cache.rows(5)[0], keys)
    session.trim(4)
    assert_close(session.decode(int(ids[4])), tiny(ids)[-1])


def test_nan_at_padding_is_no_error(session):
    logits = np.zeros((1, 3, 37), np.float32)
    logits[0, 2] = np.nan
    session.graph.check_finite(logits, 0, 3, np.array([[1, 1, 0]]))
    with pytest.raises(NumericsError, match="position 2"):
        session.graph.check_finite(logits, 0, 3, np.array([[1, 0, 1]]))


# --- keeping a prefix ---------------------------------------------------------------------------------------------
IDS = [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ([5, 6, 7, 8, 9, 10, 11], 5),
        ([5, 6, 7, 8, 9], 3),  # two are left to feed, for the path of a prefill
        ([5, 6, 7], 1),
        ([5, 6, 1, 8, 9, 10], 2),
        ([1, 6, 7], 0),
        ([5], 0),
    ],
)
def test_prefill_after_keep_prefix_equals_fresh_prefill(session, tiny, wanted, kept):
    session.prefill(IDS[:-2])
    for token in IDS[-2:]:
        session.decode(token)
    resets = session.resets
    assert session.keep_prefix(wanted) == kept
    assert session.length == kept
    assert session.resets == resets + 1  # whoever else used the cache can tell
    np.testing.assert_allclose(session.prefill(wanted[kept:]), tiny(wanted)[-1], atol=1e-4)
    assert session.keep_prefix([*wanted, 3]) == len(wanted) - 1


def test_keep_prefix_forgets_rows_and_padding_that_it_cannot_compare(session):
    session.forward([[5, 6, 7]], mask=[[1, 1, 0]])
    assert session.keep_prefix([5, 6, 7, 8]) == 0
    session.forward([[5, 6], [7, 8]])
    assert session.keep_prefix([5, 6, 7]) == 0
    session.reset()
    session.prefill([5, 6])
    assert session.keep_prefix([5, 6, 7, 8]) == 2
