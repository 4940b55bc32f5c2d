from __future__ import annotations

import pytest

from pastkey.runtime.engine.cached_ids import CachedIds


@pytest.fixture
def cached() -> CachedIds:
    ids = CachedIds()
    with ids.changing() as now:
        now += [5, 6, 7]
    return ids


@pytest.mark.parametrize(
    ("ids", "shared"), [([5, 6, 7, 8], 3), ([5, 6, 7], 3), ([5, 6], 2), ([5, 1, 7], 1), ([1, 6, 7], 0), ([], 0)]
)
def test_what_is_shared_is_counted_up_to_the_first_difference(cached: CachedIds, ids: list[int], shared: int) -> None:
    assert cached.shared_with(ids) == shared


def test_an_empty_cache_shares_nothing() -> None:
    assert CachedIds().shared_with([5, 6]) == 0


def test_a_change_is_noted_when_it_has_ended(cached: CachedIds) -> None:
    with cached.changing() as now:
        del now[1:]
        now += [9]
        assert cached.shared_with([5]) == 0
    assert cached.shared_with([5, 9, 7]) == 2


def test_after_a_change_that_failed_they_are_unknown_until_the_cache_is_empty(cached: CachedIds) -> None:
    with pytest.raises(KeyboardInterrupt), cached.changing():
        raise KeyboardInterrupt
    with cached.changing() as now:
        now += [5]
    assert cached.shared_with([5]) == 0
    cached.clear()
    with cached.changing() as now:
        now += [5]
    assert cached.shared_with([5]) == 1


def test_several_rows_or_padding_make_them_unknown(cached: CachedIds) -> None:
    with cached.changing(known=False) as now:
        now += [8]
    assert cached.shared_with([5, 6]) == 0


def test_what_was_forgotten_is_unknown(cached: CachedIds) -> None:
    cached.forget()
    assert cached.shared_with([5]) == 0
