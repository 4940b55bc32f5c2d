"""The draft model: a faster bundle with the same vocabulary, whose tokens the target model accepts or rejects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pastkey.errors import InputError

from ..decoding.batching.cache_budget import CacheMemory
from ..decoding.batching.prefix_cache import PrefixStore
from ..engine.decoder_graph import DecoderGraph
from ..engine.engine import Engine
from ..speculation.drafter import Drafter
from .parts import ModelParts


class DraftingModel(Protocol):
    """The interface of a loaded model that drafts for another."""

    parts: ModelParts

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""

    def close(self) -> None:
        """Releases the model."""


class DraftModel:
    """The draft model of a target model.

    Attributes:
        model: The loaded draft model.
        opened: Whether it was loaded only for this target and is closed with it.
    """

    def __init__(self, model: DraftingModel, opened: bool) -> None:
        self.model, self.opened = model, opened
        self._stores: list[PrefixStore] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads it by its path."""
        return DraftModel, (self.model, self.opened)

    def attach(self, graph: DecoderGraph, prefix_bytes: int) -> list[PrefixStore]:
        """Attaches it to a target model over `graph`.

        Returns:
            The prefix stores of the draft model and of the target. They share `prefix_bytes` in proportion to their
            caches of a full context.
        """
        graphs = [self.model.parts.require_open().graph, graph]
        sizes = [graph.cache_bytes(graph.manifest.context_length) for graph in graphs]
        self._stores = [
            PrefixStore(g, prefix_bytes * size // sum(sizes)) for g, size in zip(graphs, sizes, strict=True)
        ]
        return self._stores

    def require_fit(self, target: ModelParts) -> None:
        """Raises InputError if the vocabularies differ, or one of the models does not support drafting."""
        _require_forgetting(target, self.model.parts)
        _require_same_vocabulary(target, self.model.parts)

    def drafter(self, memory: CacheMemory) -> Drafter | None:
        """A drafter for a new request; None if the draft model is closed."""
        if self.model.closed:
            return None
        store = self._stores[0]

        def take(ids: Sequence[int], most: int) -> Engine:
            engine, _ = store.take(ids)
            engine.marks = True
            memory.promise(engine, most)
            return engine

        def give_back(engine: Engine) -> None:
            memory.release(engine)
            if not self.model.closed:
                store.put(engine)

        return Drafter(take, give_back)

    def close(self) -> None:
        """Releases its caches, and closes it if it was opened for this target."""
        for store in self._stores:
            store.clear()
        if self.opened:
            self.model.close()


def _require_forgetting(target: ModelParts, draft: ModelParts) -> None:
    if not target.require_open().graph.supports_drafts:
        raise InputError(
            f"a draft model is of no use to {target.bundle.path}, which decodes token by token, since its cache cannot "
            "forget rejected tokens without moving the others: load it without a draft, or export it with --graph fused"
        )
    if draft.manifest.rows:
        raise InputError(
            f"{draft.bundle.path} cannot draft: it keeps the last rows of short convolutions, which cannot forget "
            "rejected tokens; use another draft model"
        )


def _require_same_vocabulary(target: ModelParts, draft: ModelParts) -> None:
    if target.tokenizer is None or draft.tokenizer is None:
        mine, its = target.manifest.vocab_size, draft.manifest.vocab_size
        difference = None if mine == its else f"it has {its} token ids, and the model has {mine}"
    else:
        difference = _difference(target.tokenizer.vocabulary(), draft.tokenizer.vocabulary())
    if difference is not None:
        raise InputError(
            f"{draft.bundle.path} has another vocabulary than {target.bundle.path} ({difference}): a draft model has "
            "every token of its model, with the same id"
        )


def _difference(mine: Mapping[str, int], its: Mapping[str, int]) -> str | None:
    for token in mine if mine != its else ():
        if its.get(token) != mine[token]:
            found = "it does not have" if token not in its else f"is its {its[token]}"
            return f"the model's token {mine[token]}, {token!r}, {found}"
    more = len(its) - len(mine)
    return f"it has {more} tokens that the model does not have" if more else None
