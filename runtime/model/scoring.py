"""Log-probabilities of texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..sampling.log_probs import token_logprob
from .parts import ModelParts


@dataclass(frozen=True)
class Score:
    """The log-probability of a text by the model, independent of sampling options.

    Attributes:
        ids: Its tokens.
        logprobs: The natural log-probability of each token, given those before it; None for the first. These are
            numbers; `generate(logprobs=)` returns TokenLogprobs, which include the likeliest tokens.
        total: Their sum, in nats.

    All tokens are computed together, like a prompt. `generate(logprobs=)` computes tokens one by one. In int8 and int4
    its log-probabilities differ by the rounding of activations: 0.014 nats per token for SmolLM2-135M in int8.
    """

    ids: list[int]
    logprobs: list[float | None]
    total: float

    @property
    def mean(self) -> float:
        """`total` divided by the number of tokens after the first; 0 if there is only one."""
        return self.total / (len(self.ids) - 1) if len(self.ids) > 1 else 0.0


def score(parts: ModelParts, ids: list[int]) -> Score:
    """The score of `ids` (T,), computed in chunks. Only the logits of one chunk are in memory."""
    logprobs: list[float | None] = [None]
    for logits in logits_by_chunk(parts, ids):
        following = ids[len(logprobs) : len(logprobs) + len(logits)]
        logprobs += [token_logprob(row, token).logprob for row, token in zip(logits, following, strict=False)]
    return Score(list(ids), logprobs, float(sum(number for number in logprobs if number is not None)))


def logits_by_chunk(parts: ModelParts, ids: npt.ArrayLike) -> Iterator[npt.NDArray[np.float32]]:
    """The logits of every position of `ids` (T,), from an empty cache: arrays (t, V), one for each chunk.

    Raises:
        InputError: `ids` are empty, out of range or longer than the context; or the model is closed.
        NumericsError: The model yields NaN or infinity.
        ResourceError: The cache would need more than `max_memory` bytes.
    """
    engine = parts.new_engine()
    tokens = engine.checked(ids, 1)
    parts.memory.promise(engine, tokens.size)
    try:
        for chunk in np.split(tokens, np.cumsum(engine.chunk_sizes(tokens.size))[:-1]):
            found: list[npt.NDArray[np.float32]] = []
            parts.scheduler.exclusively(lambda chunk=chunk, found=found: found.append(engine.all_logits(chunk)))  # type: ignore[misc]
            yield found[0]
    finally:
        parts.memory.release(engine)
