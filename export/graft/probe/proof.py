"""Compares a module that decodes with a cache with its author's call, which has none, in torch and before any trace.

A cached run goes through a text in growing pieces, as prefill and decode do, and ends each with a single token. After
each piece the author's call computes the text so far. A module of the contract and a followed one are proved alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...compare import LOGITS, logits_difference
from ..attention import Handler, intercept, torch_attention
from ..streamed import computing_in_float64, in_float64
from .call import Call
from .hints import Hints, find_hints
from .observe import Observation, StandIn, Uncached, evaluating, random_ids, run_on, run_uncached

SHORTEST = 12  # tokens of the longest text where nothing more is asked
_WORK = 5e11  # multiplications of the runs over one text: about 10 s on two cores
_SCORES = 1 << 26  # attention scores of one run
_LOGITS = 1 << 26  # of one cached run; a quarter of those of the author's call on the longest text
_BYTES = 1 << 29  # of the largest tensor of a run
_SHORT = 512  # tokens of a text that is one of several
_NEAR = (
    1.3  # the least factor between the last two lengths: a comparison has the rows since the one before, if they fit
)
_GROWTH = (1.618, 5)  # from one compared length to the next; the larger one where the runs cost much


@dataclass(frozen=True)
class Proof:
    """The scope of a comparison."""

    longest: int  # tokens of the longest text
    differs: int = 0  # tokens of the shortest text found to differ; 0: none differs
    off: float = 0.0  # by how much of its largest logit


def prove(
    module: nn.Module, model: nn.Module, call: Call, observation: Observation, context_length: int, *, brief: bool
) -> Proof:
    """Compares `module`, which is `model` or follows it, with `call(model, ids)`. May raise the module's errors.

    Where float32 differs, float64 decides: rounding may choose another expert.
    """
    runs = _Runs(module, model, call, observation)
    if brief:
        longest = min(SHORTEST, context_length)
        texts = [(random_ids(1, longest, observation.vocab_size, seed=1), _lengths(longest, _GROWTH[0]))]
    else:
        longest, texts = _texts(runs, context_length)
    for ids, lengths in texts:
        differs, off = runs.first_difference(ids, lengths)
        if differs and not runs.wide and (wide := runs.in_float64()) is not None:
            runs = wide
            differs, off = runs.first_difference(ids, lengths)
        if differs:
            at = lengths.index(differs)
            return Proof(longest, *runs.smallest(ids, lengths[at - 1] if at else 0, differs, off))
    return Proof(longest)


def _texts(runs: _Runs, context_length: int) -> tuple[int, list[tuple[Tensor, list[int]]]]:
    """The longest length, and the texts (1, T) with the lengths at which they are compared."""
    vocab = runs.observation.vocab_size
    hints = runs.hints(context_length)
    longest = runs.reach(hints, context_length)
    growth = _GROWTH[0] if runs.work(longest, _GROWTH[0]) <= _WORK else _GROWTH[1]
    short = min(longest, _SHORT if growth == _GROWTH[0] else SHORTEST)
    most = int(_WORK / (4 * runs.work(short, _GROWTH[1])))
    hints = dataclasses.replace(hints, tokens=hints.tokens[: max(4, most)])
    near = {n for c in hints.lengths for n in range(c - 1, c + 3) if 1 <= n <= longest}
    texts = [(random_ids(1, longest, vocab, seed=2), sorted({*_lengths(longest, growth), *near}))]
    if growth != _GROWTH[0] and not hints.tokens:  # a run costs much
        return longest, texts
    texts.append((random_ids(1, longest, vocab, seed=3), _split(longest)))
    texts += [(torch.full((1, short), token), [short]) for token in sorted({0, vocab // 3, vocab - 1, *hints.tokens})]
    texts += [(text, _split(short)) for text in _with_inserted(random_ids(1, short, vocab, seed=4), hints.tokens)]
    return longest, texts


def _with_inserted(ids: Tensor, tokens: Sequence[int]) -> Iterator[Tensor]:
    """The text (1, T) with each token first, last or near its end, and with all pairs of them from its middle on."""
    length = ids.shape[1]
    for token in tokens:
        for place in {0, length * 3 // 4, length - 1}:
            text = ids.clone()
            text[0, place] = token
            yield text
    pairs = [token for one in tokens for other in tokens for token in (one, other)][: length - length // 2]
    text = ids.clone()
    text[0, length // 2 : length // 2 + len(pairs)] = torch.tensor(pairs, dtype=torch.long)
    if pairs:
        yield text


def _split(length: int) -> list[int]:
    return sorted({max(1, length // 5), length})


def _lengths(longest: int, growth: float) -> list[int]:
    """1, 2, then each `growth` times the one before, rounded up, and the longest; none near it where runs cost much."""
    found = [1, 2]
    while found[-1] < longest:
        found.append(math.ceil(found[-1] * growth))
    return [n for n in found if n * (_NEAR if growth == _GROWTH[1] else 1) < longest] + [longest]


class _Runs:
    """The runs of one module and of its author's call."""

    def __init__(self, module: nn.Module, model: nn.Module, call: Call, observation: Observation) -> None:
        self.observation = observation
        self.wide = False  # in float64
        self._module, self._model, self._call = module, model, call
        self._heads = max((layer.heads for layer in observation.layers), default=1)

    def in_float64(self) -> _Runs | None:
        """The same runs in float64; None if the module cannot compute in it."""
        try:
            module = in_float64(self._module)
            model = module.model if isinstance(module, StandIn) and self._model is not self._module else module
            runs = _Runs(module, model, self._call, self.observation)
            runs.wide = True
            runs.first_difference(torch.zeros(1, 2, dtype=torch.long), [1, 2])
        except Exception:  # a user's module may raise anything in a precision that it was not written for
            return None
        return runs

    # --- their costs ---
    def work(self, length: int, growth: float) -> float:
        """Multiplications of a cached run over a text and of the author's calls at its lengths."""
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        scores = sum(
            layer.heads * (layer.geometry.key_head_size + layer.geometry.value_head_size)
            for layer in self.observation.layers
        )
        return (1 + growth / (growth - 1)) * (parameters * length + scores * length * length / 2)

    def reach(self, hints: Hints, context_length: int) -> int:
        """Tokens of the longest text, which the work, the memory and the context allow."""
        longest = min(context_length, max(SHORTEST, _BYTES // hints.bytes_per_token))
        while longest > SHORTEST and self.work(longest, _GROWTH[1]) > _WORK:
            longest = max(SHORTEST, longest * 9 // 10)
        return min(longest, max(SHORTEST, 4 * _LOGITS // self.observation.vocab_size))

    def hints(self, context_length: int) -> Hints:
        """Runs the author's call; the reductions of a followed module are known from its trace."""
        own = self._model is self._module and not isinstance(self._module, StandIn)

        def run(ids: Tensor, handler: Handler) -> object:
            with evaluating(self._model), intercept(handler):
                if isinstance(self._model, StandIn):
                    return self._model(ids, position_ids=torch.arange(ids.shape[1])[None])
                return self._call.raw(self._model, ids)

        def share(part: float) -> float:
            return _WORK / (part * self.work(1, _GROWTH[1]) * self.observation.vocab_size)

        return find_hints(run, context_length, self.observation.vocab_size, share if own else None)

    # --- comparing ---
    def first_difference(self, ids: Tensor, lengths: Sequence[int]) -> tuple[int, float]:
        """The first of the lengths of a text (1, T) at which the runs differ, and by how much; 0 if none."""
        past, start = Uncached(torch.empty(0)), 0
        most = max(1, _LOGITS // self.observation.vocab_size)  # rows that are compared at each length: the last ones
        with computing_in_float64() if self.wide else contextlib.nullcontext():
            for length in lengths:
                found: list[Tensor] = []
                for end in self._ends(start, length):
                    past = self._run_on(past, ids[:, start:end])
                    found = [torch.cat([*found, past.logits], 1)[:, -most:]]
                    start = end
                off = self._apart(ids[:, :length], found[0])
                if not off <= LOGITS:  # also true for NaN
                    return length, off
        return 0, 0.0

    def smallest(self, ids: Tensor, equal: int, differs: int, off: float) -> tuple[int, float]:
        """A length that differs, and by how much, between one that is equal and one that differs: by bisection."""
        while differs - equal > 1:
            middle = (equal + differs) // 2
            found, far = self.first_difference(ids, _split(middle))
            equal, differs, off = (equal, found, far) if found else (middle, differs, off)
        return differs, off

    def _ends(self, start: int, length: int) -> Iterator[int]:
        """The ends of the pieces from `start` to `length`: a single last token, the others as memory allows."""
        largest = max(1, min(_LOGITS // self.observation.vocab_size, _SCORES // (self._heads * length)))
        yield from range(start + largest, length - 1, largest)
        yield from sorted({max(length - 1, start + 1), length})

    def _run_on(self, past: Uncached, ids: Tensor) -> Uncached:
        return run_on(self._module, past, ids) if past.length else run_uncached(self._module, ids)

    def _apart(self, ids: Tensor, found: Tensor) -> float:
        """How far the last logits (1, n, V) of a cached run are from the author's, or as many as these returns."""
        try:
            expected = self._author(ids)
        except Exception:  # a user's module may raise anything
            if ids.shape[1] > 1:
                raise
            return 0.0  # the call does not accept a single token
        count = min(found.shape[1], expected.shape[1])
        return logits_difference(expected[:, -count:], found[:, -count:])

    def _author(self, ids: Tensor) -> Tensor:
        """Logits (1, n, V) of the author's call."""
        if isinstance(self._model, StandIn) and self._heads * ids.shape[1] ** 2 > _SCORES:
            return run_uncached(self._model, ids).logits  # attention written out needs more memory than torch's
        with evaluating(self._model), intercept(torch_attention):
            return self._call(self._model, ids)
