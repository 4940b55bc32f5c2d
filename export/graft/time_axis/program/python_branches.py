"""Records questions of a module's Python code to tensors, e.g. `if mask.any()`: torch cannot answer while it traces.

A branch on a table or on positions has the same answer for every sequence. Real runs record it, and the trace reuses
it. A branch on values computed from the tokens is refused, unless the other answer only raises an error, as an
assertion does, or only skips experts without rows (`routing`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pastkey.quiet import quiet

from ....compare import LOGITS, relative_difference
from ...attention import calling_line, failing_line, is_raised
from ...probe.causes import Cause, Kind, ObstacleError
from .dependence import Dependence
from .routing import Chosen, Decision

Run = Callable[[Tensor], Tensor]  # the author's call

_TEXTS = 4  # random sequences, on which the answers are recorded
_SHORT = (1, 2, 3)  # tokens of the sequences on which most experts have none
_SHORT_TEXTS = 8  # sequences of each of these lengths
_ASKS = (
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__, Tensor.item,
    Tensor.tolist, torch.equal, torch.allclose, torch.is_nonzero, Tensor.equal, Tensor.allclose, Tensor.is_nonzero,
)  # fmt: skip
_COUNTS = {torch.bincount, Tensor.bincount, torch.nn.functional.one_hot}
_STATEMENT = 8  # most lines of a statement that raises an error


@dataclass(frozen=True)
class Heard:
    """The answers that are the same for every sequence of one length, in the order of the questions."""

    answers: Sequence[Any]
    decisions: Sequence[Decision]


class Replay(Chosen):
    """While open, replays the answers and the decisions on rows."""

    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self._answers, self._decisions = iter(heard.answers), iter(heard.decisions)

    def decide(self, mask: Tensor, listed: bool) -> Decision:
        return next(self._decisions, Decision())

    def plainly(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _ASKS:
            return next(self._answers)
        if func in (torch.bincount, Tensor.bincount):  # torch cannot trace it; only questions read it
            return torch.zeros(kwargs.get("minlength", 0), dtype=torch.long)
        return func(*args, **kwargs)


class _Listener(Chosen):
    """While open, records the answers, and which of them depend on the tokens. Answer number `turned` is negated.

    At the places `supposed` (file:line) it answers as if every mask computed from the tokens were true. `known`
    holds the decisions of a longer sequence.
    """

    def __init__(
        self,
        made: Dependence,
        length: int,
        supposed: set[str],
        turned: int | None = None,
        known: Sequence[Decision] | None = None,
    ) -> None:
        super().__init__()
        self.answers: list[Any] = []
        self.decisions: list[Decision] = []
        self.depending: list[int] = []
        self.places: list[str] = []  # file:line of each answer
        self.supposable: set[str] = set()
        self.overruled: set[str] = set()  # where the true answer differed from the supposed one
        self.since: set[str] = set()  # where it computed after the negated answer
        self.made, self._length, self._turned = made, length, turned
        self._at, self._known = supposed, known
        self._supposed: dict[int, tuple[Tensor, Tensor]] = {}

    def decide(self, mask: Tensor, listed: bool) -> Decision:
        decision = self._decided(mask, listed)
        self.decisions.append(decision)
        return decision

    def _decided(self, mask: Tensor, listed: bool) -> Decision:
        if mask not in self.made:
            return Decision(table=torch.nonzero(mask)) if listed else Decision()
        if self._known is not None:
            number = len(self.decisions)
            rows = self._known[number].rows if number < len(self._known) else None
        else:
            axes = [i for i, n in enumerate(mask.shape) if n and n % self._length == 0]
            rows = axes[0] if len(axes) == 1 else None
        if rows is not None:
            if mask.dim() > 1 and int((mask != 0).movedim(rows, 0).flatten(1).sum(1).max()) > 1:
                what = "chooses rows by the tokens, and one row more than once"
                raise ObstacleError(Cause(Kind.DATA, what, calling_line()))
            return Decision(rows=rows)
        supposed = self._supposed.get(id(mask))
        return Decision(table=torch.nonzero(supposed[1])) if listed and supposed is not None else Decision()

    def plainly(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._turned is not None and len(self.answers) > self._turned:
            self.since.add(calling_line())
        result = func(*args, **kwargs)
        if func not in _ASKS:
            self._suppose(func, args, kwargs, result)
            return result
        place = calling_line()
        if args in self.made:
            asked = self._supposed.get(id(args[0]))
            if asked is not None and place in self._at:
                instead = func(asked[1])
                if instead != result:
                    self.overruled.add(place)
                result = instead
            else:
                self.depending.append(len(self.answers))
                if asked is not None:
                    self.supposable.add(place)
        if self._turned == len(self.answers):
            result = not result
        self.answers.append(result)
        self.places.append(place)
        return result

    def _suppose(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Records the result for masks that are all true."""
        name = getattr(func, "__name__", "")
        if name.endswith("_") and (not name.endswith("__") or name.startswith("__i")):  # in place
            return
        supposed = result
        if any(id(t) in self._supposed for t in tree_leaves((args, kwargs))):
            other = tree_map(lambda t: self._supposed[id(t)][1] if id(t) in self._supposed else t, (args, kwargs))
            with contextlib.suppress(Exception):  # the module never meets these numbers
                supposed = func(*other[0], **other[1])
        elif isinstance(result, Tensor) and (result.dtype == torch.bool or func in _COUNTS) and result in self.made:
            supposed = torch.ones_like(result)
        if supposed is not result:
            for tensor, instead in zip(tree_leaves(result), tree_leaves(supposed), strict=False):
                if isinstance(tensor, Tensor) and isinstance(instead, Tensor):
                    self._supposed[id(tensor)] = tensor, instead


