"""Embeddings of texts: the pooled last hidden states of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.errors import InputError

from ..decoding.many import several
from ..engine.caches.capacity import GROWTH_STEP, grown
from ..engine.decoder_graph import PREFILL_CHUNK, HiddenStates, Ids
from ..engine.engine import Engine
from ..options import require_valid
from .parts import ModelParts

_ROOM = 8 * GROWTH_STEP  # the largest capacity in tokens of a cache of several sequences


def embed(parts: ModelParts, text: Any, pooling: str, *, normalize: bool) -> npt.NDArray[np.float32]:
    """See `LanguageModel.embed`."""
    require_valid({"pooling": pooling, "normalize": normalize})
    many = several(text)
    if many and pooling == "none":
        raise InputError('with the pooling "none" each token has its own vector: give one text at a time')
    engine = parts.new_engine()
    engine.graph.require_hidden_states()
    given = enumerate(text) if many else [(None, text)]
    texts = [_checked(parts, engine, one, number) for number, one in given]
    pooled: dict[int, npt.NDArray[np.float64]] = {}
    try:
        for places in _groups([ids.size for ids in texts], engine):
            parts.memory.promise(engine, _room(max(texts[place].size for place in places), engine), len(places))
            pooled |= zip(places, _pooled(parts, engine, [texts[place] for place in places], pooling), strict=True)
    finally:
        parts.memory.release(engine)
    found = np.stack([pooled[place] for place in range(len(texts))])
    if normalize:
        found /= np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return (found if many else found[0]).astype(np.float32)


def _checked(parts: ModelParts, engine: Engine, text: Any, number: int | None) -> Ids:
    """The ids (T,) of one text. `number`: its place in a list, for the InputError."""
    try:
        ids = parts.prompt_ids(text, "text")
        if not ids:
            raise InputError("the text is empty: give at least one token")
        return engine.checked(ids, 1)
    except InputError as error:
        raise InputError(f"text {number} of the list: {error}" if number is not None else str(error)) from None


def _groups(lengths: Sequence[int], engine: Engine) -> Iterator[list[int]]:
    """Groups the places of texts by length, the shortest first. Several fit in a chunk of a prefill."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        length, count = lengths[place], len(group) + 1
        fit = count * length <= PREFILL_CHUNK and count * _room(length, engine) <= _ROOM
        if group and not (fit and (engine.graph.takes_padding or lengths[group[0]] == length)):
            yield group
            group = []
        group.append(place)
    yield group


def _room(length: int, engine: Engine) -> int:
    """The capacity in tokens of a sequence's cache."""
    return grown(0, length, engine.manifest.context_length)


def _pooled(parts: ModelParts, engine: Engine, texts: list[Ids], pooling: str) -> list[npt.NDArray[np.float64]]:
    """Returns a vector (H,) for each text (T,); with "none" one for each token, (T, H)."""
    longest = max(ids.size for ids in texts)
    rows = np.zeros((len(texts), longest), np.int64)
    mask = np.zeros_like(rows)
    for row, ids in enumerate(texts):
        rows[row, : ids.size], mask[row, : ids.size] = ids, 1
    sizes = [longest] if len(texts) > 1 else engine.chunk_sizes(longest)
    engine.reset()
    total: npt.NDArray[np.float64] | float = 0.0
    states: list[HiddenStates] = []
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        chunk = slice(start, end)
        states = [*(states if pooling == "none" else ()), _run(parts, engine, rows[:, chunk], mask[:, chunk])]
        if pooling == "mean":
            # Padding may hold NaN: older releases of onnxruntime leave it unwritten.
            real = mask[:, chunk, None].astype(bool)
            total = total + np.sum(states[-1], axis=1, dtype=np.float64, where=real)
    if pooling == "mean":
        return [*(total / mask.sum(1, keepdims=True))]
    if pooling == "last":
        before = longest - sizes[-1]
        return [row[ids.size - 1 - before].astype(np.float64) for row, ids in zip(states[-1], texts, strict=True)]
    return [np.concatenate(states, axis=1)[0].astype(np.float64)]


def _run(parts: ModelParts, engine: Engine, rows: Ids, mask: Ids) -> HiddenStates:
    """Runs the next tokens (B, T) of a batch. Returns their hidden states (B, T, H)."""
    found: list[HiddenStates] = []
    parts.scheduler.exclusively(lambda: found.append(engine.hidden_states(rows, mask)))
    return found[0]
