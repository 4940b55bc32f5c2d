"""Several rows, refusals, and the state after a failed run. `caches/test_caches.py` has the ways of one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, NumericsError
from pastkey.runtime import Engine

from ..conftest import ids_of, require_close


@pytest.fixture
def session(bundle):
    return Engine(bundle, graph="all_logits", threads=1)


def test_logits_of_a_step_stay_what_they_were(engine):
    first = engine.decode(3)
    kept = first.copy()
    engine.decode(4)
    np.testing.assert_array_equal(first, kept)
    assert first.dtype == np.float32


# --- several rows -------------------------------------------------------------------------------------------------
def test_a_padded_batch_survives_trim_and_growth(session, tiny):
    texts = [ids_of(300, seed=1), ids_of(300, seed=2)]
    ids, mask = np.array([texts[0][:8], texts[1][:8]]), np.ones((2, 8), np.int64)
    mask[1, 5:] = 0
    session.forward(ids, mask)
    for step in range(20):
        session.forward([[1 + step], [2 + step]])
    session.trim(8)
    for step in range(280):
        logits = session.forward([[texts[0][8 + step]], [texts[1][5 + step]]])
    require_close(logits[:, 0], np.stack([tiny(texts[0][:288])[-1], tiny(texts[1][:285])[-1]]))


def test_several_tokens_to_several_rows_are_refused_by_the_fused_graph_only(fused_bundle, standard_bundle, tiny):
    fused, standard = (Engine(bundle, threads=1) for bundle in (fused_bundle, standard_bundle))
    for session in (fused, standard):
        session.forward([[1, 2], [3, 4]])
    with pytest.raises(InputError, match="appends several tokens to one row only"):
        fused.forward([[5, 6], [7, 8]])
    fused.forward([[5], [7]])  # and the session is as usable as before
    require_close(fused.forward([[6], [8]])[1], tiny([3, 4, 7, 8])[-1:])
    with pytest.raises(InputError, match="call reset"):
        fused.decode(1)
    require_close(standard.forward([[5, 6], [7, 8]])[1], tiny([3, 4, 7, 8])[-1:])


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
def test_what_is_no_row_of_ids_is_refused(engine, ids):
    whole = isinstance(ids, list) and ids and isinstance(ids[0], int)
    word = "this model's ids are 0 to 36" if whole else r"token ids are whole numbers of shape \(T,\)"
    with pytest.raises(InputError, match=word):
        engine.prefill(ids)
    assert engine.length == 0


def test_the_whole_context_is_usable_and_no_more(engine):
    with pytest.raises(InputError, match="the prompt has 601 tokens; the context is 600"):
        engine.prefill(ids_of(601))
    engine.prefill(ids_of(599))
    engine.decode(1)
    with pytest.raises(InputError, match="600 tokens are in the cache and 1 more were given"):
        engine.decode(1)
    assert engine.length == 600


@pytest.mark.parametrize("graph", ["fused", "standard"])
def test_a_run_that_failed_names_the_position_and_leaves_the_cache_as_it_was(tiny, make_bundle, graph):
    session = Engine(make_bundle(tiny.spoilt(slice(5, None)), graph), threads=1)
    ids = ids_of(5)
    session.prefill(ids)
    keys = session.cache.rows(5)[0].copy()
    for new, place in (([1], 5), ([1, 2, 3], 7)):
        with pytest.raises(NumericsError, match=f"position {place} of row 0"):
            session.append(new)
    assert session.length == 5
    np.testing.assert_array_equal(session.cache.rows(5)[0], keys)
    session.trim(4)
    require_close(session.decode(ids[4]), tiny(ids)[-1])


def test_nan_at_padding_is_no_error(session):
    logits = np.zeros((1, 3, 37), np.float32)
    logits[0, 2] = np.nan
    session.graph.check_finite(logits, 0, 3, np.array([[1, 1, 0]]))
    with pytest.raises(NumericsError, match="position 2"):
        session.graph.check_finite(logits, 0, 3, np.array([[1, 0, 1]]))


# --- keeping a prefix ---------------------------------------------------------------------------------------------
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
    session.prefill([5, 6, 7])
    session.decode(8)
    session.decode(9)
    resets = session.resets
    assert session.keep_prefix(wanted) == kept == session.length
    assert session.resets == resets + 1  # another user of the cache can tell
    require_close(session.prefill(wanted[kept:]), tiny(wanted)[-1])
    assert session.keep_prefix([*wanted, 3]) == len(wanted) - 1


def test_keep_prefix_forgets_rows_and_padding_that_it_cannot_compare(session):
    session.forward([[5, 6, 7]], mask=[[1, 1, 0]])
    assert session.keep_prefix([5, 6, 7, 8]) == 0
    session.forward([[5, 6], [7, 8]])
    assert session.keep_prefix([5, 6, 7]) == 0
    session.reset()
    session.prefill([5, 6])
    assert session.keep_prefix([5, 6, 7, 8]) == 2