def heard(run: Run, length: int, vocab_size: int) -> Heard:
    """Records the answers for one length. Raises ObstacleError for a branch on values computed from the tokens.

    A module whose first sequence asks nothing has no branch, and other sequences ask nothing either.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, vocab_size, (1, length), generator=generator) for _ in range(_TEXTS)]
    texts += [torch.full((1, length), token) for token in (0, vocab_size - 1)]
    supposed: set[str] = set()
    first = _listen(run, texts[0], supposed)[0]
    if not first.answers and not first.decisions:
        return Heard((), ())
    while True:
        try:
            found = [_listen(run, ids, supposed)[0] for ids in texts]
        except Exception as error:
            if not supposed:
                raise
            raise _branching(min(supposed)) from error  # the supposed branch fails for some sequences
        place = _branch(run, texts[0], found, supposed)
        if place is None:
            break
        if not any(place in listener.supposable for listener in found):
            raise _branching(place)
        supposed.add(place)
    chosen = Heard(found[0].answers, found[0].decisions)
    if supposed or any(decision.rows is not None for decision in chosen.decisions):
        _require_same(run, chosen.decisions, supposed, vocab_size, generator)
    return chosen


def _branch(run: Run, text: Tensor, found: Sequence[_Listener], supposed: set[str]) -> str | None:
    """Where the code first branches on values computed from the tokens, except in assertions."""
    answers = found[0].answers
    for number in sorted({number for listener in found for number in listener.depending}):
        same = all(len(other.answers) > number and other.answers[number] == answers[number] for other in found)
        if not (same and isinstance(answers[number], bool) and _asserts(run, text, supposed, number)):
            return next(other.places for other in found if len(other.places) > number)[number]
    return None


def _branching(place: str) -> ObstacleError:
    return ObstacleError(Cause(Kind.DATA, "branches on values", place))


def _require_same(
    run: Run, decisions: Sequence[Decision], supposed: set[str], vocab_size: int, generator: torch.Generator
) -> None:
    """Raises ObstacleError unless short sequences give the same logits with all rows, and test every branch."""
    overruled: set[str] = set()
    for length in _SHORT:
        for _ in range(_SHORT_TEXTS):
            ids = torch.randint(0, vocab_size, (1, length), generator=generator)
            try:
                with torch.no_grad(), quiet():
                    plain = run(ids)
            except Exception:  # the call does not accept so few tokens
                continue
            listener, taken = _listen(run, ids, supposed, known=decisions)
            overruled |= listener.overruled
            if not relative_difference(plain, taken) <= LOGITS:
                what = "chooses rows by the tokens in a way that cannot be followed"
                raise _branching(min(supposed)) if supposed else ObstacleError(Cause(Kind.DATA, what))
    if untried := supposed - overruled:
        raise _branching(min(untried))


def _listen(
    run: Run, ids: Tensor, supposed: set[str], turned: int | None = None, known: Sequence[Decision] | None = None
) -> tuple[_Listener, Tensor]:
    made = Dependence(ids)
    listener = _Listener(made, ids.shape[1], supposed, turned, known)
    with torch.no_grad(), quiet(), made, listener:
        logits = run(ids)
    return listener, logits


def _asserts(run: Run, ids: Tensor, supposed: set[str], turned: int) -> bool:
    """Whether the negated answer only raises an error: before it, only the error's message is computed."""
    listener = _Listener(Dependence(ids), ids.shape[1], supposed, turned)
    try:
        with torch.no_grad(), quiet(), listener.made, listener:
            run(ids)
    except Exception as error:
        file, _, number = (failing_line(error) or "").rpartition(":")
        said = {f"{file}:{int(number) + i}" for i in range(_STATEMENT)} if number.isdigit() else set()
        return is_raised(error) and listener.since <= said
    return False
