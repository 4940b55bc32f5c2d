"""Which ids a cache holds: what a new prompt shares with them need not be computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pastkey.values import is_collection, require


class CachedIds:
    """The ids of the tokens in a cache, known for one row without padding.

    They are unknown while the cache changes, since an interrupt may come at any moment, and after a change that
    failed, until the cache is empty again.
    """

    def __init__(self) -> None:
        """Those of an empty cache."""
        self._ids: list[int] | None = []

    @property
    def known(self) -> bool:
        """Whether they are."""
        return self._ids is not None

    def clear(self) -> None:
        """The cache is empty."""
        self._ids = []

    def forget(self) -> None:
        """The ids are unknown."""
        self._ids = None

    @contextmanager
    def changing(self, *, known: bool = True) -> Iterator[list[int]]:
        """Yields the ids, for the block to change them as it changes the cache.

        They are unknown within the block and where it fails; after it, too, unless `known`.
        """
        ids, self._ids = self._ids, None
        yield [] if ids is None else ids
        self._ids = ids if known else None

    def first(self, count: int) -> list[int]:
        """The first `count` of them; none where they are unknown."""
        return (self._ids or [])[:count]

    def shared_with(self, ids: Sequence[int], but: int = 0) -> int:
        """How many of the first of `ids`, without the last `but`, are the first ones here."""
        require(is_collection(ids) and hasattr(ids, "__getitem__"), "ids", ids, "a list of token ids")
        shared = 0
        for mine, theirs in zip(self._ids or (), ids[: len(ids) - but], strict=False):
            if mine != theirs:
                break
            shared += 1
        return shared
